"""Collects token rows: shared by the tokenisation of all tasks."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import datasets
import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from pipeline.corpus.tokens.tokens import TokenColumns
from pipeline.errors import ConfigError

Overlong = Literal["split", "truncate", "error"]

# Enough texts to keep the tokenizer's threads busy, few enough for their encodings in memory.
BATCH_TEXTS = 512


@dataclass(slots=True)
class Counts:
    """Counts of a split's texts that were truncated or split, had a cut target, or were dropped.

    Of `checked` rows, `borders` have a prompt of other tokens than a model would be given outside:
    the joined text's of a prompt and its target, the template's generation prompt of a chat.
    """

    overlong: int = 0
    checked: int = 0
    borders: int = 0
    cut_targets: int = 0
    dropped: int = 0


@dataclass(slots=True)
class RowBuilder:
    """Collects rows as lists of small arrays, which are concatenated once."""

    has_types: bool
    ids: list[NDArray[np.int32]] = field(default_factory=list)
    masks: list[NDArray[np.bool_]] = field(default_factory=list)
    types: list[NDArray[np.int8]] = field(default_factory=list)
    source_row: list[int] = field(default_factory=list)
    piece: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    targets: list[NDArray[np.float32]] = field(default_factory=list)
    target_bytes: list[int] = field(default_factory=list)
    target_words: list[int] = field(default_factory=list)
    prompt_tokens: list[int] = field(default_factory=list)
    references: list[list[str]] = field(default_factory=list)

    def add(
        self,
        ids: NDArray[np.int32],
        mask: NDArray[np.bool_],
        *,
        source_row: int,
        piece: int = 0,
        types: NDArray[np.int8] | None = None,
    ) -> None:
        """Add the columns that every task has; without `types` all tokens are of segment 0."""
        self.ids.append(ids)
        self.masks.append(mask)
        if self.has_types:
            self.types.append(np.zeros(len(ids), np.int8) if types is None else types)
        self.source_row.append(source_row)
        self.piece.append(piece)

    def add_target_sizes(
        self, mask: NDArray[np.bool_], sizes: tuple[NDArray[np.int64], NDArray[np.int64]]
    ) -> None:
        """Add bytes and words of the tokens that the row's mask asks for; never of its first."""
        asked = np.flatnonzero(mask[1:]) + 1
        self.target_bytes.append(int(sizes[0][asked].sum()))
        self.target_words.append(int(sizes[1][asked].sum()))

    def columns(self) -> TokenColumns:
        """Return all rows; empty columns are left out."""
        lengths = [len(ids) for ids in self.ids]
        return TokenColumns(
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            input_ids=np.concatenate(self.ids),
            loss_mask=np.concatenate(self.masks),
            source_row=np.array(self.source_row, np.int64),
            piece=np.array(self.piece, np.int32),
            token_type_ids=np.concatenate(self.types) if self.has_types else None,
            label=np.array(self.labels, np.int64) if self.labels else None,
            targets=np.stack(self.targets) if self.targets else None,
            target_bytes=np.array(self.target_bytes, np.int32) if self.target_bytes else None,
            target_words=np.array(self.target_words, np.int32) if self.target_words else None,
            prompt_tokens=np.array(self.prompt_tokens, np.int32) if self.prompt_tokens else None,
            references=self.references or None,
        )


def batches(texts: datasets.Dataset) -> Iterator[dict[str, list[Any]]]:
    """Yield the examples of a prepared split as plain columns, a few hundred at a time."""
    columns = texts.with_format(None)
    for start in range(0, len(texts), BATCH_TEXTS):
        yield columns[start : start + BATCH_TEXTS]


def encode(
    tokenizer: PreTrainedTokenizerFast, texts: list[str], pairs: list[str] | None = None, **how: Any
) -> Any:
    """Tokenise a batch; the encoding has offsets and a mask of the special tokens."""
    return tokenizer(
        texts,
        pairs,
        return_attention_mask=False,
        return_special_tokens_mask=True,
        return_offsets_mapping=True,
        # The library warns of long texts; here they are counted.
        verbose=False,
        **how,
    )


def opening_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return the special tokens that the tokenizer puts before a text."""
    encoded = encode(tokenizer, ["a"])
    special = encoded["special_tokens_mask"][0]
    return encoded["input_ids"][0][: special.index(0) if 0 in special else len(special)]


def too_long(source: str, length: int, max_length: int) -> ConfigError:
    """Return the error of a text that `overlong: error` refuses."""
    return ConfigError(
        f"{source}: {length} tokens, expected at most max_length {max_length}; shorten the text, "
        "raise max_length, or set overlong to truncate (or split, for causal-lm)"
    )
