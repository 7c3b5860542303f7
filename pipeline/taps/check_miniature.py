"""The check of taps on a miniature: says what a model can give before its weights are loaded.

What a family can be asked for follows from its code and its configuration, not from its size, so a
miniature answers for the model. Capture still checks the model itself before it writes anything.
"""

import logging
from collections.abc import Collection

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from pipeline.errors import DecantError, IncompatibleError, in_short
from pipeline.taps.anatomy import find_anatomy
from pipeline.taps.check import TapReport, check_taps
from pipeline.taps.configuration import auto_class, require_head, size_of, text_part
from pipeline.taps.inputs import model_columns, run_base
from pipeline.taps.miniature import VOCAB, build_miniature
from pipeline.taps.row_length import require_room

logger = logging.getLogger(__name__)
LENGTHS = (12, 7, 3)
"""Tokens of the rows of the batch, so that there is padding."""
UNTRIED = "%s: %s cannot be tried in miniature (%s); capture and training check it themselves"
LONGEST = 1024
"""Tokens of the longest row that is run; attention of a longer one costs more than it tells."""


def check_in_miniature(
    config: PreTrainedConfig,
    task: str,
    *,
    where: str,
    max_length: int,
    hidden: Collection[int] = (),
    attention: Collection[int] = (),
    values: Collection[int] = (),
    below: Collection[int] = (),
    maps: Collection[int] = (),
    head: bool = False,
    logits: bool = False,
    blocks: bool = False,
    has_one_head_count: bool = False,
) -> TapReport | None:
    """Build a model in miniature and check the taps that are going to be asked of it.

    Args:
        config: The model's configuration.
        task: What its head is for.
        where: The parameter at fault, for messages.
        max_length: Longest row that will be run, in tokens.
        hidden: As the arguments that follow: see `check_taps`.
        attention: Layers whose query and key will be tapped.
        values: Layers whose value will be tapped.
        below: Layers whose query and key will be rebuilt from the hidden state below.
        maps: Layers whose own maps are wanted.
        head: Whether the head's input will be tapped.
        logits: Whether logits of tokens are wanted.
        blocks: Whether weights of single blocks are wanted.
        has_one_head_count: Whether the layers must have the heads that the configuration names.

    Returns:
        What the check found, in the miniature's sizes; None if the family makes no miniature, of
        which nothing follows.

    Raises:
        IncompatibleError: If the family has no model of the task, rows are too long, or a tap
            differs from the model.
    """
    if config.is_encoder_decoder:
        raise IncompatibleError(
            f"{where}: {config.model_type} is an encoder-decoder, expected a model with one stack "
            "of blocks; choose a decoder-only or encoder-only model"
        )
    require_head(text_part(config), task, where)
    attended = {*attention, *values, *below, *maps}
    try:
        model = build_miniature(config, task)
    except Exception as error:  # noqa: BLE001 - whatever a family's code raises at odd sizes
        logger.info(UNTRIED, where, config.model_type, in_short(error))
        _require_model(
            text_part(config), task, where, max_length, hidden=hidden, attention=attended
        )
        return None
    require_room(model, max_length, where)
    pad = size_of(text_part(model.config), "pad_token_id")
    batch = _batch([min(length, max_length) for length in LENGTHS], pad)
    try:
        with torch.inference_mode():
            model(**model_columns(model, batch))
    except Exception as error:  # noqa: BLE001 - whatever a family's code raises
        # Small sizes may be at fault, so the model itself is asked, without its values.
        logger.info(UNTRIED, where, config.model_type, in_short(error))
        _require_model(
            text_part(config), task, where, max_length, hidden=hidden, attention=attended
        )
        return None
    try:
        if blocks:
            find_anatomy(model).require_blocks()
        report = check_taps(
            model,
            batch,
            hidden=hidden,
            attention=attention,
            values=values,
            below=below,
            maps=maps,
            head=head,
            logits=logits,
            max_length=min(max_length, LONGEST),
        )
        _run_longest(model, min(max_length, LONGEST), pad)
        if has_one_head_count:
            _require_heads(model, report)
    except DecantError as error:
        raise type(error)(f"{where}: {error}") from error
    except Exception as error:
        raise IncompatibleError(
            f"{where}: {type(model).__name__} runs, but not as it is asked here "
            f"({in_short(error)}); ask less of it, or choose another model"
        ) from error
    return report


def _require_model(
    config: PreTrainedConfig,
    task: str,
    where: str,
    max_length: int,
    *,
    hidden: Collection[int],
    attention: Collection[int],
) -> None:
    """Refuse a configuration whose model cannot be built or run, or lacks layers.

    On the meta device, so without values: all that can be said where the miniature cannot be asked.
    """
    try:
        with torch.device("meta"):
            model = auto_class(task).from_config(config)
    except Exception as error:
        raise IncompatibleError(
            f"{where}: no {task} model of type {config.model_type} comes of its configuration "
            f"({in_short(error)}); correct the key it names, or choose another family"
        ) from error
    try:
        find_anatomy(model).require_layers(hidden=hidden, attention=attention)
    except IncompatibleError as error:
        raise IncompatibleError(f"{where}: {error}") from error
    require_room(model, max_length, where)
    if (reason := _failure(model)) is not None:
        raise IncompatibleError(
            f"{where}: {type(model).__name__} does not run on rows of text ({reason}); correct its "
            "configuration, or choose another family"
        )


def _failure(model: PreTrainedModel) -> str | None:
    """Return why a model on the meta device does not run; None if it does, or wants values."""
    ids = torch.ones(1, min(LENGTHS), dtype=torch.long, device="meta")
    columns = {"input_ids": ids, "token_type_ids": torch.zeros_like(ids)}
    model.config.use_cache = False
    try:
        with torch.inference_mode():
            run_base(model, model_columns(model.eval(), columns))
    except NotImplementedError:
        return None
    except Exception as error:  # noqa: BLE001 - whatever a family's code raises
        return None if "meta" in str(error).lower() else in_short(error)
    return None


def _require_heads(model: PreTrainedModel, report: TapReport) -> None:
    heads = find_anatomy(model).heads
    if report.heads != heads:
        raise IncompatibleError(
            f"{type(model).__name__} has {report.heads} attention heads in the layers asked for, "
            f"its configuration says {heads}; set the weight of the attention term to 0"
        )


def _batch(lengths: list[int], pad: int) -> dict[str, Tensor]:
    """Return right-padded ids that avoid the padding id and the first three, often special ones."""
    generator = torch.Generator().manual_seed(0)
    shape = (len(lengths), max(lengths))
    ids = torch.randint(3, VOCAB - 1, shape, generator=generator)
    ids[ids == pad] = VOCAB - 2 if pad != VOCAB - 2 else 3
    mask = (torch.arange(shape[1]) < torch.tensor(lengths)[:, None]).long()
    columns = {"input_ids": ids.where(mask.bool(), pad), "attention_mask": mask}
    return columns | {"token_type_ids": torch.zeros(shape, dtype=torch.long)}


@torch.inference_mode()
def _run_longest(model: PreTrainedModel, length: int, pad: int) -> None:
    run_base(model, model_columns(model, _batch([length], pad)))
