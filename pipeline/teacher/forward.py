"""One batch through the tapped teacher: live rows of every signal, flat, in batch order."""

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.store.plan import bucketed_batches
from pipeline.store.reader import Segment
from pipeline.store.signals import Signal
from pipeline.taps.check import TapReport
from pipeline.taps.eager import eager_maps
from pipeline.taps.inputs import model_columns, model_inputs, run_base
from pipeline.taps.scores import Rule, visible_keys
from pipeline.taps.tap import Record, tap


def place_of(kind: str, form: str, layer: int | None) -> tuple[str, int | None]:
    """Return where among a batch's values those of a signal are: the kind, as one axis, and layer.

    A map's rows are pairs, so it stands apart from query and key of the same layer.
    """
    return "map" if form == "map" else kind, layer


@dataclass(frozen=True)
class Batch:
    """Examples that run together.

    `members` are positions within the segment's examples, `rows` the rows of their live tokens in
    the segment, in the order of the padded batch's live positions; `inputs` is right-padded with
    `attention_mask`.
    """

    members: NDArray[np.int64]
    rows: NDArray[np.int64]
    inputs: dict[str, Tensor]

    @property
    def live(self) -> Tensor:
        """True at real tokens of the padded batch."""
        return self.inputs["attention_mask"].bool()


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
    return Batch(members, rows, {key: value.to(device) for key, value in inputs.items()})


def segment_batches(
    segment: Segment, batch_tokens: int, pad_id: int, device: torch.device
) -> Iterable[Batch]:
    """Yield a segment's batches; which examples run together depends on nothing but the segment."""
    for members in bucketed_batches(segment.length, batch_tokens):
        yield collate(segment, members, pad_id, device)


class TappedTeacher:
    """A teacher with the taps that a set of signals needs.

    Maps of its own come from a second pass under eager attention, so that they leave no trace in
    the rounding of the other signals: what is captured beside a signal never changes it.
    """

    def __init__(
        self, model: PreTrainedModel, report: TapReport, signals: Sequence[Signal]
    ) -> None:
        self._turn = threading.Lock()
        self.model = model
        self.report = report
        self._hidden = _layers(s for s in signals if s.kind == "hidden")
        self._attention = _layers(s for s in signals if s.form.name == "qk")
        self._maps = _layers(s for s in signals if s.form.name == "map")
        self._values = _layers(s for s in signals if s.kind == "value")
        self._logits = [s.form.name for s in signals if s.kind == "logits"]

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> dict[tuple[str, int | None], dict[str, Tensor]]:
        """Return float values by `place_of` a signal, as its form takes them.

        Token-axis values have one row a live token, example-axis values one row an example,
        pair-axis values one row a visible pair.
        """
        live = batch.live
        columns = model_columns(self.model, batch.inputs)
        inputs = model_inputs(columns, is_causal=self.report.causal)
        # One model has one set of hooks, so tasks of a threaded scheduler take turns here.
        with self._turn:
            record, output, pairs = self._passes(inputs, live)
        values: dict[tuple[str, int | None], dict[str, Tensor]] = {}
        for layer in self._hidden:
            values["hidden", layer] = {"hidden": record.hidden[layer][live].float()}
        for layer in self._attention:
            values["attention", layer] = {
                "query": record.query[layer].transpose(1, 2)[live].float(),
                "key": record.key[layer].transpose(1, 2)[live].float(),
            }
        for layer, probability in pairs.items():
            values["map", layer] = {"probability": probability}
        for layer in self._values:
            values["value", layer] = {"value": record.value[layer].transpose(1, 2)[live].float()}
        if self._logits:
            values["logits", None] = self._logit_values(record, output, live)
        return values

    def _passes(
        self, inputs: dict[str, Tensor], live: Tensor
    ) -> tuple[Record, Tensor | None, dict[int, Tensor]]:
        """Run the model as often as the signals need: tapped, for its own maps, or both."""

        def take(layer: int, attention: Tensor) -> Tensor:
            return visible_pairs(attention, live, self.report.rule[layer])

        record, output, pairs = Record(), None, {}
        if self._hidden or self._attention or self._values or self._logits:
            with tap(
                self.model,
                hidden=self._hidden,
                attention=self._attention,
                values=self._values,
                head="head" in self._logits,
            ) as record:
                output = self._run(inputs)
        if self._maps:
            pairs, _ = eager_maps(self.model, inputs, self._maps, take)
        return record, output, pairs

    def _run(self, inputs: dict[str, Tensor]) -> Tensor | None:
        # The form head needs only the head's input, which the tap records.
        if not {"topk", "sampled", "dense"} & set(self._logits):
            run_base(self.model, inputs)
            return None
        return self.model(**inputs).logits

    def _logit_values(
        self, record: Record, logits: Tensor | None, live: Tensor
    ) -> dict[str, Tensor]:
        values = {}
        if "head" in self._logits:
            assert record.head_input is not None
            values["head_input"] = record.head_input[live].float()
        if {"topk", "sampled"} & set(self._logits):
            assert logits is not None
            values["logits"] = logits[live].float()
        if "dense" in self._logits:
            assert logits is not None
            values["logits"] = logits.float()
        return values


def _layers(signals: Iterable[Signal]) -> list[int]:
    return sorted({signal.layer for signal in signals if signal.layer is not None})


def visible_pairs(
    attention: Float[Tensor, "batch heads seq seq"], live: Bool[Tensor, "batch seq"], rule: Rule
) -> Float[Tensor, "pairs heads"]:
    """Return the probabilities of all visible pairs: by example, then query, then key."""
    visible = visible_keys(live.sum(-1), live.shape[1], rule)[:, 0]
    return attention.permute(0, 2, 3, 1)[visible].float()
