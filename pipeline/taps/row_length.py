"""The longest row that a model can take, for every stage that runs a model."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from pipeline.errors import IncompatibleError
from pipeline.taps.configuration import text_part


def longest_row(model: PreTrainedModel) -> int | None:
    """Return the maximum number of tokens in a row; None if there is no limit.

    It is the number of positions in the configuration. RoBERTa and its relatives start positions
    after the padding id, so an embedding table of N positions takes N - pad - 1 tokens; such a
    table is recognised by its `padding_idx`. XLNet has -1 for no limit.

    Args:
        model: The model; its weights are not read, so it may be on the meta device.
    """
    positions = getattr(text_part(model.config), "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        return None
    limits = [_limit(part) for name, part in model.named_modules() if _is_offset_table(name, part)]
    return min([positions, *limits])


def require_room(model: PreTrainedModel, max_length: int, where: str) -> None:
    """Refuse a corpus with rows that are longer than the model's context.

    Args:
        model: The model.
        max_length: Tokens of the corpus's longest row.
        where: The parameter that describes the model, for the message.

    Raises:
        IncompatibleError: With both numbers.
    """
    limit = longest_row(model)
    if limit is not None and limit < max_length:
        raise IncompatibleError(
            f"{where}: rows may have {max_length} tokens, {type(model).__name__} takes {limit}; "
            "lower the teacher's tokens.max_length, or raise max_position_embeddings of a new model"
        )


def _is_offset_table(name: str, part: nn.Module) -> bool:
    """Tell whether a module is a position embedding whose positions start after the padding id."""
    leaf = name.rpartition(".")[2]
    return (
        "position" in leaf
        and isinstance(getattr(part, "padding_idx", None), int)
        and getattr(part, "weight", None) is not None
    )


def _limit(table: Any) -> int:
    return int(table.weight.shape[0]) - table.padding_idx - 1
