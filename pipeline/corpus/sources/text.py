"""Plain text files, split into examples by file, paragraph, line or separator."""

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from pipeline.corpus.files import Files, open_text, refuse_empty, refuse_zero_bytes, resolve_files
from pipeline.corpus.sources.base import Reading, SourceConfig
from pipeline.corpus.text.duplicates import paragraphs
from pipeline.corpus.text.examples import Example
from pipeline.provenance import file_sha256
from pipeline.tasks import Task

HEAD_CHARACTERS = 2**16
"""Number of characters that a preview reads at a time."""


class TextSource(SourceConfig):
    """Section `corpus.source` of kind `text`.

    Attributes:
        files: A name or glob relative to the project, several of them, or lists for the splits
            train, validation and test. Names that end in .gz are unpacked.
        examples: What one example is, where no separator is given.
        separator: Text that stands between two examples, as "<|endoftext|>"; it is left out.
        join_characters: Examples of a file that follow each other are joined, with a blank line
            between them, until they have so many characters; 0 joins nothing. Short
            paragraphs would leave most of a model's context unused.
    """

    tasks: ClassVar[tuple[Task, ...]] = ("causal-lm",)

    kind: Literal["text"] = "text"
    files: Files
    examples: Literal["file", "paragraph", "line"] = "file"
    separator: str | None = Field(default=None, min_length=1)
    join_characters: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _whole_files_have_no_separator(self) -> "TextSource":
        if self.separator is not None and self.examples != "file":
            raise ValueError(
                f"separator and examples: {self.examples} both say where an example ends; give one"
            )
        return self

    def read(self, root: Path, task: Task = "causal-lm") -> Reading:
        """Read the files in the order of their names; text without words is left out."""
        examples: list[Example] = []
        digests: dict[str, str] = {}
        empty = 0
        for split, name, path in resolve_files(self.files, root=root):
            with open_text(path) as file:
                # Universal newlines by hand: `open_text` leaves line ends alone for the csv reader.
                content = file.read().replace("\r\n", "\n").replace("\r", "\n")
            refuse_zero_bytes(content, path)
            digests[name] = file_sha256(path)
            for number, piece in enumerate(self._joined(self._pieces(content)), start=1):
                if not piece.strip():
                    empty += 1
                    continue
                where = f"{name}:{number}"
                examples.append(
                    Example(text=piece, split=split, source=where, source_row=len(examples))
                )
        refuse_empty(self.files, {example.split for example in examples})
        settings = self.model_dump(
            include={"examples", "separator", "join_characters"}, mode="json"
        )
        provenance = {"kind": self.kind, "files": digests, **settings}
        return Reading(examples, provenance, {"empty": empty})

    def preview(self, root: Path, task: Task, rows: int) -> list[Example]:
        """Read the beginning of each file up to some text, as one example."""
        examples: list[Example] = []
        for split, name, path in resolve_files(self.files, root=root):
            with open_text(path) as file:
                content = file.read(HEAD_CHARACTERS)
                while not content.strip() and (more := file.read(HEAD_CHARACTERS)):
                    content = more
            refuse_zero_bytes(content, path)
            examples += [Example(text=content, split=split, source=name)] if content.strip() else []
        refuse_empty(self.files, {example.split for example in examples})
        return examples

    def _pieces(self, content: str) -> list[str]:
        """Split a file into examples; line ends inside an example are kept."""
        if self.separator is not None:
            return [piece.strip() for piece in content.split(self.separator) if piece.strip()]
        if self.examples == "line":
            return [line.strip() for line in content.split("\n") if line.strip()]
        if self.examples == "paragraph":
            return [part.strip("\n") for part in paragraphs(content)]
        return [content.strip("\n")]

    def _joined(self, pieces: list[str]) -> Iterator[str]:
        """Join neighbours until they reach `join_characters`; the last one may be shorter."""
        waiting: list[str] = []
        glue = "\n" if self.examples == "line" else "\n\n"
        for piece in pieces:
            waiting.append(piece)
            if sum(map(len, waiting)) >= self.join_characters:
                yield glue.join(waiting)
                waiting = []
        if waiting:
            yield glue.join(waiting)
