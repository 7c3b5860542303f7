"""Build a model in miniature and check its taps, before the real weights are loaded.

Whether a model can be tapped depends on its code and its configuration, not on its size: family,
depth, kinds of layers, windows, soft caps, positions, key heads shared by query heads. A miniature
keeps all of these. Widths, vocabulary and numbers of experts shrink, so that a model of any size
builds and runs in a fraction of a second. Capture still checks the real model before it writes.
"""

import dataclasses
import logging
import re
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from pipeline.errors import DecantError, IncompatibleError, in_short
from pipeline.taps.anatomy import find_anatomy
from pipeline.taps.check import TapReport, TapRequest, check_taps
from pipeline.taps.configuration import auto_class, key_heads, require_head, size_of, text_part
from pipeline.taps.inputs import model_columns, run_base
from pipeline.taps.row_length import require_room

logger = logging.getLogger(__name__)

VOCAB, WIDTH, HEADS, EXPERTS, ACTIVE_EXPERTS = 64, 64, 4, 4, 2
HEAD_WIDTH = WIDTH // HEADS
MOST_PARAMETERS = 2**26
"""Upper limit of a miniature: a family with sizes under unknown names may stay large."""

SIZES: tuple[tuple[str, int], ...] = (
    (r"vocab_size\w*|\w+_vocab_size", VOCAB),
    (r"hidden_size|d_model|n_embd|dim|emb_dim|embedding_(size|dim)|word_embed_proj_dim", WIDTH),
    (
        r"(in|out)put_embedding_size|attention_hidden_size|lru_width|intra_bottleneck_size|entity_emb_size",
        WIDTH,
    ),
    (r"(num_attention|n|num)_heads?", HEADS),
    (r"(\w+_)?head_dim|d_kv|d_head", HEAD_WIDTH),
    (
        r"\w*intermediate_size\w*|\w*ffn_(dim|hidden_size)|hidden_dim|d_ff|d_inner|n_inner|dim_ff",
        2 * WIDTH,
    ),
    (r"(q|kv)_lora_rank|rotary_dim", HEAD_WIDTH),
    (r"num_experts|n_routed_experts|num_local_experts|moe_num_experts", EXPERTS),
    (r"num_experts_per_tok(en)?|moe_(topk|top_k|k)|top_k_experts", ACTIVE_EXPERTS),
    (r"n_group|topk_group|(n|num|moe_num)_shared_experts|\w*n_groups", 1),
    (r"hidden_size_per_layer_input|laurel_rank|(mamba_)?(d_state|state_size)|time_step_rank", 8),
    (r"mamba_(n|num)_heads|mamba_dt_rank|(mamba_)?chunk_size", 8),
    (r"linear_num_(key|value)_heads|index_n_heads", ACTIVE_EXPERTS),
)
"""Maximum of each size in a miniature, by key pattern; sizes with other keys stay unchanged."""
LENGTHS = (12, 7, 3)
"""Tokens per row of the test batch; they differ so that there is padding."""
UNTRIED = "%s: %s cannot be checked in miniature (%s); capture and training check the real model"
LONGEST = 1024
"""Longest row that is run, in tokens; attention over longer rows would cost too much here."""


