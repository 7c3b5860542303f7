"""The rows that are captured: with the corpus's own targets, or targets that the teacher generated.

Learning from the teacher's text instead of its distributions is sequence-level distillation (Kim
and Rush, arXiv 1606.07947). Only the training split changes: students are measured on what people
wrote.
"""

import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.corpus.files import directory_written_whole
from pipeline.corpus.text.examples import SPLITS, Split
from pipeline.corpus.tokens.tokens import (
    NUMBERS,
    TokenColumns,
    TokenMeta,
    TokenSet,
    token_digest,
    write_tokens,
)
from pipeline.errors import IntegrityError
from pipeline.provenance import read_json, write_json
from pipeline.written_by import remedy

logger = logging.getLogger(__name__)

RECORD = "transfer.json"
ROW_TYPES = dict.fromkeys(NUMBERS, np.int32) | {"source_row": np.int64, "label": np.int64}


@dataclass(frozen=True, slots=True)
class Counts:
    """Counts of generated rows.

    Attributes:
        rows: Rows of the training split.
        empty: Rows that the teacher ended at once; only the end token is a target.
        unfinished: Rows that reached the maximum number of tokens; they have no end token.
        new_tokens: Tokens generated, ends included.
    """

    rows: int
    empty: int
    unfinished: int
    new_tokens: int


def keep_corpus(output: Path) -> None:
    """Record in `output` that the corpus's own targets are captured.

    Raises:
        ResourceError: If it cannot be written.
    """
    with directory_written_whole(output) as temporary:
        write_json(temporary / RECORD, {"targets": "corpus"})


def transfer_tokens(transfer: Path, tokens: Path) -> Path:
    """Return the token set that capture reads: `transfer` if the teacher generated, else `tokens`.

    Args:
        transfer: What the generate stage wrote.
        tokens: The corpus's token set of the same teacher.

    Raises:
        IntegrityError: If the generate stage has not run, or ran on other tokens.
    """
    record = read_json(transfer / RECORD)
    if not isinstance(record, dict) or record.get("targets") not in {"corpus", "teacher"}:
        raise IntegrityError(
            f"{transfer / RECORD}: found no targets, expected corpus or teacher; {remedy(transfer)}"
        )
    if record["targets"] == "corpus":
        return tokens
    expected = TokenSet.load(tokens).meta.digest
    if record.get("tokens") != expected:
        raise IntegrityError(
            f"{transfer / RECORD}: made of tokens {str(record.get('tokens'))[:16]}, expected "
            f"{expected[:16]} as in {tokens}; {remedy(transfer)}"
        )
    return transfer


def write_transfer(
    output: Path,
    tokens: TokenSet,
    train: TokenColumns,
    continuations: Sequence[Sequence[int]],
    texts: Sequence[str],
    *,
    end_ids: frozenset[int],
) -> Counts:
    """Write a token set whose training rows are prompts with generated targets.

    Args:
        output: Directory to write, completely or not at all; an earlier one is replaced.
        tokens: The corpus's token set.
        train: Its training rows, from `read_columns`.
        continuations: Ids after the prompt of each row, including the end token.
        texts: Their text.
        end_ids: Ids that end a text.

    Raises:
        ResourceError: If the output cannot be written; an earlier one stays.
    """
    splits: dict[Split, TokenColumns] = {
        split: read_columns(tokens.split(split)) for split in SPLITS if split != "train"
    }
    splits["train"] = continued(train, continuations, texts)
    counts = Counts(
        rows=len(continuations),
        empty=sum(len(ids) == 1 and ids[0] in end_ids for ids in continuations),
        unfinished=sum(ids[-1] not in end_ids for ids in continuations),
        new_tokens=sum(map(len, continuations)),
    )
    meta = _meta(tokens.meta, splits, unfinished=counts.unfinished)
    record = {"targets": "teacher", "tokens": tokens.meta.digest, **asdict(counts)}
    with directory_written_whole(output) as temporary:
        shutil.copytree(tokens.tokenizer_path, temporary / "tokenizer")
        write_tokens(temporary, splits, meta)
        write_json(temporary / RECORD, record)
    logger.info(
        "%d rows of the teacher's text, %d tokens; %d ended at once, %d were stopped",
        counts.rows, counts.new_tokens, counts.empty, counts.unfinished,
    )  # fmt: skip
    return counts


def read_columns(rows: datasets.Dataset) -> TokenColumns:
    """Read the rows of a language task into memory."""
    table: Any = rows.with_format("arrow")[:]
    lengths = [len(ids) for ids in table["input_ids"]]
    found: dict[str, NDArray | list[list[str]]] = {
        "offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    }
    flat = {"input_ids": np.int32, "loss_mask": np.bool_, "token_type_ids": np.int8}
    for name in table.column_names:
        if name in flat:
            found[name] = _flat(table[name], flat[name])
        elif name in ROW_TYPES:
            found[name] = table[name].to_numpy().astype(ROW_TYPES[name])
        elif name == "references":
            found[name] = table[name].to_pylist()
    return TokenColumns(**found)  # pyright: ignore[reportArgumentType]


def continued(
    rows: TokenColumns, continuations: Sequence[Sequence[int]], texts: Sequence[str]
) -> TokenColumns:
    """Return rows of each prompt and its continuation; only the continuation is a target.

    Args:
        rows: Rows with `prompt_tokens`.
        continuations: Ids after each prompt, at least one.
        texts: Their text, for the counts of bytes and words.
    """
    assert rows.prompt_tokens is not None  # only tasks with prompts generate
    ids, masks, types = [], [], []
    for start, prompt, new in zip(
        rows.offsets[:-1], rows.prompt_tokens, continuations, strict=True
    ):
        ids.append(rows.input_ids[start : start + prompt])
        ids.append(np.array(new, np.int32))
        masks.append(np.arange(prompt + len(new)) >= prompt)
        if rows.token_type_ids is not None:
            kept = rows.token_type_ids[start : start + prompt]
            types.append(np.pad(kept, (0, len(new)), mode="edge"))
    return replace(
        rows,
        offsets=np.concatenate([[0], np.cumsum([len(mask) for mask in masks])]).astype(np.int64),
        input_ids=np.concatenate(ids).astype(np.int32),
        loss_mask=np.concatenate(masks),
        token_type_ids=np.concatenate(types) if types else None,
        target_bytes=np.array([len(text.encode()) for text in texts], np.int32),
        target_words=np.array([len(text.split()) for text in texts], np.int32),
    )


def _meta(before: TokenMeta, splits: dict[Split, TokenColumns], *, unfinished: int) -> TokenMeta:
    train = splits["train"]
    assert train.target_bytes is not None  # continued() counts them
    assert train.target_words is not None
    written = int(train.target_bytes.sum())
    changed = {
        "tokens": len(train.input_ids),
        "targets": train.count_targets(),
        "text_bytes": before.text_bytes["train"] - before.target_bytes.get("train", 0) + written,
        "target_bytes": written,
        "target_words": int(train.target_words.sum()),
        "cut_targets": unfinished,
    }
    update = {key: {**getattr(before, key), "train": value} for key, value in changed.items()}
    return before.model_copy(update={**update, "digest": token_digest(splits)})


def _flat(rows: pa.ChunkedArray, kind: type) -> NDArray:
    """Return the concatenated values of a column of lists."""
    chunks = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in rows.chunks]
    return np.concatenate(chunks).astype(kind)
