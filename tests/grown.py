"""A tiny corpus with more text than before, for the same teacher: what `corpus.added` leads to."""

import shutil
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.corpus.text.examples import SPLITS, Split
from pipeline.corpus.tokens.tokens import TokenColumns, TokenSet, token_digest, write_tokens
from pipeline.corpus.tokens.transfer import read_columns
from pipeline.store.index import read_index
from pipeline.store.layout import Layout
from tests.captured import Captured, write_rows

MORE = (8, 15, 3, 20, 6)


def grown(
    store: Captured,
    root: Path,
    *,
    lengths: Sequence[int] = MORE,
    seed: int = 7,
    with_stores: bool = True,
) -> Captured:
    """The project of `store` with training rows of these lengths added; their capture is to come.

    Args:
        store: The project before.
        root: Where the new one goes.
        lengths: Tokens of each added row.
        seed: Of the added rows.
        with_stores: Bring along the stores that were captured before.
    """
    before = TokenSet.load(store.tokens)
    shape: dict[Split, Sequence[int]] = {"train": lengths, "validation": (4,), "test": (4,)}
    types = bool(before.meta.columns)
    more = write_rows(
        root / "more", task=store.task, lengths=shape, seed=seed, token_types=types
    ).split("train")
    splits: dict[Split, TokenColumns] = {
        split: read_columns(before.split(split)) for split in SPLITS
    }
    added = read_columns(more)
    splits["train"] = _joined(splits["train"], replace(added, source_row=added.source_row + 1000))
    rows = (*(before.meta.parts or (before.meta.rows["train"],)), len(lengths))
    update: dict[str, Any] = {
        "parts": rows,
        "rows": before.meta.rows | {"train": sum(rows)},
        "tokens": before.meta.tokens | {"train": len(splits["train"].input_ids)},
        "targets": before.meta.targets | {"train": splits["train"].count_targets()},
        "digest": token_digest(splits),
    }
    write_tokens(root / "tokens", splits, before.meta.model_copy(update=update))
    shutil.copytree(before.tokenizer_path, root / "tokens" / "tokenizer")
    shutil.copytree(store.teacher, root / "teacher")
    if with_stores:
        shutil.copytree(store.stores, root / "stores")
    return replace(store, root=root)


def _joined(first: TokenColumns, second: TokenColumns) -> TokenColumns:
    found: dict[str, Any] = {}
    for field in fields(TokenColumns):
        one, other = getattr(first, field.name), getattr(second, field.name)
        if field.name == "offsets":
            found["offsets"] = np.concatenate([one, other[1:] + one[-1]])
        elif one is not None:
            found[field.name] = one + other if isinstance(one, list) else np.append(one, other)
    return TokenColumns(**found)


def digests_of(store: Path) -> dict[str, str]:
    """The digest of every whole signal of a store."""
    index = read_index(Layout(store))
    return {name: entry["digest"] for name, entry in index["signals"].items()}
