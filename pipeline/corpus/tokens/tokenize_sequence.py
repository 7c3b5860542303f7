"""Token rows of a text or a pair with one answer: a class, several classes, or a number."""

from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerFast

from pipeline.corpus.text.examples import CorpusMeta
from pipeline.corpus.tokens.row_builder import (
    Counts,
    Overlong,
    RowBuilder,
    batches,
    encode,
    too_long,
)


def add_sequence_rows(
    rows: RowBuilder,
    counts: Counts,
    texts: datasets.Dataset,
    tokenizer: PreTrainedTokenizerFast,
    *,
    max_length: int,
    overlong: Overlong,
    meta: CorpusMeta,
) -> None:
    """Add the rows of one split; of a long pair the longer text is truncated first.

    Rows of special tokens only are dropped.

    Raises:
        ConfigError: If a text is too long under `error`.
    """
    for batch in batches(texts):
        pairs = [pair or "" for pair in batch["pair"]] if meta.has_pairs else None
        encoded = encode(
            tokenizer, batch["text"], pairs, truncation="longest_first", max_length=max_length
        )
        for number, listed in enumerate(encoded["input_ids"]):
            mask = np.array(encoded["special_tokens_mask"][number], bool)
            # Truncation returns what it cut as further encodings, which an exact fit does not have.
            cut = encoded.encodings[number].overflowing
            if cut:
                counts.overlong += 1
                if overlong == "error":
                    # A cut pair comes in overlapping windows: only a second pass counts it.
                    whole = encode(tokenizer, [batch["text"][number]], pairs and [pairs[number]])
                    length = len(whole["input_ids"][0])
                    raise too_long(batch["source"][number], length, max_length)
            if mask.all():
                counts.dropped += 1
                continue
            types = encoded["token_type_ids"][number] if rows.has_types else None
            rows.add(
                np.array(listed, np.int32),
                ~mask,
                source_row=batch["source_row"][number],
                types=None if types is None else np.array(types, np.int8),
            )
            _add_answer(rows, batch, number, meta)


def _add_answer(
    rows: RowBuilder, batch: dict[str, list[Any]], number: int, meta: CorpusMeta
) -> None:
    if meta.task == "classification":
        rows.labels.append(meta.classes.index(batch["label"][number]))
    elif meta.task == "regression":
        rows.targets.append(np.array([float(batch["label"][number])], np.float32))
    else:
        chosen = set(batch["labels"][number])
        rows.targets.append(np.array([name in chosen for name in meta.classes], np.float32))
