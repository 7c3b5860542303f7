"""How many tokens a row may have: one rule, which every stage that runs a model asks."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from pipeline.errors import IncompatibleError
from pipeline.taps.configuration import text_part


def longest_row(model: PreTrainedModel) -> int | None:
    """Return the number of tokens that the longest row of a model may have; None: no limit.

    It is the number of positions in the configuration. RoBERTa and its relatives count positions
    from behind the padding id, so that a table of N rows holds N - pad - 1 tokens; such a table is
    recognised by its `padding_idx`. XLNet writes -1 where there is no limit.

    Args:
        model: The model; its weights are not read, so it may be on the meta device.
    """
    positions = getattr(text_part(model.config), "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        return None
    room = [_room(part) for name, part in model.named_modules() if _is_position_table(name, part)]
    return min([positions, *room])


def require_room(model: PreTrainedModel, max_length: int, where: str) -> None:
    """Refuse a corpus with rows that are longer than a model takes.

    Args:
        model: The model.
        max_length: Tokens of the corpus's longest row.
        where: The parameter that describes the model, for the message.

    Raises:
        IncompatibleError: With both numbers.
    """
    room = longest_row(model)
    if room is not None and room < max_length:
        raise IncompatibleError(
            f"{where}: rows may have {max_length} tokens, {type(model).__name__} takes {room}; "
            "lower the teacher's tokens.max_length, or raise max_position_embeddings of a new model"
        )


def _is_position_table(name: str, part: nn.Module) -> bool:
    """Tell whether a module is a table of positions that starts behind the padding id."""
    leaf = name.rpartition(".")[2]
    return (
        "position" in leaf
        and isinstance(getattr(part, "padding_idx", None), int)
        and getattr(part, "weight", None) is not None
    )


def _room(table: Any) -> int:
    return int(table.weight.shape[0]) - table.padding_idx - 1
