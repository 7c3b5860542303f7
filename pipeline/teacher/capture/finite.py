"""Where a teacher says something that is not finite: which examples to check it by, which value.

One example does not spoil another of its batch, so each is judged alone.
"""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.errors import IntegrityError
from pipeline.store.reader import Segment
from pipeline.taps.inputs import model_columns
from pipeline.teacher.capture.forward import Batch, collate

LARGEST = 3e38
"""Just below the largest bfloat16; beyond it rounding would give an infinity."""


def checked_batch(
    model: PreTrainedModel, segment: Segment, count: int, pad_id: int, device: torch.device
) -> Batch:
    """Return the longest examples, and the shortest so that padding is among them, all finite.

    Nothing can be compared with what is not finite. An example that is not is passed over for the
    next longest: whether it stops the capture is asked when its segment is captured.

    Raises:
        IntegrityError: If no example of the segment is finite.
    """
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
    """Tell of each example whether its hidden states and logits are, at its live positions."""
    output = model(**model_columns(model, batch.inputs), output_hidden_states=True)
    live = batch.inputs["attention_mask"].bool()
    found = torch.ones(len(live), dtype=torch.bool, device=live.device)
    for values in (*(output.hidden_states or ()), output.logits):
        if values.ndim > 2:
            # Some families carry several streams of states, an axis more.
            found &= (values.isfinite().flatten(2).all(-1) | ~live).all(-1)
        else:
            found &= values.isfinite().all(-1)
    return found.cpu().numpy()


def first_beyond(values: Mapping[str, Tensor]) -> str:
    """Return, in words, the first of some values that cannot be stored.

    If all is finite, it is the largest, which left the form's range.
    """
    found = torch.cat([value.flatten().float() for value in values.values()])
    beyond = found[~(found.abs() <= LARGEST)]
    if len(beyond):
        return f"{beyond[0].item():g}"
    return f"{found[found.abs().argmax()].item():g}, beyond the form's range"
