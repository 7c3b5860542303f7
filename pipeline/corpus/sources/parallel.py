"""Parallel text files, as translations come: line n of one file belongs to line n of another."""

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, model_validator

from pipeline.corpus.files import (
    Files,
    Patterns,
    open_text,
    refuse_empty,
    refuse_zero_bytes,
    resolve_files,
)
from pipeline.corpus.sources.base import Reading, SourceConfig
from pipeline.corpus.text.examples import Example, Split
from pipeline.errors import ConfigError
from pipeline.provenance import file_sha256
from pipeline.tasks import Task


class ParallelFiles(BaseModel):
    """The two sides of one split.

    Attributes:
        text: Files of the texts, as in the text source.
        target: Files of what is to be written, as many, with as many lines.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: Patterns
    target: Patterns


class ParallelSource(SourceConfig):
    """Section `corpus.source` of kind `parallel`.

    Attributes:
        files: The two sides of each split.
        text: Instead of `files`: files of the texts, for each split where it says so.
        target: Files of what is to be written, named like `text`.
    """

    tasks: ClassVar[tuple[Task, ...]] = ("prompt-target",)

    kind: Literal["parallel"] = "parallel"
    files: dict[Split, ParallelFiles] | None = None
    text: Files | None = None
    target: Files | None = None

    @model_validator(mode="after")
    def _named_in_one_way(self) -> "ParallelSource":
        sides = (self.text is not None) + (self.target is not None)
        if sides != (2 if self.files is None else 0):
            raise ValueError("expected files of both sides: give either files, or text and target")
        return self

    def read(self, root: Path, task: Task = "causal-lm") -> Reading:
        """Read the files; line pairs with an empty side are left out."""
        examples: list[Example] = []
        digests: dict[str, str] = {}
        empty = 0
        for split, (name, path), (other, target_path) in self._pairs(root):
            lines, answers = read_lines(path), read_lines(target_path)
            if len(lines) != len(answers):
                raise ConfigError(
                    f"{path} has {len(lines)} lines, {target_path} {len(answers)}, expected as "
                    "many, for line n belongs to line n; correct the files"
                )
            digests |= {name: file_sha256(path), other: file_sha256(target_path)}
            for number, (text, answer) in enumerate(zip(lines, answers, strict=True), start=1):
                if not text or not answer:
                    empty += 1
                    continue
                examples.append(
                    Example(
                        text=text,
                        target=answer,
                        references=(answer,),
                        split=split,
                        source=f"{name}:{number}",
                        source_row=len(examples),
                    )
                )
        refuse_empty(
            self._sides()[0], {example.split for example in examples}, key=self._key("text")
        )
        provenance: dict[str, Any] = {"kind": self.kind, "files": digests}
        return Reading(examples, provenance, {"empty": empty})

    def preview(self, root: Path, task: Task, rows: int) -> list[Example]:
        """See that the files of both sides are there, one to one."""
        self._pairs(root)
        return []

    def _pairs(self, root: Path) -> list[tuple[Split | None, tuple[str, Path], tuple[str, Path]]]:
        """Return split, and name and path of either side, of each pair of files.

        Raises:
            ConfigError: If a file is missing, or a side has more than the other.
        """
        texts, targets = self._sides()
        left = resolve_files(texts, root=root, key=self._key("text"))
        right = resolve_files(targets, root=root, key=self._key("target"))
        for _, _, path in (*left, *right):
            with open_text(path):
                pass
        if [split for split, _, _ in left] != [split for split, _, _ in right]:
            raise ConfigError(
                f"corpus.source: {len(left)} files of texts ({', '.join(n for _, n, _ in left)}), "
                f"{len(right)} of targets ({', '.join(n for _, n, _ in right)}), expected one to "
                "one in every split; correct the names"
            )
        return [(a[0], a[1:], b[1:]) for a, b in zip(left, right, strict=True)]

    def _key(self, side: str) -> str:
        """Return the parameter that names the files of a side."""
        return f"corpus.source.{side if self.files is None else 'files.{split}.' + side}"

    def _sides(self) -> tuple[Files, Files]:
        if self.files is None:
            assert self.text is not None
            assert self.target is not None
            return self.text, self.target
        return (
            {split: pair.text for split, pair in self.files.items()},
            {split: pair.target for split, pair in self.files.items()},
        )


def read_lines(path: Path) -> list[str]:
    """Return a file's lines; only line feeds end them, for texts hold other line separators.

    In a file without any, carriage returns do, as old computers wrote them.
    """
    with open_text(path) as file:
        content = file.read()
    refuse_zero_bytes(content, path)
    lines = (content if "\n" in content else content.replace("\r", "\n")).split("\n")
    if lines[-1] == "":
        lines.pop()
    return [line.strip() for line in lines]
