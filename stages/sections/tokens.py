"""Section `teachers.T.tokens`: how text becomes ids."""

from typing import Annotated, Literal

from pydantic import Field

from stages.parameters import Section


class TokenParams(Section):
    """Section `teachers.T.tokens`.

    `vocab` trains a tokenizer; `tokenizer` names another than the teacher's.
    """

    max_length: Annotated[int, Field(ge=4)]
    overlong: Literal["split", "truncate", "error"] | None = None
    vocab: Annotated[int, Field(ge=258)] | None = None
    tokenizer: str | None = None
