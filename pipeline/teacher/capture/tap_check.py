"""The tap check before the first segment: which taps signals need, and on which examples."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.errors import IntegrityError
from pipeline.store.forms.form import Tap
from pipeline.store.reader import Segment
from pipeline.store.signals import Signal
from pipeline.taps.check import TapReport, TapRequest, check_taps
from pipeline.taps.comparison import PIECE_VALUES
from pipeline.taps.configuration import size_of, text_part
from pipeline.taps.inputs import model_columns
from pipeline.taps.own_logits import LARGEST_LOGITS, positions_to_check, run_at, takes_positions
from pipeline.teacher.capture.forward import Batch, collate, layers_of, takes_logits

CHECK_EXAMPLES = 4
"""Number of examples that the taps are checked on."""


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

    There are `count` of them. If the model cannot compute logits at selected positions alone, there
    are fewer where the logits of `count` examples would be too many, but at least two.

    Examples whose outputs are not finite cannot be compared and are replaced by the next longest.
    Whether they stop the capture is decided when their segment is captured. One such example does
    not affect the others of its batch.

    Raises:
        IntegrityError: If no example of the segment is finite.
    """
    count = min(count, checked_examples(model, int(segment.length.max())))
    longest = np.argsort(-segment.length, kind="stable")
    longest = longest[longest != np.argmin(segment.length)]
    order = np.insert(longest, min(count - 1, len(longest)), np.argmin(segment.length))
    chosen, rest = order[:count], order[count:]
    while len(chosen):
        batch = collate(segment, np.sort(chosen), pad_id, device)
        finite = _is_finite(model, batch)
        if finite.all():
            return batch
        chosen = batch.members[finite]
        lacking = count - len(chosen)
        chosen, rest = np.concatenate([chosen, rest[:lacking]]), rest[lacking:]
    raise IntegrityError(
        f"teacher: hidden states or logits are not finite in any of the {len(order)} examples "
        f"of segment {segment.number}; check its weights, or capture in a wider dtype"
    )


def checked_examples(model: PreTrainedModel, longest: int) -> int:
    """Return the number of examples that the taps are checked on, from 2 to `CHECK_EXAMPLES`.

    Args:
        model: The teacher.
        longest: Tokens of the longest of them.
    """
    if takes_positions(model):
        return CHECK_EXAMPLES
    fitting = LARGEST_LOGITS // max(1, longest * size_of(text_part(model.config), "vocab_size"))
    return max(2, min(CHECK_EXAMPLES, fitting))


@torch.inference_mode()
def _is_finite(model: PreTrainedModel, batch: Batch) -> NDArray[np.bool_]:
    """Tell for each example whether its hidden states, and the logits to check, are finite."""
    live = batch.live
    positions = positions_to_check(model, live)
    columns = model_columns(model, batch.inputs)
    output = run_at(model, columns, positions, output_hidden_states=True)
    checked = live if positions is None else live[:, positions.to(live.device)]
    finite = torch.ones(len(live), dtype=torch.bool, device=live.device)
    for values in output.hidden_states or ():
        finite &= _finite_examples(values, live)
    return (finite & _finite_examples(output.logits, checked)).cpu().numpy()


def _finite_examples(values: Tensor, live: Tensor) -> Tensor:
    """Tell for each example whether its values are finite; those of tokens, at live positions."""
    if values.ndim == 2:
        return values.isfinite().all(-1)
    finite = torch.ones_like(live[:, 0])
    # Some families have several streams of states, as a further axis.
    step = max(1, PIECE_VALUES // math.prod(values.shape[2:]))
    for example, rows in enumerate(values):
        for some, are_live in zip(rows.split(step), live[example].split(step), strict=True):
            finite[example] &= (some.isfinite().flatten(1).all(-1) | ~are_live).all()
    return finite
