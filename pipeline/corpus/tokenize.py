"""From a prepared corpus to token rows of one tokenizer.

Everything that decides ids happens here, once: special tokens, the cut at the context length, and
which tokens count as targets.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
from transformers import PreTrainedTokenizerFast

from pipeline.corpus.examples import SPLITS, CorpusMeta, Split, read_corpus_meta, read_split
from pipeline.corpus.files import directory_written_whole
from pipeline.corpus.tokenizer import tokenizer_digest
from pipeline.corpus.tokens import TokenColumns, TokenMeta, token_digest, write_tokens
from pipeline.errors import ConfigError

logger = logging.getLogger(__name__)

Overlong = Literal["split", "truncate", "error"]

# Enough texts to keep the tokenizer's threads busy, few enough for their encodings in memory.
BATCH_TEXTS = 512

# Transformers' mark for "no limit known" is 10**30; no context is near this.
SANE_LENGTH = 10**9


def tokenize_corpus(
    *,
    corpus: Path,
    tokenizer: PreTrainedTokenizerFast,
    max_length: int,
    overlong: Overlong | None,
    output: Path,
) -> TokenMeta:
    """Write the token rows of a prepared corpus, and the tokenizer, to the directory `output`.

    Rows keep the order of the corpus. For causal-lm a row with fewer than two tokens has nothing
    to predict and is left out, so is for classification a row of special tokens only.

    Args:
        corpus: What `prepare_corpus` wrote.
        tokenizer: From `load_tokenizer` or `train_tokenizer`.
        max_length: Longest row in tokens, special ones included.
        overlong: What becomes of a longer text: consecutive rows (causal-lm only), its start
            (in a pair, the longer text gives first), or an error that names it. None splits for
            causal-lm and truncates for classification.
        output: Directory to write, whole or not at all; what stood there is replaced.

    Raises:
        ConfigError: If the length or `overlong` does not suit, a text is too long under `error`,
            or a split has no rows left. Nothing has been written then.
        IntegrityError: If the prepared corpus cannot be read.
        ResourceError: If the output cannot be written; what stood there stays.
    """
    meta = read_corpus_meta(corpus)
    pad_id = tokenizer.pad_token_id
    if not isinstance(pad_id, int):
        raise ConfigError(
            "tokenizer: found no pad token, expected one; add it to its tokenizer_config.json"
        )
    chosen = _check(meta, tokenizer, max_length, overlong)
    splits: dict[Split, TokenColumns] = {}
    counts: dict[Split, _Counts] = {}
    for split in SPLITS:
        rows = _Rows(has_types="token_type_ids" in tokenizer.model_input_names)
        counts[split] = _Counts()
        texts = read_split(corpus, split)
        if meta.task == "causal-lm":
            _fill_causal(rows, counts[split], texts, tokenizer, max_length, chosen)
        else:
            _fill_classified(rows, counts[split], texts, tokenizer, max_length, chosen, meta)
        if not rows.source_row:
            raise ConfigError(
                f"{corpus / split}: no row of {len(texts)} has a token to learn from, expected at "
                "least one; give longer texts"
            )
        splits[split] = rows.columns(meta.task == "classification")
    found = TokenMeta(
        task=meta.task,
        classes=meta.classes,
        vocab=len(tokenizer),
        max_length=max_length,
        pad_id=pad_id,
        columns=("token_type_ids",) if splits["train"].token_type_ids is not None else (),
        rows={split: len(columns.piece) for split, columns in splits.items()},
        tokens={split: len(columns.input_ids) for split, columns in splits.items()},
        targets={split: columns.count_targets() for split, columns in splits.items()},
        text_bytes=meta.text_bytes,
        overlong={split: count.overlong for split, count in counts.items()},
        dropped={split: count.dropped for split, count in counts.items()},
        digest=token_digest(splits),
        tokenizer_digest=tokenizer_digest(tokenizer),
        corpus_digest=meta.digest,
    )
    with directory_written_whole(output) as temporary:
        # The padding and truncation of the last call would be saved with the tokenizer.
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        if tokenizer.model_max_length > SANE_LENGTH:
            # Trained here, it knows no context; models taught on these rows know this one.
            tokenizer.model_max_length = max_length
        tokenizer.save_pretrained(temporary / "tokenizer")
        write_tokens(temporary, splits, found)
    for split in SPLITS:
        logger.info(
            "tokenized %s: %d rows, %d tokens, %d texts over %d tokens (%s), %d rows dropped",
            split, found.rows[split], found.tokens[split], found.overlong[split], max_length,
            chosen, found.dropped[split],
        )  # fmt: skip
    return found


@dataclass(slots=True)
class _Counts:
    overlong: int = 0
    dropped: int = 0


@dataclass(slots=True)
class _Rows:
    """Grows row by row; lists of small arrays, joined once."""

    has_types: bool
    ids: list[np.ndarray] = field(default_factory=list)
    masks: list[np.ndarray] = field(default_factory=list)
    types: list[np.ndarray] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    source_row: list[int] = field(default_factory=list)
    piece: list[int] = field(default_factory=list)

    def columns(self, has_labels: bool) -> TokenColumns:
        lengths = [len(ids) for ids in self.ids]
        return TokenColumns(
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            input_ids=np.concatenate(self.ids),
            loss_mask=np.concatenate(self.masks),
            source_row=np.array(self.source_row, np.int64),
            piece=np.array(self.piece, np.int32),
            token_type_ids=np.concatenate(self.types) if self.has_types else None,
            label=np.array(self.labels, np.int64) if has_labels else None,
        )


def _check(
    meta: CorpusMeta, tokenizer: PreTrainedTokenizerFast, max_length: int, overlong: Overlong | None
) -> Overlong:
    limit = tokenizer.model_max_length
    if limit < SANE_LENGTH and max_length > limit:
        raise ConfigError(
            f"max_length: found {max_length} tokens, expected at most {limit}, the context of this "
            "tokenizer's model; lower it"
        )
    special = tokenizer.num_special_tokens_to_add(pair=meta.has_pairs)
    if max_length < special + 2:
        raise ConfigError(
            f"max_length: found {max_length} tokens, expected at least {special + 2} ({special} "
            "special tokens and two of the text); raise it"
        )
    if meta.task == "classification" and overlong == "split":
        raise ConfigError(
            "overlong: 'split' would give one label to several rows, for classification "
            "expected 'truncate' or 'error'; change it"
        )
    return overlong or ("split" if meta.task == "causal-lm" else "truncate")


def _batches(texts: datasets.Dataset) -> Iterator[dict[str, list[Any]]]:
    columns = texts.with_format(None)
    for start in range(0, len(texts), BATCH_TEXTS):
        yield columns[start : start + BATCH_TEXTS]


def _encode(
    tokenizer: PreTrainedTokenizerFast, texts: list[str], pairs: list[str] | None, **cut: Any
) -> Any:
    return tokenizer(
        texts,
        pairs,
        return_attention_mask=False,
        return_special_tokens_mask=True,
        # The library warns of long texts; here they are counted.
        verbose=False,
        **cut,
    )


def _fill_causal(
    rows: _Rows,
    counts: _Counts,
    texts: datasets.Dataset,
    tokenizer: PreTrainedTokenizerFast,
    max_length: int,
    overlong: Overlong,
) -> None:
    for batch in _batches(texts):
        encoded = _encode(tokenizer, batch["text"], None)
        for number, listed in enumerate(encoded["input_ids"]):
            ids = np.array(listed, np.int32)
            types = np.zeros(len(ids), np.int8)
            if rows.has_types:
                types = np.array(encoded["token_type_ids"][number], np.int8)
            if len(ids) > max_length:
                counts.overlong += 1
                if overlong == "error":
                    raise _too_long(batch["source"][number], len(ids), max_length)
                if overlong == "truncate":
                    ids, types = ids[:max_length], types[:max_length]
            mask = np.ones(len(ids), bool)
            # Nothing stands before a text's opening mark that could predict it.
            if len(ids) and ids[0] == tokenizer.bos_token_id:
                mask[0] = False
            for piece, start in enumerate(range(0, max(1, len(ids)), max_length)):
                part = slice(start, start + max_length)
                if len(ids[part]) < 2:
                    counts.dropped += 1
                    continue
                rows.ids.append(ids[part])
                rows.masks.append(mask[part])
                rows.types.append(types[part])
                rows.source_row.append(batch["source_row"][number])
                rows.piece.append(piece)


def _fill_classified(
    rows: _Rows,
    counts: _Counts,
    texts: datasets.Dataset,
    tokenizer: PreTrainedTokenizerFast,
    max_length: int,
    overlong: Overlong,
    meta: CorpusMeta,
) -> None:
    index = {name: number for number, name in enumerate(meta.classes)}
    for batch in _batches(texts):
        pairs = [pair or "" for pair in batch["pair"]] if meta.has_pairs else None
        encoded = _encode(
            tokenizer, batch["text"], pairs, truncation="longest_first", max_length=max_length
        )
        for number, listed in enumerate(encoded["input_ids"]):
            mask = np.array(encoded["special_tokens_mask"][number], bool)
            # Truncation keeps what it cut beside the row, which tells it from an exact fit.
            cut = encoded.encodings[number].overflowing
            if cut:
                counts.overlong += 1
                if overlong == "error":
                    # A cut pair comes in overlapping windows: only a second pass counts it.
                    whole = _encode(tokenizer, [batch["text"][number]], pairs and [pairs[number]])
                    length = len(whole["input_ids"][0])
                    raise _too_long(batch["source"][number], length, max_length)
            if mask.all():
                counts.dropped += 1
                continue
            rows.ids.append(np.array(listed, np.int32))
            rows.masks.append(~mask)
            if rows.has_types:
                rows.types.append(np.array(encoded["token_type_ids"][number], np.int8))
            rows.labels.append(index[batch["label"][number]])
            rows.source_row.append(batch["source_row"][number])
            rows.piece.append(0)


def _too_long(source: str, length: int, max_length: int) -> ConfigError:
    return ConfigError(
        f"{source}: {length} tokens, expected at most max_length {max_length}; shorten the text, "
        "raise max_length, or set overlong to truncate (or split, for causal-lm)"
    )
