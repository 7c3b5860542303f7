"""Which ids end a generated text.

If one is overlooked, a model runs on to the maximum number of tokens.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerFast

Ids = Sequence[int] | NDArray[np.int32]
Mask = Sequence[bool] | NDArray[np.bool_]


def end_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    rows: Iterable[tuple[Ids, Mask]] = (),
) -> list[int]:
    """Return the ids that end a generated text.

    They are the tokenizer's, those of the model's generation settings (a chat model ends its turn
    with an id of its own), and the marks that targets end with. Ids of ordinary
    text are left out: they are there by an unintended default, or because a text was truncated.

    Args:
        model: The model that writes.
        tokenizer: The one its prompts were made with.
        rows: `input_ids` and `loss_mask` of rows it was taught on, as many as there are at hand.
    """
    own: Any = getattr(model.generation_config, "eos_token_id", None)
    known = own if isinstance(own, list) else [own]
    taught = {_last_target(ids, mask) for ids, mask in rows}
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder} - {None}
    found = {token for token in {*known, *taught} if token in special}
    eos: Any = tokenizer.eos_token_id
    return sorted({eos, *found} - {None})


def text_of(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> str:
    """Decode ids without the tokens that begin, end and pad a row.

    Other special tokens are text: a target may hold them, and a model must learn to write them.
    """
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "cls_token_id")
    marks: list[Any] = [getattr(tokenizer, name) for name in names]
    unknown: Any = tokenizer.unk_token_id
    return str(tokenizer.decode([one for one in ids if one not in marks or one == unknown]))


def _last_target(ids: Ids, mask: Mask) -> int | None:
    """Return the last id of a row that counts as a target; None if there is none."""
    places = np.flatnonzero(np.asarray(mask, dtype=bool))
    return int(ids[places[-1]]) if len(places) else None