def miniature(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a copy of a configuration's text part with small sizes.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: If the family requires other proportions
            of its sizes. This says nothing about the real model.
    """
    config = text_part(config)
    family = type(config)
    fields = {field.name for field in dataclasses.fields(family)}
    values = {key: value for key, value in config.to_dict().items() if key in fields}
    sizes = {key: _size(key, value) for key, value in values.items()}
    small: dict[str, Any] = values | {key: size for key, size in sizes.items() if size is not None}
    heads = size_of(config, "num_attention_heads")
    for name in ("num_key_value_heads", "num_kv_heads"):
        if values.get(name):
            grouped = 1 if key_heads(config) == 1 else HEADS // 2
            small[name] = HEADS if values[name] == heads else grouped
    _fit_state_heads(small)
    for name in ("rope_parameters", "rope_scaling"):
        small[name] = _rope(values.get(name), HEAD_WIDTH)
    for name, value in small.items():
        if name.endswith(("_token_id", "_token_index")) and isinstance(value, int):
            small[name] = value if value < VOCAB else (0 if name == "pad_token_id" else VOCAB - 1)
    if values.get("pad_token_id") is None:
        small["pad_token_id"] = 0
    return family(**{key: value for key, value in small.items() if key in fields})


@torch.no_grad()
def build_miniature(config: PreTrainedConfig, task: str) -> PreTrainedModel:
    """Return a miniature with random weights and the head of the task, on the CPU, in eval mode.

    Weights have a larger deviation than for training: with small weights attention is almost
    uniform, and a bias or a soft cap on its scores would not show. The global random state stays
    unchanged.

    Raises:
        ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError: If the
            miniature cannot be built.
    """
    config = miniature(config)
    with torch.random.fork_rng(devices=[]):
        with torch.device("meta"):
            parameters = auto_class(task).from_config(config).num_parameters()
        if parameters > MOST_PARAMETERS:
            raise ValueError(f"{parameters} parameters, expected at most {MOST_PARAMETERS}")
        torch.default_generator.manual_seed(0)
        model = auto_class(task).from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.2)
            elif name.endswith("weight"):
                parameter.uniform_(0.5, 1.5)
    model.config.use_cache = False
    return model.eval().requires_grad_(False)


def check_in_miniature(
    config: PreTrainedConfig,
    task: str,
    request: TapRequest,
    *,
    where: str,
    max_length: int,
    blocks: bool = False,
    has_one_head_count: bool = False,
) -> TapReport | None:
    """Build a model in miniature and check the taps that will be used on the real model.

    Args:
        config: The model's configuration.
        task: The task of its head.
        request: The taps.
        where: The parameter at fault, for messages.
        max_length: Longest row that will be run, in tokens.
        blocks: Whether weights of single blocks are needed.
        has_one_head_count: Whether the tapped layers must have the configuration's number of
            attention heads.

    Returns:
        The check's report, with the miniature's sizes; None if the family cannot be built or run
        in miniature, which says nothing about the real model.

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
    try:
        model = build_miniature(config, task)
    except Exception as error:  # noqa: BLE001 - a family's code can raise anything at odd sizes
        logger.info(UNTRIED, where, config.model_type, in_short(error))
        _require_model(text_part(config), task, request, where, max_length)
        return None
    require_room(model, max_length, where)
    pad = size_of(text_part(model.config), "pad_token_id")
    batch = _batch([min(length, max_length) for length in LENGTHS], pad)
    try:
        with torch.inference_mode():
            model(**model_columns(model, batch))
    except Exception as error:  # noqa: BLE001 - a family's code can raise anything
        # The small sizes may be the cause, so the full-size model is tried on the meta device.
        logger.info(UNTRIED, where, config.model_type, in_short(error))
        _require_model(text_part(config), task, request, where, max_length)
        return None
    try:
        if blocks:
            find_anatomy(model).require_blocks()
        report = check_taps(model, batch, request, max_length=min(max_length, LONGEST))
        _run_longest(model, min(max_length, LONGEST), pad)
        if has_one_head_count:
            _require_heads(model, report)
    except DecantError as error:
        raise type(error)(f"{where}: {error}") from error
    except Exception as error:
        raise IncompatibleError(
            f"{where}: {type(model).__name__} runs, but not with what is captured from it "
            f"({in_short(error)}); capture less of it, or choose another model"
        ) from error
    return report


def _require_model(
    config: PreTrainedConfig, task: str, request: TapRequest, where: str, max_length: int
) -> None:
    """Refuse a configuration whose full-size model cannot be built or run, or lacks layers.

    Runs on the meta device, without values, for families that have no miniature.
    """
    try:
        with torch.device("meta"):
            model = auto_class(task).from_config(config)
    except Exception as error:
        raise IncompatibleError(
            f"{where}: no {task} model of type {config.model_type} can be built from its "
            f"configuration ({in_short(error)}); correct the key it names, or choose another family"
        ) from error
    try:
        find_anatomy(model).require_layers(hidden=request.hidden, attention=request.attended)
    except IncompatibleError as error:
        raise IncompatibleError(f"{where}: {error}") from error
    require_room(model, max_length, where)
    if (reason := _failure(model)) is not None:
        raise IncompatibleError(
            f"{where}: {type(model).__name__} does not run on rows of text ({reason}); correct its "
            "configuration, or choose another family"
        )


def _failure(model: PreTrainedModel) -> str | None:
    """Return why a model on the meta device does not run; None if it runs or needs values."""
    ids = torch.ones(1, min(LENGTHS), dtype=torch.long, device="meta")
    columns = {"input_ids": ids, "token_type_ids": torch.zeros_like(ids)}
    model.config.use_cache = False
    try:
        with torch.inference_mode():
            run_base(model, model_columns(model.eval(), columns))
    except NotImplementedError:
        return None
    except Exception as error:  # noqa: BLE001 - a family's code can raise anything
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
    """Return a right-padded batch without the padding id and the first three ids, often special."""
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


def _size(name: str, value: Any) -> int | None:
    """Return the small size for a key; None if the value stays unchanged."""
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    return next(
        (min(value, size) for pattern, size in SIZES if re.fullmatch(pattern, name)),
        None,
    )


def _fit_state_heads(values: dict[str, Any]) -> None:
    """Set the head width of state-space layers so that heads times width fit the small model."""
    for prefix, heads, width in (
        ("", "num_heads", "head_dim"),
        ("mamba_", "mamba_n_heads", "mamba_d_head"),
    ):
        expand = values.get(f"{prefix}expand")
        if expand and values.get(heads):
            inner = int(expand * WIDTH)
            values[width] = inner // values[heads]
            if values.get("mamba_d_ssm"):
                values["mamba_d_ssm"] = inner


def _rope(value: Any, width: int) -> Any:
    """Shorten lists that have one entry per rotated channel pair of a head."""
    if not isinstance(value, dict):
        return value
    pairs = int(width * value.get("partial_rotary_factor", 1.0)) // 2
    return {
        key: value[key][:pairs]
        if key.endswith("_factor") and isinstance(value[key], list)
        else _rope(value[key], width)
        for key in value
    }
