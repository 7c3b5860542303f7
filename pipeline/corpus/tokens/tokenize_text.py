"""Token rows of plain text; a causal model predicts every token."""

import datasets
import numpy as np
from transformers import PreTrainedTokenizerFast

from pipeline.corpus.tokens.row_builder import (
    Counts,
    Overlong,
    RowBuilder,
    batches,
    encode,
    too_long,
)
from pipeline.corpus.tokens.spans import ends_of, sizes_of


def add_text_rows(
    rows: RowBuilder,
    counts: Counts,
    texts: datasets.Dataset,
    tokenizer: PreTrainedTokenizerFast,
    *,
    max_length: int,
    overlong: Overlong,
) -> None:
    """Add the rows of one split; a long text is split into rows, or truncated.

    Rows with fewer than two tokens have nothing to predict and are dropped.

    Raises:
        ConfigError: If a text is too long under `error`.
    """
    for batch in batches(texts):
        encoded = encode(tokenizer, batch["text"])
        for number, listed in enumerate(encoded["input_ids"]):
            text = batch["text"][number]
            ids = np.array(listed, np.int32)
            offsets = np.array(encoded["offset_mapping"][number], np.int64).reshape(-1, 2)
            sizes = sizes_of(text, ends_of(offsets, len(text)))
            types = np.zeros(len(ids), np.int8)
            if rows.has_types:
                types = np.array(encoded["token_type_ids"][number], np.int8)
            end = len(ids)
            if len(ids) > max_length:
                counts.overlong += 1
                if overlong == "error":
                    raise too_long(batch["source"][number], len(ids), max_length)
                if overlong == "truncate":
                    end = max_length
            mask = np.ones(len(ids), bool)
            # Nothing precedes a text's first token that could predict it.
            if len(ids) and ids[0] == tokenizer.bos_token_id:
                mask[0] = False
            for piece, start in enumerate(range(0, max(1, end), max_length)):
                part = slice(start, min(start + max_length, end))
                if len(ids[part]) < 2:
                    counts.dropped += 1
                    continue
                rows.add(
                    ids[part],
                    mask[part],
                    source_row=batch["source_row"][number],
                    piece=piece,
                    types=types[part],
                )
                rows.add_target_sizes(mask[part], (sizes[0][part], sizes[1][part]))
