"""Which taps a set of signals needs, for the check that comes before the first segment."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from pipeline.store.forms.form import Tap
from pipeline.store.signals import Signal
from pipeline.taps.check import TapReport, check_taps
from pipeline.teacher.capture.forward import Batch, layers_of, takes_logits


def check_signals(
    model: PreTrainedModel, batch: Batch, signals: Sequence[Signal], *, max_length: int
) -> TapReport:
    """Compare the taps that signals need with the model's own outputs on a batch.

    Args:
        model: The teacher.
        batch: From `checked_batch`.
        signals: What is asked for.
        max_length: Longest row that will be run, in tokens.

    Raises:
        IncompatibleError: If a tap differs from the model, by layer.
    """
    return check_taps(model, batch.inputs, max_length=max_length, **taps_of(signals))


def taps_of(signals: Sequence[Signal]) -> dict[str, Any]:
    """Return the arguments of `check_taps` that name what signals need."""
    return {
        "hidden": layers_of(signals, Tap.HIDDEN),
        "attention": layers_of(signals, Tap.QUERY_KEY),
        "values": layers_of(signals, Tap.VALUE),
        "below": layers_of(signals, Tap.LAYER_BELOW),
        "maps": layers_of(signals, Tap.ATTENTION_MAP),
        "head": any(signal.form.tap is Tap.HEAD_INPUT for signal in signals),
        "logits": any(takes_logits(signal) for signal in signals),
    }
