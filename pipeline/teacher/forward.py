"""One batch through the tapped teacher: live rows of every signal, flat, in batch order."""

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.store.plan import bucketed_batches
from pipeline.store.reader import Segment
from pipeline.store.signals import Signal
from pipeline.taps.check import TapReport
from pipeline.taps.inputs import model_columns, model_inputs, run_base
from pipeline.taps.tap import Record, tap


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
    """A teacher with the taps that a set of signals needs."""

    def __init__(
        self, model: PreTrainedModel, report: TapReport, signals: Sequence[Signal]
    ) -> None:
        self._turn = threading.Lock()
        self.model = model
        self.report = report
        self._hidden = sorted(
            {s.layer for s in signals if s.kind == "hidden" and s.layer is not None}
        )
        self._attention = sorted(
            {s.layer for s in signals if s.kind == "attention" and s.layer is not None}
        )
        self._logits = [s.form.name for s in signals if s.kind == "logits"]

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> dict[tuple[str, int | None], dict[str, Tensor]]:
        """Return float values by (kind, layer), as the forms of that kind take them.

        Token-axis values have one row a live token, example-axis values one row an example.
        """
        live = batch.live
        columns = model_columns(self.model, batch.inputs)
        inputs = model_inputs(columns, is_causal=self.report.causal)
        # One model has one set of hooks, so tasks of a threaded scheduler take turns here.
        with (
            self._turn,
            tap(
                self.model,
                hidden=self._hidden,
                attention=self._attention,
                head="head" in self._logits,
            ) as record,
        ):
            output = self._run(inputs)
        values: dict[tuple[str, int | None], dict[str, Tensor]] = {}
        for layer in self._hidden:
            values["hidden", layer] = {"hidden": record.hidden[layer][live].float()}
        for layer in self._attention:
            values["attention", layer] = {
                "query": record.query[layer].transpose(1, 2)[live].float(),
                "key": record.key[layer].transpose(1, 2)[live].float(),
            }
        if self._logits:
            values["logits", None] = self._logit_values(record, output, live)
        return values

    def _run(self, inputs: dict[str, Tensor]) -> Tensor | None:
        # The form head needs only the head's input, which the tap records.
        if not {"topk", "dense"} & set(self._logits):
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
        if "topk" in self._logits:
            assert logits is not None
            values["logits"] = logits[live].float()
        if "dense" in self._logits:
            assert logits is not None
            values["logits"] = logits.float()
        return values
