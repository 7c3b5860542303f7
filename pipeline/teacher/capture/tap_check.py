"""Which taps a set of signals needs, for the check that comes before the first segment."""

from collections.abc import Sequence

from transformers import PreTrainedModel

from pipeline.store.forms.form import Tap
from pipeline.store.signals import Signal
from pipeline.taps.check import TapReport, TapRequest, check_taps
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
    return check_taps(model, batch.inputs, taps_of(signals), max_length=max_length)


def taps_of(signals: Sequence[Signal]) -> TapRequest:
    """Return the taps that signals need."""
    return TapRequest(
        hidden=layers_of(signals, Tap.HIDDEN),
        attention=layers_of(signals, Tap.QUERY_KEY),
        values=layers_of(signals, Tap.VALUE),
        below=layers_of(signals, Tap.LAYER_BELOW),
        maps=layers_of(signals, Tap.ATTENTION_MAP),
        head=any(signal.form.tap is Tap.HEAD_INPUT for signal in signals),
        logits=any(takes_logits(signal) for signal in signals),
    )
