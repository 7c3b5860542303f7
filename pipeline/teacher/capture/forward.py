"""Run a batch through the tapped teacher: the live rows of every signal, flat, in batch order.

To save memory only the requested layers are recorded, each is freed as soon as it was yielded, and
logits are computed for some rows at a time.
"""

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from accelerate.utils import has_offloaded_params
from jaxtyping import Bool, Float, Int, Shaped
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.axes import Axis
from pipeline.store.forms.form import Tap
from pipeline.store.plan import bucketed_batches
from pipeline.store.reader import Segment
from pipeline.store.signals import Signal
from pipeline.taps.check import TapReport
from pipeline.taps.eager import eager_maps
from pipeline.taps.head import linear_head, run_head
from pipeline.taps.inputs import model_columns, model_inputs, run_base
from pipeline.taps.scores import Rule, visible_keys
from pipeline.taps.tap import Record, tap

LOGITS = {"cpu": 2**24, "cuda": 2**26}
"""Maximum number of logits in memory by device type; enough for efficient matrix products."""

FeatureKey: TypeAlias = tuple[str, Axis, int | None]
"""Key of a batch's values: the kind, row axis and layer of a signal."""
Values: TypeAlias = dict[str, Tensor]
"""Named tensors whose first axis are the rows of a batch, or of a piece of it."""


def feature_key(signal: Signal) -> FeatureKey:
    """Return the key of a signal's values."""
    return signal.kind, signal.axis, signal.layer


def takes_logits(signal: Signal) -> bool:
    """Tell whether a signal's form takes token logits, which the head's input gives too."""
    return signal.form.tap is Tap.LOGITS and signal.axis is Axis.TOKEN


def layers_of(signals: Sequence[Signal], *taps: Tap) -> list[int]:
    """Return the layers of signals whose forms take one of the taps, in order."""
    return sorted({s.layer for s in signals if s.form.tap in taps and s.layer is not None})


@dataclass(frozen=True)
class Batch:
    """Examples that run together.

    `members` are indices of the segment's examples. `rows` are the indices of their live tokens in
    the segment, in the order of the padded batch's live positions. `inputs` is right-padded with
    `attention_mask`. `positions` are the live positions of the flat padded batch, None if all are.
    """

    members: NDArray[np.int64]
    rows: NDArray[np.int64]
    inputs: dict[str, Tensor]
    positions: Int[Tensor, " tokens"] | None

    @property
    def live(self) -> Tensor:
        """Mask of the padded batch, True at live tokens."""
        return self.inputs["attention_mask"].bool()

    def live_rows(self, values: Shaped[Tensor, "batch seq ..."]) -> Shaped[Tensor, "tokens ..."]:
        """Return the values of live tokens; a view if the batch has no padding."""
        rows = values.flatten(0, 1)
        # By index, because a boolean mask would synchronise with the GPU to count it.
        return (
            rows if self.positions is None else rows.index_select(0, self.positions.to(rows.device))
        )


def collate(
    segment: Segment, members: NDArray[np.int64], pad_id: int, device: torch.device
) -> Batch:
    """Right-pad examples of a segment to the longest of them."""
    lengths = segment.length[members]
    live = np.arange(lengths.max())[None, :] < lengths[:, None]
    starts = segment.offset[members]
    rows = (starts[:, None] + np.arange(lengths.max())[None, :])[live]
    inputs: dict[str, Tensor] = {"attention_mask": torch.from_numpy(live.astype(np.int64))}
    for column, values in segment.tokens.items():
        if column == "loss_mask":
            continue
        padded = np.full(live.shape, pad_id if column == "input_ids" else 0, dtype=np.int64)
        padded[live] = values[rows]
        inputs[column] = torch.from_numpy(padded)
    positions = None if live.all() else torch.from_numpy(np.flatnonzero(live))
    return Batch(
        members,
        rows,
        {key: _sent(value, device) for key, value in inputs.items()},
        None if positions is None else _sent(positions, device),
    )


def _sent(values: Tensor, device: torch.device) -> Tensor:
    """Copy to a device; from pinned memory, which the CPU need not wait for."""
    if device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def segment_batches(
    segment: Segment, batch_tokens: int, pad_id: int, device: torch.device
) -> Iterable[Batch]:
    """Yield a segment's batches; their composition depends only on the segment."""
    for members in bucketed_batches(segment.length, batch_tokens):
        yield collate(segment, members, pad_id, device)


