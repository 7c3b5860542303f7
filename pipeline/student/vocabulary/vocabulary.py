"""A vocabulary of only the ids that the training rows need, for a smaller embedding and head.

In a small student with a large vocabulary most parameters are in the embedding, mostly for pieces
that the training text never has. Embedding, head, tokenizer and targets keep the same ids. If the
student learns from the teacher's logits, it gets those of the kept ids alone: the teacher's
distribution on the condition that one of them comes next.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.axes import TRAIN
from pipeline.store.reader import StoreReader
from pipeline.student.data.reads import SegmentReads
from pipeline.student.data.stream import StoreDataset
from pipeline.student.vocabulary.smaller_tokenizer import SmallerTokenizer, cut_tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Vocabulary:
    """The ids of a student.

    Attributes:
        ids: The teacher's ids that are kept, rising; the index of an id is the student's id.
        tokenizer: The teacher's tokenizer with these ids alone.
    """

    ids: Int[Tensor, " kept"]
    tokenizer: SmallerTokenizer


def corpus_vocabulary(reader: StoreReader, parts: int | None = None) -> Vocabulary:
    """Return the ids that the store's training rows need, with a tokenizer that has just these.

    It keeps the ids in the rows, added and special tokens, and pieces that any text can be split
    into. Validation and test rows do not count.

    Args:
        reader: The store.
        parts: How many of the first parts of the training rows; None for all.

    Raises:
        IntegrityError: If rows or tokenizer are missing or altered.
        IncompatibleError: If the tokenizer cannot be cut, or the store has fewer parts.
    """
    plan = reader.plan
    used: set[int] = set()
    for number in reader.segments(TRAIN, parts):
        segment = reader.read_segment(number)
        rows = zip(segment.offset.tolist(), segment.length.tolist(), strict=True)
        for start, length in rows:
            used.update(np.unique(segment.tokens["input_ids"][start : start + length]).tolist())
    vocabulary = smaller_vocabulary(
        used,
        reader.teacher_config(),
        reader.tokenizer(),
        vocab=plan["vocab"],
        pad_id=plan["pad_id"],
    )
    logger.info("vocabulary: %d of %d ids kept", len(vocabulary.ids), plan["vocab"])
    return vocabulary


def smaller_vocabulary(
    used: Collection[int],
    teacher_config: Mapping[str, Any],
    tokenizer: Path,
    *,
    vocab: int,
    pad_id: int,
) -> Vocabulary:
    """Return the used ids, those in a configuration, and those that the tokenizer needs.

    Args:
        used: Ids in the training rows.
        teacher_config: The teacher's configuration.
        tokenizer: Directory of its tokenizer.
        vocab: Length of the tokenizer.
        pad_id: The padding id.

    Raises:
        IntegrityError: If the tokenizer is missing or broken.
        IncompatibleError: If it cannot be cut.
    """
    wanted = {*used, pad_id}
    for key, value in teacher_config.items():
        if key.endswith("_token_id"):
            named = value if isinstance(value, list) else [value]
            wanted.update(n for n in named if isinstance(n, int) and 0 <= n < vocab)
    cut = cut_tokenizer(tokenizer, wanted)
    return Vocabulary(torch.tensor(cut.ids), cut)


def keep_vocabulary(model: PreTrainedModel, ids: Int[Tensor, " kept"]) -> None:
    """Keep only the given ids in a model's embedding and head, in this order.

    Special ids in its configurations are renumbered; one that is not kept becomes None.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    padding = getattr(embedding, "padding_idx", None)
    kept = [
        {name: value.detach()[ids].clone() for name, value in part.named_parameters()}
        for part in (embedding, head)
        if part is not None
    ]
    model.resize_token_embeddings(len(ids), mean_resizing=False)
    parts = (model.get_input_embeddings(), model.get_output_embeddings())
    with torch.no_grad():
        for part, rows in zip(parts, kept, strict=False):
            own = {} if part is None else dict(part.named_parameters())
            for name, value in rows.items():
                own[name].copy_(value)
    new = {number: place for place, number in enumerate(ids.tolist())}
    table = model.get_input_embeddings()
    if isinstance(table, nn.Embedding) and padding is not None:
        table.padding_idx = new.get(padding)
    generation = getattr(model, "generation_config", None)  # classifiers have none
    configs = (model.config, model.config.get_text_config(), generation)
    for config in {id(config): config for config in configs if config is not None}.values():
        _renumber(config, new)


class VocabularyDataset(StoreDataset):
    """A store's batches in the ids of a student with a smaller vocabulary."""

    def __init__(
        self,
        reader: StoreReader,
        signals: Sequence[str],
        *,
        ids: Int[Tensor, " kept"],
        pool_segments: int = 1,
        parts: int | None = None,
        reads: SegmentReads | None = None,
    ) -> None:
        """Open the training examples; `ids` are the teacher's, in the student's order."""
        super().__init__(reader, signals, pool_segments=pool_segments, parts=parts, reads=reads)
        self._new_ids = torch.full((reader.plan["vocab"],), -1)
        self._new_ids[ids] = torch.arange(len(ids))

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        """Return the padded batch of these examples, in the student's ids; so are its targets."""
        batch = super().__getitems__(indices)
        # In place: it may lie in pinned memory.
        batch["input_ids"].copy_(self._new_ids[batch["input_ids"]])
        return batch


def _renumber(config: Any, new: dict[int, int]) -> None:
    for key, value in config.to_dict().items():
        if not key.endswith("_token_id") or value is None:
            continue
        if isinstance(value, list):
            setattr(config, key, [new[number] for number in value if number in new])
        else:
            setattr(config, key, new.get(value))
