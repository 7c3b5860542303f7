"""The tap check before the first segment: which taps signals need, and on which examples."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from pipeline.errors import IntegrityError
from pipeline.store.forms.form import Tap
from pipeline.store.reader import Segment
from pipeline.store.signals import Signal
from pipeline.taps.check import TapReport, TapRequest, check_taps
from pipeline.taps.inputs import model_columns
from pipeline.teacher.capture.forward import Batch, collate, layers_of, takes_logits

CHECK_EXAMPLES = 4
"""Number of examples that the taps are checked on."""
CHECK_LOGITS = 2**28
"""Logits of the checked examples, of which the check holds two at a time, unless two examples have
more: the longest, and the shortest for its padding."""


def check_signals(
    model: PreTrainedModel, batch: Batch, signals: Sequence[Signal], *, max_length: int
) -> TapReport:
    """Compare the taps that signals need with the model's own outputs on a batch.

    Args:
        model: The teacher.
        batch: From `checked_batch`.
        signals: The requested signals.
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


def checked_batch(
    model: PreTrainedModel, segment: Segment, count: int, pad_id: int, device: torch.device
) -> Batch:
    """Return a batch of the segment's longest examples and its shortest, for padding.

    There are `count` of them, or fewer where their logits would be too many.

    Examples whose outputs are not finite cannot be compared and are replaced by the next longest.
    Whether they stop the capture is decided when their segment is captured. One such example does
    not affect the others of its batch.

    Raises:
        IntegrityError: If no example of the segment is finite.
    """
    vocab = getattr(model.config.get_text_config(), "vocab_size", 1) or 1
    count = max(2, min(count, CHECK_LOGITS // (vocab * int(segment.length.max()))))
    longest = np.argsort(-segment.length, kind="stable")
    longest = longest[longest != np.argmin(segment.length)]
    order = np.insert(longest, min(count - 1, len(longest)), np.argmin(segment.length))
    chosen: list[int] = []
    for first in range(0, len(order), count):
        batch = collate(segment, np.sort(order[first : first + count]), pad_id, device)
        finite = batch.members[_is_finite(model, batch)].tolist()
        if not chosen and len(finite) == len(batch.members):
            return batch
        chosen += finite[: count - len(chosen)]
        if len(chosen) == count:
            break
    if not chosen:
        raise IntegrityError(
            f"teacher: hidden states or logits are not finite in any of the {len(order)} examples "
            f"of segment {segment.number}; check its weights, or capture in a wider dtype"
        )
    return collate(segment, np.array(sorted(chosen)), pad_id, device)


@torch.inference_mode()
def _is_finite(model: PreTrainedModel, batch: Batch) -> NDArray[np.bool_]:
    """Tell for each example whether its hidden states and logits are finite at live positions."""
    output = model(**model_columns(model, batch.inputs), output_hidden_states=True)
    live = batch.inputs["attention_mask"].bool()
    finite = torch.ones(len(live), dtype=torch.bool, device=live.device)
    for values in (*(output.hidden_states or ()), output.logits):
        if values.ndim > 2:
            # Some families have several streams of states, as a further axis.
            finite &= (values.isfinite().flatten(2).all(-1) | ~live).all(-1)
        else:
            finite &= values.isfinite().all(-1)
    return finite.cpu().numpy()
