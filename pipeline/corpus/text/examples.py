"""The prepared corpus: text examples in three splits, the same for every teacher.

Texts are dealt out here once, before any tokenizer sees them, so that all teachers and students
are measured on the same rows. Equal examples give equal files, byte for byte: a pipeline
that hashes its outputs must not see a change where there is none.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import datasets
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.errors import IntegrityError
from pipeline.provenance import canonical_json, fingerprint, read_json, write_json
from pipeline.tasks import Task
from pipeline.written_by import remedy

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

CORPUS_SCHEMA = pa.schema(
    [
        ("text", pa.string()),
        ("pair", pa.string()),
        ("label", pa.string()),
        ("labels", pa.list_(pa.string())),
        ("target", pa.string()),
        ("references", pa.list_(pa.string())),
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("source", pa.string()),
        ("source_row", pa.int64()),
    ]
)


TURN = pa.struct([("role", pa.string()), ("content", pa.string()), ("more", pa.string())])
"""A turn of a corpus whose chats hold more than text; see `turns.turn_of`."""


@dataclass(frozen=True, slots=True)
class Example:
    """One text, one pair of texts, or one chat, as its source gives it.

    Attributes:
        text: The text; the first of the two in a pair task, empty for a chat.
        pair: The second text of a pair.
        label: The class by name, or the number, as it stands in the source; empty where the source
            has none.
        labels: Classes by name, none of them or several; None where the source has no answer.
        target: What is to be written after the text; empty where the source has none.
        references: All texts that would do, the target first; of a chat, its last answer.
        messages: Turns of a chat as `turns.turn_of` gives them.
        split: The source's own split; None leaves the choice to the seed.
        source: Where the example comes from, for people: a module, or a file and line.
        source_row: Position in the source's reading order; unique in the corpus.
        group: Examples of one group are never parted by a split; empty means alone.
    """

    text: str
    pair: str | None = None
    label: str | None = None
    labels: tuple[str, ...] | None = None
    target: str | None = None
    references: tuple[str, ...] | None = None
    messages: tuple[dict[str, str | None], ...] | None = None
    split: Split | None = None
    source: str = ""
    source_row: int = 0
    group: str = ""

    @property
    def texts(self) -> list[str]:
        """All text that a model reads or learns to write."""
        turns = [turn.get(name) for turn in self.messages or () for name in ("content", "more")]
        return [text for text in (self.text, self.pair, self.target, *turns) if text]

    @property
    def text_bytes(self) -> int:
        """Length of all text in UTF-8 bytes."""
        return sum(len(text.encode()) for text in self.texts)


class CorpusMeta(BaseModel):
    """What a prepared corpus is, as `corpus.json` says it.

    Attributes:
        classes: Class names in the order of their ids; empty for a task without classes.
        has_pairs: Whether examples are pairs of texts.
        rows: Examples of each split.
        text_bytes: UTF-8 bytes of each split.
        dropped: Examples or paragraphs left out, by reason.
        splits: Where each split comes from: official, carved, or another split's name.
        seed: Seed of every carved split.
        source: Kind and digests of what was read; for python-docs the Python version.
        digest: SHA-256 of all texts, pairs, labels and source rows by split, in order.
        parts: Training examples of the corpus itself, then of each source that was added; empty
            where none was.
        added: Of each added source what `source` is of the corpus itself.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: Task
    classes: tuple[str, ...]
    has_pairs: bool
    rows: dict[Split, int]
    text_bytes: dict[Split, int]
    dropped: dict[str, int]
    splits: dict[Split, str]
    seed: int
    source: dict[str, Any]
    digest: str
    parts: tuple[int, ...] = ()
    added: list[dict[str, Any]] = []

    def to_json(self) -> dict[str, Any]:
        """Return JSON values; a corpus that nothing was added to says nothing of it."""
        none = set() if self.parts else {"parts", "added"}
        return self.model_dump(mode="json", exclude=none)


def corpus_digest(splits: Mapping[Split, Iterable[Example]]) -> str:
    """Return the SHA-256 of all that can change a model's input or target."""
    digest = hashlib.sha256()
    for split in SPLITS:
        for example in splits.get(split, ()):
            row = [split, example.text, example.pair, example.label, example.source_row]
            # Only where there are any: a corpus without them keeps the digest it always had.
            more = {
                name: getattr(example, name)
                for name in ("labels", "target", "references", "messages")
                if getattr(example, name)
            }
            row += [more] if more else []
            digest.update(canonical_json(row) + b"\n")
    return digest.hexdigest()


def save_table(table: pa.Table, path: Path, *, identity: str) -> None:
    """Write an Arrow table as a Hugging Face dataset directory.

    The dataset's own fingerprint is derived from `identity` and not drawn at random, as the
    library otherwise does, so equal tables give equal files.
    """
    datasets.disable_progress_bars()
    dataset = datasets.Dataset(table, fingerprint=fingerprint(identity)[:16])
    dataset.save_to_disk(path, num_shards=max(1, -(-table.nbytes // (500 << 20))))


def load_table(path: Path) -> datasets.Dataset:
    """Memory-map a dataset directory that `save_table` wrote.

    Raises:
        IntegrityError: If the directory is missing or is no such dataset.
    """
    try:
        dataset = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise IntegrityError(
            f"{path}: not a readable dataset ({reason}); {remedy(path)}"
        ) from error
    if not isinstance(dataset, datasets.Dataset):
        raise IntegrityError(f"{path}: found several datasets, expected one; {remedy(path)}")
    return dataset


def corpus_schema(examples: Iterable[Example]) -> pa.Schema:
    """Return the columns of a corpus; turns have a column more only where one of them needs it.

    Plain chats keep the files they always had.
    """
    if not any("more" in turn for one in examples for turn in one.messages or ()):
        return CORPUS_SCHEMA
    place = CORPUS_SCHEMA.get_field_index("messages")
    return CORPUS_SCHEMA.set(place, pa.field("messages", pa.list_(TURN)))


def corpus_table(examples: Sequence[Example], schema: pa.Schema) -> pa.Table:
    """Return examples as the columns of a schema."""
    columns = {name: [getattr(one, name) for one in examples] for name in schema.names}
    return pa.table(columns, schema=schema)


def write_corpus(path: Path, splits: Mapping[Split, list[Example]], meta: CorpusMeta) -> None:
    """Write one dataset directory a split and, last, `corpus.json`."""
    schema = corpus_schema(one for examples in splits.values() for one in examples)
    for split, examples in splits.items():
        table = corpus_table(examples, schema)
        save_table(table, path / split, identity=f"{meta.digest} {split}")
    write_json(path / "corpus.json", meta.to_json())


def read_corpus_meta(path: Path) -> CorpusMeta:
    """Read `corpus.json`.

    Raises:
        IntegrityError: If it is missing or is not what `write_corpus` writes.
    """
    try:
        return CorpusMeta.model_validate(read_json(path / "corpus.json"))
    except ValidationError as error:
        first = error.errors()[0]
        raise IntegrityError(
            f"{path / 'corpus.json'}: key {'.'.join(map(str, first['loc']))}: {first['msg']}; "
            "run `decant prepare`"
        ) from error


def read_split(path: Path, split: Split) -> datasets.Dataset:
    """Open one split of a prepared corpus, with the columns of `CORPUS_SCHEMA`."""
    return load_table(path / split)
