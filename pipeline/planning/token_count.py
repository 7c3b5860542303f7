"""Counts a corpus's tokens, or estimates them from a sample of its texts before it is tokenised.

A sample is of whole texts, drawn seeded from every split, so rows of a token set that does not
exist yet have the lengths they will have; they are repeated until they stand for all of the corpus.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.axes import TRAIN
from pipeline.corpus.text.examples import (
    SPLITS,
    CorpusMeta,
    Split,
    read_corpus_meta,
    read_split,
    save_table,
)
from pipeline.corpus.tokens.tokens import TokenMeta, TokenSet
from pipeline.provenance import write_json
from pipeline.store.plan import Plan, make_plan
from pipeline.store.reader import Segment
from pipeline.teacher.capture.spec import SegmentOptions

logger = logging.getLogger(__name__)
SAMPLE_BYTES = 4 * 2**20
"""Bytes of text in a sample; a smaller corpus is tokenised completely."""
FEWEST_TEXTS = 64
"""Smallest number of examples that a sample takes from a split, if there are as many."""


@dataclass(frozen=True)
class TokenCount:
    """Lengths of a corpus's token rows by split, and the rows that are at hand.

    `token_set` is the corpus's own if `is_exact`, else that of a sample. `origin` says in words
    where the numbers are from.
    """

    lengths: Mapping[Split, NDArray[np.int64]]
    token_set: TokenSet
    is_exact: bool
    origin: str

    @property
    def meta(self) -> TokenMeta:
        """The record of the token set, whose counts are those of the sample."""
        return self.token_set.meta

    def tokens(self, split: Split) -> int:
        """Return the number of tokens in a split of the corpus."""
        return int(self.lengths[split].sum())

    def plan(self, options: SegmentOptions) -> Plan:
        """Distribute the rows over segments as capture does.

        Raises:
            ConfigError: If a row is longer than a segment, or there is none to train on.
        """
        return make_plan(
            {str(split): lengths for split, lengths in self.lengths.items()},
            segment_tokens=options.segment_tokens,
            seed=options.seed,
            fraction=options.fraction,
            limit=options.limit,
            parts=self.meta.parts if self.is_exact else (),
        )


def counted(tokens: Path) -> TokenCount:
    """Count the rows of a token set.

    Raises:
        IntegrityError: If it is not there or is none.
    """
    token_set = TokenSet.load(tokens)
    return TokenCount(_lengths(token_set), token_set, True, f"counted in {tokens}")


def sampled(
    sample: TokenSet, corpus: CorpusMeta, part: CorpusMeta, *, splits_rows: bool, origin: str
) -> TokenCount:
    """Estimate the rows of a corpus from those of a sample.

    Args:
        sample: The sample, tokenised.
        corpus: All texts.
        part: The texts of the sample.
        splits_rows: Whether a long text becomes several rows; then rows go with bytes of text, else
            with texts.
        origin: Where the texts are from, in words.
    """
    lengths: dict[Split, NDArray[np.int64]] = {}
    for split, found in _lengths(sample).items():
        whole, of = (
            (corpus.text_bytes[split], part.text_bytes[split])
            if splits_rows
            else (corpus.rows[split], part.rows[split])
        )
        lengths[split] = np.resize(found, max(1, round(len(found) * whole / max(1, of))))
    share = sum(part.text_bytes.values()) / max(1, sum(corpus.text_bytes.values()))
    is_exact = part.digest == corpus.digest
    how = "all of it tokenised for this" if is_exact else f"told by {share:.1%} of it, tokenised"
    return TokenCount(lengths, sample, is_exact, f"{origin}, {how}")


def write_sample(corpus: Path, output: Path, *, most_bytes: int = SAMPLE_BYTES) -> Path:
    """Write a sample of a prepared corpus; return its directory, or `corpus` if that is small.

    Args:
        corpus: What the prepare stage wrote.
        output: Directory for the sample.
        most_bytes: Text in UTF-8 to sample, about.

    Raises:
        IntegrityError: If the corpus cannot be read.
    """
    meta = read_corpus_meta(corpus)
    total = sum(meta.text_bytes.values())
    if total <= most_bytes:
        return corpus
    rows: dict[Split, int] = {}
    text_bytes: dict[Split, int] = {}
    for split in SPLITS:
        texts = read_split(corpus, split)
        count = min(len(texts), max(FEWEST_TEXTS, round(len(texts) * most_bytes / total)))
        order = np.random.default_rng([0, SPLITS.index(split)]).permutation(len(texts))
        table = _take(texts, np.sort(order[:count]))
        save_table(table, output / split, identity=f"{meta.digest} {split} {most_bytes}")
        rows[split], text_bytes[split] = count, _text_bytes(table)
    described = meta.model_copy(
        update={
            "rows": rows,
            "text_bytes": text_bytes,
            "digest": f"sample of {meta.digest}",
            "parts": (),
            "added": [],
        }
    )
    write_json(output / "corpus.json", described.to_json())
    logger.info("tokenising a sample of %d bytes of text", sum(text_bytes.values()))
    return output


def _take(texts: datasets.Dataset, rows: NDArray[np.int64]) -> pa.Table:
    return texts.data.table.take(pa.array(rows))


def _text_bytes(table: pa.Table) -> int:
    """Bytes of all text that a model reads or learns to write, as `Example.text_bytes` counts."""
    total = 0
    for row in table.select(["text", "pair", "target", "messages"]).to_pylist():
        turns = [message["content"] for message in row["messages"] or ()]
        texts = (row["text"], row["pair"], row["target"], *turns)
        total += sum(len(text.encode()) for text in texts if text)
    return total


def _lengths(token_set: TokenSet) -> dict[Split, NDArray[np.int64]]:
    found: dict[Split, NDArray[np.int64]] = {}
    for split in SPLITS:
        column = token_set.split(split).data.column("input_ids")
        lengths = pc.call_function("list_value_length", [column])
        found[split] = lengths.to_numpy().astype(np.int64)
    return found


def sample_segment(token_set: TokenSet, options: SegmentOptions, tokens: int) -> Segment:
    """Return training rows with at least this many tokens, if there are as many, as one segment.

    They are those of evenly spread segments of the plan, in its order, so rows and batches are like
    those of any segment.

    Args:
        token_set: The rows.
        options: How they are dealt to segments.
        tokens: How many tokens.
    """
    lengths = _lengths(token_set)
    plan = make_plan(
        {TRAIN: lengths[TRAIN]},
        segment_tokens=options.segment_tokens,
        seed=options.seed,
        fraction=options.fraction,
        limit=options.limit,
    )
    wanted = min(plan.segments, max(1, -(-tokens // plan.segment_tokens)))
    numbers = np.unique(np.linspace(0, plan.segments, wanted, endpoint=False).astype(int))
    chosen = np.flatnonzero(np.isin(plan.segment, numbers))
    needed = int(np.searchsorted(np.cumsum(plan.length[chosen]), tokens)) + 1
    # Fewer than a segment: its examples are in no order, so any of them will do.
    chosen = chosen[:needed]
    columns = ("input_ids", *token_set.meta.columns)
    data = token_set.split(TRAIN).select_columns(list(columns)).with_format("numpy")
    rows = data[plan.row[chosen].tolist()]
    length = plan.length[chosen]
    return Segment(
        0,
        examples=np.arange(len(chosen)),
        offset=np.cumsum(length) - length,
        length=length,
        slot=np.arange(len(chosen)),
        tokens={column: np.concatenate(list(rows[column])) for column in columns},
    )