class TappedTeacher:
    """A teacher with the taps that a set of signals needs.

    The model's own attention maps come from a second pass under eager attention, so that capturing
    them does not change the rounding of other signals.
    """

    def __init__(
        self, model: PreTrainedModel, report: TapReport, signals: Sequence[Signal]
    ) -> None:
        self._turn = threading.Lock()
        self.model = model
        self.report = report
        self._hidden = layers_of(signals, Tap.HIDDEN)
        self._attention = layers_of(signals, Tap.QUERY_KEY)
        self._maps = layers_of(signals, Tap.ATTENTION_MAP)
        self._values = layers_of(signals, Tap.VALUE)
        self._head = any(s.form.tap is Tap.HEAD_INPUT for s in signals)
        self._classes = any(s.axis is Axis.EXAMPLE for s in signals)
        self._logits = any(takes_logits(s) for s in signals)
        # If the check verified a linear head, logits are computed from its input in pieces.
        self._is_chunked = self._logits and report.head is not None

    @torch.inference_mode()
    def values(self, batch: Batch) -> Iterator[tuple[FeatureKey, Values]]:
        """Yield the values for the forms of each feature, in the teacher's dtype; see `pieces`.

        Values have one row per live token, per example or per visible pair, depending on the axis.
        Yielded values are no longer referenced here.
        """
        columns = model_columns(self.model, batch.inputs)
        inputs = model_inputs(columns, is_causal=self.report.causal)
        # A model has one set of hooks, so tasks of a threaded scheduler take turns.
        with self._turn:
            record, output, pairs = self._passes(inputs, batch.live)
        for layer in self._hidden:
            yield (
                ("hidden", Axis.TOKEN, layer),
                {"hidden": batch.live_rows(record.hidden.pop(layer))},
            )
        for layer in self._attention:
            query, key = record.query.pop(layer), record.key.pop(layer)
            vectors = {
                "query": batch.live_rows(query.transpose(1, 2)),
                "key": batch.live_rows(key.transpose(1, 2)),
            }
            del query, key
            yield ("attention", Axis.TOKEN, layer), vectors
        for layer in self._maps:
            yield ("attention", Axis.PAIR, layer), {"probability": pairs.pop(layer)}
        for layer in self._values:
            value = record.value.pop(layer).transpose(1, 2)
            yield ("value", Axis.TOKEN, layer), {"value": batch.live_rows(value)}
        if self._head or self._logits or self._classes:
            axis = Axis.EXAMPLE if self._classes else Axis.TOKEN
            yield ("logits", axis, None), self._logit_values(record, output, batch)

    @torch.inference_mode()
    def pieces(self, feature: FeatureKey, values: Values) -> Iterator[Values]:
        """Yield `values` in float32 and in order; logits in pieces of some rows."""
        if feature[0] != "logits" or not (self._logits or self._classes):
            yield {name: value.float() for name, value in values.items()}
            return
        first = next(iter(values.values()))
        width = linear_head(self.model).out_features if self._is_chunked else first.shape[-1]
        step = max(1, LOGITS.get(first.device.type, LOGITS["cpu"]) // width)
        # An offloaded head's weight is moved for each product, so threads must take turns.
        is_shared = self._is_chunked and has_offloaded_params(linear_head(self.model))
        turn = self._turn if is_shared else nullcontext()
        # There is one piece even without rows, which gives forms their shapes.
        for start in range(0, max(1, len(first)), step):
            piece = {name: value[start : start + step] for name, value in values.items()}
            if self._is_chunked:
                assert self.report.head is not None
                with turn:
                    logits = run_head(self.model, piece["head_input"], self.report.head)
                # A head that is tied to the embeddings may be on another device than the last
                # block; forms need all tensors on one device.
                piece = {name: value.to(logits.device) for name, value in piece.items()}
                piece["logits"] = logits
            yield {name: value.float() for name, value in piece.items()}

    def _passes(
        self, inputs: dict[str, Tensor], live: Tensor
    ) -> tuple[Record, Tensor | None, dict[int, Tensor]]:
        """Run the model tapped, for its own attention maps, or both, as the signals need."""

        def take(layer: int, attention: Tensor) -> Tensor:
            return visible_pairs(attention, live.to(attention.device), self.report.rule[layer])

        record, output, pairs = Record(), None, {}
        logits = self._head or self._logits or self._classes
        if self._hidden or self._attention or self._values or logits:
            with tap(
                self.model,
                hidden=self._hidden,
                attention=self._attention,
                values=self._values,
                head=self._head or self._is_chunked,
            ) as record:
                output = self._run(inputs)
        if self._maps:
            pairs, _ = eager_maps(self.model, inputs, self._maps, take)
        return record, output, pairs

    def _run(self, inputs: dict[str, Tensor]) -> Tensor | None:
        # Logits that are computed from the recorded head input need no logits of the model.
        if self._classes or (self._logits and not self._is_chunked):
            return self.model(**inputs).logits
        run_base(self.model, inputs)
        return None

    def _logit_values(self, record: Record, logits: Tensor | None, batch: Batch) -> Values:
        values = {}
        if self._head or self._is_chunked:
            assert record.head_input is not None
            values["head_input"] = batch.live_rows(record.head_input)
            record.head_input = None
        if logits is not None:
            values["logits"] = logits if self._classes else batch.live_rows(logits)
        return values


def visible_pairs(
    attention: Float[Tensor, "batch heads seq seq"], live: Bool[Tensor, "batch seq"], rule: Rule
) -> Float[Tensor, "pairs heads"]:
    """Return the probabilities of all visible pairs, ordered by example, query, then key."""
    visible = visible_keys(live.sum(-1), live.shape[1], rule)[:, 0]
    return attention.permute(0, 2, 3, 1)[visible].float()
