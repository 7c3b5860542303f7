"""Section `teachers.T.tokens`: how text becomes ids, and whose text it is."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipeline.corpus.files import open_text
from pipeline.generation.options import GenerationOptions
from pipeline.section import Section


class TokenParams(Section):
    """Section `teachers.T.tokens`.

    `vocab` trains a tokenizer; `tokenizer` names another than the teacher's. `template` is for the
    task prompt-target, `chat_template` (a jinja file) and `chat_date` for messages. With `targets`
    teacher, students learn what the teacher writes, as `generation` says.
    """

    max_length: Annotated[int, Field(ge=4)]
    overlong: Literal["split", "truncate", "error"] | None = None
    vocab: Annotated[int, Field(ge=258)] | None = None
    tokenizer: str | None = None
    template: str | None = None
    chat_template: str | None = None
    chat_date: str = "2026-01-01"
    targets: Literal["corpus", "teacher"] = "corpus"
    generation: GenerationOptions | None = None

    @model_validator(mode="after")
    def _generation_is_the_teachers(self) -> "TokenParams":
        if self.generation is not None and self.targets == "corpus":
            raise ValueError("generation: needs targets: teacher, for the corpus generates nothing")
        return self

    def rendering(self) -> dict[str, Any]:
        """Return how text becomes rows: `template`, `chat_template` as text, and `chat_date`.

        Raises:
            ConfigError: If the chat template cannot be read.
        """
        chat_template = None
        if self.chat_template is not None:
            with open_text(Path(self.chat_template)) as file:
                chat_template = file.read()
        return {
            "template": self.template,
            "chat_template": chat_template,
            "chat_date": self.chat_date,
        }
