"""Token rows on disk: the input of teacher, store and students of one tokenizer.

A row is one attention context with positions from 0. Rows are ragged; they are padded when a batch
is made.
"""

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.corpus.text.examples import SPLITS, Split, load_table, save_table
from pipeline.errors import IncompatibleError, IntegrityError
from pipeline.provenance import read_json, write_json
from pipeline.tasks import Task
from pipeline.written_by import remedy

NUMBERS = ("label", "source_row", "piece", "target_bytes", "target_words", "prompt_tokens")
"""Columns of one number a row."""
MEASURED = frozenset({"target_bytes", "target_words", "prompt_tokens", "references"})
"""Columns that measures read and models do not."""


class TokenMeta(BaseModel):
    """The description of a token set, in `tokens.json`.

    Attributes:
        classes: Class names in the order of their ids; empty for a task without classes.
        vocab: Number of ids the tokenizer can give, special and added ones included.
        max_length: Longest row in tokens.
        pad_id: Id to pad batches with.
        columns: Model inputs in addition to `input_ids`, such as token_type_ids.
        rows: Rows of each split.
        tokens: Tokens of each split, special ones included.
        outputs: Numbers that a sequence model gives for an example; 0 for a language task.
        targets: Tokens of each split that a causal model is asked to predict.
        target_bytes: UTF-8 bytes of the text those tokens stand for; empty for a sequence task.
        target_words: Whitespace-separated words of that text.
        text_bytes: UTF-8 bytes of the texts behind each split.
        overlong: Texts of each split that were split or truncated.
        cut_targets: Targets of each split that were truncated because they alone were too long.
        dropped: Rows of each split that were dropped because they had nothing to predict.
        text_form: The template, which decides ids: the template of prompt and target,
            with `target_begins_with` where its last white space is part of the target's tokens; or
            digest and date of the chat template.
        digest: SHA-256 of all columns of all splits, in order.
        parts: Training rows of the corpus itself, then of each source that was added to it; empty
            where none was.
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
    outputs: int = 0
    targets: dict[Split, int]
    target_bytes: dict[Split, int] = {}
    target_words: dict[Split, int] = {}
    text_bytes: dict[Split, int]
    overlong: dict[Split, int]
    cut_targets: dict[Split, int] = {}
    dropped: dict[Split, int]
    text_form: dict[str, str] = {}
    digest: str
    tokenizer_digest: str
    corpus_digest: str
    parts: tuple[int, ...] = ()

    @property
    def first_rows(self) -> int:
        """Number of training rows of the corpus itself, without added text."""
        return self.parts[0] if self.parts else self.rows["train"]

    def to_json(self) -> dict[str, Any]:
        """Return JSON values; without added text there is no key for it."""
        return self.model_dump(mode="json", exclude=set() if self.parts else {"parts"})

    def refuse_others(
        self,
        what: str,
        *,
        tokenizer: str | None = None,
        tokens: str | None = None,
        also: Collection[str] = (),
    ) -> None:
        """Refuse to combine these rows with something that was made from other rows.

        Args:
            what: What was made, for the message.
            tokenizer: The digest of the tokenizer it was made with; None where nobody knows.
            tokens: The digest of the token set it was made of; None where nobody knows.
            also: Digests of token sets that were made of this one.

        Raises:
            IncompatibleError: With both digests.
        """
        if tokenizer not in (None, self.tokenizer_digest):
            key, theirs, ours = "tokenizer", tokenizer, self.tokenizer_digest
        elif tokens not in (None, self.digest, *also):
            key, theirs, ours = "tokens", tokens, self.digest
        else:
            return
        raise IncompatibleError(
            f"{what}: made of {key} {theirs[:16]}, expected {ours[:16]} as the corpus is now; make "
            "it again of this corpus, as `dvc repro` does"
        )


@dataclass(frozen=True, slots=True)
class TokenColumns:
    """The rows of one split as flat arrays; row r is from offsets[r] to offsets[r + 1].

    Attributes:
        loss_mask: True where a token counts as a target: a causal position t counts where
            `loss_mask[t + 1]` does.
        source_row: The example's `source_row` in the prepared corpus.
        piece: Index of the row among those of its text.
        token_type_ids: Segment ids, where the model family wants them.
        label: Index into the classes, for classification.
        targets: Targets of a regression or multi-label model, [rows, outputs]: the number, or 0 or
            1 for each class.
        target_bytes: UTF-8 bytes of the text that a row's predicted tokens stand for, so that a
            loss in nats compares between tokenizers.
        target_words: Words of that text.
        prompt_tokens: Number of prompt tokens at the start of a row.
        references: Texts that the continuation is compared with, the one trained on first.
    """

    offsets: NDArray[np.int64]
    input_ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    source_row: NDArray[np.int64]
    piece: NDArray[np.int32]
    token_type_ids: NDArray[np.int8] | None = None
    label: NDArray[np.int64] | None = None
    targets: NDArray[np.float32] | None = None
    target_bytes: NDArray[np.int32] | None = None
    target_words: NDArray[np.int32] | None = None
    prompt_tokens: NDArray[np.int32] | None = None
    references: list[list[str]] | None = None

    def digest(self) -> str:
        """Return the SHA-256 of all values with their names and types.

        Columns that only scores read are left out: they change no feature, and so no store.
        """
        digest = hashlib.sha256()
        for name in self.__slots__:
            values = getattr(self, name)
            if values is not None and name not in MEASURED:
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
        for name in NUMBERS:
            values = getattr(self, name)
            if values is not None:
                columns[name] = pa.array(values[start:end])
        if self.targets is not None:
            chosen = self.targets[start:end]
            steps = np.arange(len(chosen) + 1, dtype=np.int32) * chosen.shape[1]
            columns["targets"] = pa.ListArray.from_arrays(pa.array(steps), pa.array(chosen.ravel()))
        if self.references is not None:
            columns["references"] = pa.array(self.references[start:end], pa.list_(pa.string()))
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
        """Open a token set; rows stay on disk until they are read.

        Raises:
            IntegrityError: If `tokens.json` is missing or is not what `tokenize` writes.
        """
        try:
            meta = TokenMeta.model_validate(read_json(path / "tokens.json"))
        except ValidationError as error:
            first = error.errors()[0]
            raise IntegrityError(
                f"{path / 'tokens.json'}: key {'.'.join(map(str, first['loc']))}: {first['msg']}; "
                f"{remedy(path)}"
            ) from error
        return cls(path, meta)

    @property
    def tokenizer_path(self) -> Path:
        """Directory that `AutoTokenizer.from_pretrained` loads."""
        return self.path / "tokenizer"

    def check_tokenizer(self) -> None:
        """Check that the tokenizer exists, for callers that need it late.

        Raises:
            IntegrityError: If it is not.
        """
        if not (self.tokenizer_path / "tokenizer.json").is_file():
            raise IntegrityError(
                f"{self.tokenizer_path}: no tokenizer.json, expected the tokenizer of the rows; "
                f"{remedy(self.path)}"
            )

    def split(self, name: Split) -> datasets.Dataset:
        """Open the rows of one split.

        Raises:
            IntegrityError: If they are missing or fewer than `tokens.json` says.
        """
        rows = load_table(self.path / name)
        if len(rows) != self.meta.rows[name]:
            raise IntegrityError(
                f"{self.path / name}: {len(rows)} rows, expected {self.meta.rows[name]} as "
                f"tokens.json says; {remedy(self.path)}"
            )
        return rows


def write_tokens(path: Path, splits: dict[Split, TokenColumns], meta: TokenMeta) -> None:
    """Write one dataset directory a split and, last, `tokens.json`."""
    for split, columns in splits.items():
        save_table(columns.to_table(), path / split, identity=f"{meta.digest} {split}")
    write_json(path / "tokens.json", meta.to_json())


def token_digest(splits: dict[Split, TokenColumns]) -> str:
    """Return the SHA-256 over the digests of all splits, in their fixed order."""
    digests = [f"{split} {splits[split].digest()}\n" for split in SPLITS]
    return hashlib.sha256("".join(digests).encode()).hexdigest()
