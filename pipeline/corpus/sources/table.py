"""Tables of texts and labels: tsv, csv and JSON lines, columns by name."""

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from pipeline.corpus.examples import Example
from pipeline.corpus.files import Files, open_text, refuse_empty, resolve_files
from pipeline.corpus.sources.base import Reading, SourceConfig
from pipeline.errors import ConfigError
from pipeline.provenance import file_sha256

Format = Literal["tsv", "csv", "jsonl"]

# A cell of the csv module ends at 128 KiB by default, which a long document passes. The largest
# value that fits a C long on every platform.
MAX_CELL_CHARACTERS = 2**31 - 1


class TableSource(SourceConfig):
    """Section `corpus.source` of kind `table`.

    Attributes:
        files: As in the text source; files of a split keep it.
        text: Name of the column with the text.
        pair: Name of the column with the second text of a pair.
        label: Name of the column with the class.
        format: Taken from the file's name where not given.
        quoting: Whether quotes enclose cells of a tsv or csv; without, they are text.
    """

    kind: Literal["table"] = "table"
    files: Files
    text: str = "text"
    pair: str | None = None
    label: str | None = None
    format: Format | None = None
    quoting: bool = True

    def read(self, root: Path) -> Reading:
        """Read the files; rows whose texts are all empty are left out."""
        examples: list[Example] = []
        digests: dict[str, str] = {}
        empty = 0
        for split, name, path in resolve_files(self.files, root=root):
            with open_text(path) as file:
                for line, cells in self._rows(file, path):
                    # Published test files often lack the label; which rows must have one is
                    # known only when the splits are dealt.
                    optional = split == "test"
                    text = self._cell(cells, self.text, path, line)
                    pair = self._cell(cells, self.pair, path, line) if self.pair else None
                    label = (
                        self._cell(cells, self.label, path, line, optional=optional)
                        if self.label
                        else None
                    )
                    if not text.strip() and not (pair or "").strip():
                        empty += 1
                        continue
                    examples.append(
                        Example(
                            text=text,
                            pair=pair,
                            label=label,
                            split=split,
                            source=f"{name}:{line}",
                            source_row=len(examples),
                        )
                    )
            digests[name] = file_sha256(path)
        refuse_empty(self.files, {example.split for example in examples})
        settings = self.model_dump(include={"text", "pair", "label", "quoting"}, mode="json")
        provenance = {"kind": self.kind, "files": digests, **settings}
        return Reading(examples, provenance, {"empty": empty})

    def _rows(self, file: Iterable[str], path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield line number in the file and cells by column name."""
        kind = self.format or _format_of(path)
        return _json_rows(file, path) if kind == "jsonl" else self._csv_rows(file, path, kind)

    def _csv_rows(
        self, file: Iterable[str], path: Path, kind: Format
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        csv.field_size_limit(MAX_CELL_CHARACTERS)
        reader = csv.reader(
            file,
            delimiter="\t" if kind == "tsv" else ",",
            quoting=csv.QUOTE_MINIMAL if self.quoting else csv.QUOTE_NONE,
            strict=True,
        )
        try:
            names = next(reader, None)
            if not names:
                raise ConfigError(f"{path}: is empty, expected a header line with the column names")
            for cells in reader:
                if not cells:
                    continue
                if len(cells) != len(names):
                    raise ConfigError(
                        f"{path}: line {reader.line_num}: {len(cells)} cells, expected "
                        f"{len(names)} ({', '.join(names)}); if quote marks are text, "
                        "set quoting: false"
                    )
                yield reader.line_num, dict(zip(names, cells, strict=True))
        except csv.Error as error:
            raise ConfigError(
                f"{path}: line {reader.line_num}: {error}; expected well-formed {kind}, "
                "if quote marks are text, set quoting: false"
            ) from error

    def _cell(
        self, cells: dict[str, Any], column: str, path: Path, line: int, *, optional: bool = False
    ) -> str:
        """Return a cell as text; numbers and booleans of JSON as JSON writes them."""
        if column not in cells:
            if optional:
                return ""
            raise ConfigError(
                f"{path}: line {line}: no column {column!r}, it has {', '.join(map(repr, cells))}; "
                "correct the name in corpus.source"
            )
        value = cells[column]
        if isinstance(value, (dict, list)):
            raise ConfigError(
                f"{path}: line {line}: column {column!r} holds a {type(value).__name__}, "
                "expected text, a number or a boolean; flatten the column"
            )
        if value is None:
            return ""
        return value if isinstance(value, str) else json.dumps(value)


def _format_of(path: Path) -> Format:
    """Tell the format by the name, .gz left aside."""
    formats: dict[str, Format] = {
        ".tsv": "tsv",
        ".csv": "csv",
        ".jsonl": "jsonl",
        ".ndjson": "jsonl",
    }
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    if suffix not in formats:
        raise ConfigError(
            f"{path}: cannot tell the format from the ending {suffix!r}, expected one of "
            f"{', '.join(formats)} (or with .gz); set corpus.source.format"
        )
    return formats[suffix]


def _json_rows(file: Iterable[str], path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(
                f"{path}: line {number}: not JSON ({error}); expected one object a line"
            ) from error
        if not isinstance(row, dict):
            raise ConfigError(
                f"{path}: line {number}: a {type(row).__name__}, expected one JSON object a line"
            )
        yield number, row
