"""Tables of rows with named columns: tsv, csv, JSON lines, Parquet and Arrow files."""

import csv
import itertools
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from pyarrow import ipc, parquet

from pipeline.corpus.files import Files, open_text, refuse_empty, resolve_files
from pipeline.corpus.sources.base import Reading
from pipeline.corpus.sources.columns import ColumnSource
from pipeline.corpus.text.examples import Example
from pipeline.errors import ConfigError
from pipeline.provenance import file_sha256
from pipeline.tasks import Task

logger = logging.getLogger(__name__)
Format = Literal["tsv", "csv", "jsonl", "parquet", "arrow"]

# A cell of the csv module ends at 128 KiB by default, which a long document passes. The largest
# value that fits a C long on every platform.
MAX_CELL_CHARACTERS = 2**31 - 1

# Rows of a Parquet or Arrow file that are Python objects at a time.
BATCH_ROWS = 1024


class TableSource(ColumnSource):
    """Section `corpus.source` of kind `table`.

    Attributes:
        files: As in the text source; files of a split keep it.
        format: Taken from the file's name where not given.
        quoting: Whether quotes enclose cells of a tsv or csv; without, they are text.
    """

    kind: Literal["table"] = "table"
    files: Files
    format: Format | None = None
    quoting: bool = True

    def read(self, root: Path, task: Task = "causal-lm") -> Reading:
        """Read the files; rows whose texts are all empty are left out."""
        examples: list[Example] = []
        digests: dict[str, str] = {}
        empty = 0
        for split, name, path in resolve_files(self.files, root=root):
            for line, cells in self._rows(path, self.wanted(split)):
                example = self.example(
                    cells,
                    f"{path}: line {line}",
                    split=split,
                    source=f"{name}:{line}",
                    row=len(examples),
                )
                if example is None:
                    empty += 1
                else:
                    examples.append(example)
            digests[name] = file_sha256(path)
        refuse_empty(self.files, {example.split for example in examples})
        settings = {**self.column_settings(), "quoting": self.quoting}
        provenance = {"kind": self.kind, "files": digests, **settings}
        return Reading(examples, provenance, {"empty": empty})

    def preview(self, root: Path, task: Task, rows: int) -> list[Example]:
        """Read the first rows of each file that have text; those before them may have none."""
        found: list[Example] = []
        for split, name, path in resolve_files(self.files, root=root):
            examples = (
                self.example(
                    cells, f"{path}: line {line}", split=split, source=f"{name}:{line}", row=line
                )
                for line, cells in self._rows(path, self.wanted(split))
            )
            found += itertools.islice((one for one in examples if one is not None), rows)
        refuse_empty(self.files, {example.split for example in found})
        return found

    def _rows(self, path: Path, wanted: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield line number in the file, or number of the row, and cells by column name."""
        kind = self.format or _format_of(path)
        if kind in {"parquet", "arrow"}:
            yield from _arrow_rows(path, kind, wanted)
            return
        with open_text(path) as file:
            yield from (
                _json_rows(file, path)
                if kind == "jsonl"
                else self._csv_rows(file, path, kind, wanted)
            )

    def _csv_rows(
        self, file: Iterable[str], path: Path, kind: Format, wanted: list[str]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        csv.field_size_limit(MAX_CELL_CHARACTERS)
        lines: list[str] = []
        reader = csv.reader(
            _remembered(file, lines),
            delimiter="\t" if kind == "tsv" else ",",
            quoting=csv.QUOTE_MINIMAL if self.quoting else csv.QUOTE_NONE,
            strict=True,
        )
        try:
            names = next(reader, None)
            if not names:
                raise ConfigError(f"{path}: is empty, expected a header line with the column names")
            twice = [name for name in wanted if names.count(name) > 1]
            if twice:
                raise ConfigError(
                    f"{path}: {names.count(twice[0])} columns are named {twice[0]!r}, expected "
                    "one; rename the others"
                )
            rows = spare = 0
            lines.clear()
            for cells in reader:
                if len(lines) > 1:
                    _refuse_swallowed(lines, len(names), path, kind, reader.line_num)
                    spare += len(lines) - 1
                lines.clear()
                if not cells:
                    continue
                rows += 1
                if len(cells) != len(names):
                    hint = "if quote marks are text, set quoting: false"
                    if not self.quoting:
                        hint = "correct the line, or set quoting: true if quotes enclose cells"
                    raise ConfigError(
                        f"{path}: line {reader.line_num}: {len(cells)} cells, expected "
                        f"{len(names)} ({', '.join(names)}); {hint}"
                    )
                yield reader.line_num, dict(zip(names, cells, strict=True))
            if spare:
                logger.warning(
                    "%s: %d rows, %d lines more, for cells in quotes hold line ends; if quote "
                    "marks are text, set quoting: false", path, rows, spare,
                )  # fmt: skip
        except csv.Error as error:
            raise ConfigError(
                f"{path}: line {reader.line_num}: {error}; expected well-formed {kind}, "
                "if quote marks are text, set quoting: false"
            ) from error


def _remembered(file: Iterable[str], lines: list[str]) -> Iterator[str]:
    """Yield the lines of a file and put them into `lines`."""
    for line in file:
        lines.append(line)
        yield line


def _refuse_swallowed(lines: list[str], columns: int, path: Path, kind: Format, last: int) -> None:
    """Refuse a row whose lines are rows themselves.

    A cell that begins with a quote mark, as text, goes on to the next cell that ends with one: the
    rows between them would be gone without a word. In a csv, whose texts hold commas, lines cannot
    tell.
    """
    full = [line for line in lines if line.strip()]
    if kind == "tsv" and columns > 1 and all(line.count("\t") == columns - 1 for line in full):
        raise ConfigError(
            f"{path}: lines {last - len(lines) + 1} to {last}: one cell in quotes holds line ends, "
            f"and each of its {len(lines)} lines has the {columns} cells of a row; if quote marks "
            "are text, set quoting: false, else write the line ends in the cell as spaces"
        )


def _format_of(path: Path) -> Format:
    """Tell the format by the name, .gz left aside."""
    formats: dict[str, Format] = {
        ".tsv": "tsv",
        ".csv": "csv",
        ".jsonl": "jsonl",
        ".ndjson": "jsonl",
        ".parquet": "parquet",
        ".arrow": "arrow",
        ".feather": "arrow",
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


def _arrow_rows(
    path: Path, kind: Format, wanted: list[str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows of a Parquet file or of an Arrow file or stream, from 1 on."""
    number = 0
    try:
        with pa.OSFile(str(path)) as file:
            for batch in _arrow_batches(file, kind):
                # Other columns may be images: they never become Python objects, unless a wanted one
                # is missing, when an error names all.
                names = batch.schema.names
                if twice := [name for name in wanted if names.count(name) > 1]:
                    raise ConfigError(
                        f"{path}: {names.count(twice[0])} columns are named {twice[0]!r}, expected "
                        "one; rename the others"
                    )
                missing = set(wanted) - set(names)
                chosen = batch if missing else batch.select(sorted(set(wanted)))
                for start in range(0, chosen.num_rows, BATCH_ROWS):
                    for cells in chosen.slice(start, BATCH_ROWS).to_pylist():
                        number += 1
                        yield number, cells
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"{path}: not a readable {kind} file ({reason}); expected a whole one, fetch it again "
            "or set corpus.source.format"
        ) from error


def _arrow_batches(file: pa.NativeFile, kind: Format) -> Iterator[pa.RecordBatch]:
    if kind == "parquet":
        yield from parquet.ParquetFile(file).iter_batches(BATCH_ROWS)
        return
    try:
        whole = ipc.open_file(file)
    except pa.ArrowInvalid:
        # What `datasets` writes is a stream, without the footer of a file.
        file.seek(0)
        yield from ipc.open_stream(file)
        return
    for position in range(whole.num_record_batches):
        yield whole.get_batch(position)
