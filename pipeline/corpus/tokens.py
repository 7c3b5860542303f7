"""Token rows: what every teacher pass, store and student of one tokenizer starts from.

A row is one attention context with positions from 0. Rows are ragged; padding is made when a
batch is.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.corpus.examples import SPLITS, Split, Task, load_table, save_table
from pipeline.errors import IntegrityError
from pipeline.provenance import read_json, write_json


class TokenMeta(BaseModel):
    """What a token set is, as `tokens.json` says it.

    Attributes:
        classes: Class names in the order of their ids; empty for causal-lm.
        vocab: Number of ids the tokenizer can give, special and added ones included.
        max_length: Longest row in tokens.
        pad_id: Id to pad batches with.
        columns: Model inputs beside `input_ids`, as token_type_ids.
        rows: Rows of each split.
        tokens: Tokens of each split, special ones included.
        targets: Tokens of each split that a causal model is asked to predict.
        text_bytes: UTF-8 bytes of the texts behind each split.
        overlong: Texts of each split that were split or truncated.
        dropped: Pieces of each split that were left out for want of anything to predict.
        digest: SHA-256 of all columns of all splits, in order.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: Task
    classes: tuple[str, ...]
    vocab: int
    max_length: int
    pad_id: int
    columns: tuple[str, ...]
    rows: dict[Split, int]
    tokens: dict[Split, int]
    targets: dict[Split, int]
    text_bytes: dict[Split, int]
    overlong: dict[Split, int]
    dropped: dict[Split, int]
    digest: str
    tokenizer_digest: str
    corpus_digest: str


@dataclass(frozen=True, slots=True)
class TokenColumns:
    """The rows of one split as flat arrays; row r is the stretch from offsets[r] to offsets[r + 1].

    Attributes:
        loss_mask: True where a token counts as a target: a causal position t counts where
            `loss_mask[t + 1]` does.
        source_row: The example's `source_row` in the prepared corpus.
        piece: Number of the row among those of its text, from 0.
        token_type_ids: Segment ids, where the model family wants them.
        label: Index into the classes, for classification.
    """

    offsets: NDArray[np.int64]
    input_ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    source_row: NDArray[np.int64]
    piece: NDArray[np.int32]
    token_type_ids: NDArray[np.int8] | None = None
    label: NDArray[np.int64] | None = None

    def digest(self) -> str:
        """Return the SHA-256 of all values with their names and types."""
        digest = hashlib.sha256()
        for name in self.__slots__:
            values = getattr(self, name)
            if values is not None:
                # Little-endian, so that the digest does not depend on the machine.
                plain = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
                digest.update(f"{name} {plain.dtype.str} {plain.size}\n".encode())
                digest.update(plain.data)
        return digest.hexdigest()

    def count_targets(self) -> int:
        """Return how many tokens a causal model is asked to predict: never a row's first."""
        firsts = self.offsets[:-1]
        return int(self.loss_mask.sum() - self.loss_mask[firsts].sum())

    def to_table(self) -> pa.Table:
        """Return the rows as an Arrow table."""
        # Hugging Face's List feature has 32-bit offsets: past them one chunk is not enough.
        rows_per_chunk = max(1, len(self.piece) // (1 + len(self.input_ids) // (1 << 30)))
        starts = range(0, max(1, len(self.piece)), rows_per_chunk)
        return pa.concat_tables([self._chunk(start, start + rows_per_chunk) for start in starts])

    def _chunk(self, start: int, end: int) -> pa.Table:
        offsets = self.offsets[start : end + 1]
        first, last = int(offsets[0]), int(offsets[-1])
        columns: dict[str, pa.Array] = {}
        for name in ("input_ids", "loss_mask", "token_type_ids"):
            values = getattr(self, name)
            if values is not None:
                columns[name] = pa.ListArray.from_arrays(
                    pa.array((offsets - first).astype(np.int32)), pa.array(values[first:last])
                )
        for name in ("label", "source_row", "piece"):
            values = getattr(self, name)
            if values is not None:
                columns[name] = pa.array(values[start:end])
        return pa.table(columns)


@dataclass(frozen=True, slots=True)
class TokenSet:
    """A written token set.

    Attributes:
        path: Directory with one dataset a split, the tokenizer and `tokens.json`.
    """

    path: Path
    meta: TokenMeta

    @classmethod
    def load(cls, path: Path) -> "TokenSet":
        """Open a token set; rows stay on disk until they are asked for.

        Raises:
            IntegrityError: If `tokens.json` is missing or is not what `tokenize` writes.
        """
        try:
            meta = TokenMeta.model_validate(read_json(path / "tokens.json"))
        except ValidationError as error:
            first = error.errors()[0]
            raise IntegrityError(
                f"{path / 'tokens.json'}: key {'.'.join(map(str, first['loc']))}: {first['msg']}; "
                "run tokenize again"
            ) from error
        return cls(path, meta)

    @property
    def tokenizer_path(self) -> Path:
        """Directory that `AutoTokenizer.from_pretrained` loads."""
        return self.path / "tokenizer"

    def split(self, name: Split) -> datasets.Dataset:
        """Open the rows of one split.

        Raises:
            IntegrityError: If they are missing or fewer than `tokens.json` says.
        """
        rows = load_table(self.path / name)
        if len(rows) != self.meta.rows[name]:
            raise IntegrityError(
                f"{self.path / name}: {len(rows)} rows, expected {self.meta.rows[name]} as "
                "tokens.json says; run tokenize again"
            )
        return rows


def write_tokens(path: Path, splits: dict[Split, TokenColumns], meta: TokenMeta) -> None:
    """Write one dataset directory a split and, last, `tokens.json`."""
    for split, columns in splits.items():
        save_table(columns.to_table(), path / split, identity=f"{meta.digest} {split}")
    write_json(path / "tokens.json", meta.model_dump(mode="json"))


def token_digest(splits: dict[Split, TokenColumns]) -> str:
    """Return the SHA-256 over the digests of all splits, in their fixed order."""
    digests = [f"{split} {splits[split].digest()}\n" for split in SPLITS]
    return hashlib.sha256("".join(digests).encode()).hexdigest()
