"""A model in miniature: family and choices of a configuration, in a width that costs nothing.

What decides whether a model can be tapped stays: family, depth, kinds of layers, windows, soft
caps, positions, whether heads share keys. Widths, vocabulary and numbers of experts shrink, so that
a model of any size is built and run in a fraction of a second.
"""

import dataclasses
import re
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from pipeline.taps.configuration import auto_class, key_heads, size_of, text_part

VOCAB, WIDTH, HEADS, EXPERTS, CHOSEN = 64, 64, 4, 4, 2
HEAD_WIDTH = WIDTH // HEADS
MOST_PARAMETERS = 2**26
"""A family with sizes under unknown names may stay large; its miniature is none."""

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
    (r"num_experts_per_tok(en)?|moe_(topk|top_k|k)|top_k_experts", CHOSEN),
    (r"n_group|topk_group|(n|num|moe_num)_shared_experts|\w*n_groups", 1),
    (r"hidden_size_per_layer_input|laurel_rank|(mamba_)?(d_state|state_size)|time_step_rank", 8),
    (r"mamba_(n|num)_heads|mamba_dt_rank|(mamba_)?chunk_size", 8),
    (r"linear_num_(key|value)_heads|index_n_heads", CHOSEN),
)
"""What a size becomes, by its name, where it is larger. Sizes of other names stay as they are."""


def miniature(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the text part of a configuration in small sizes; the original is left alone.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: If the family wants sizes of other
            proportions. Nothing then follows for the model itself.
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
            shared = 1 if key_heads(config) == 1 else HEADS // 2
            small[name] = HEADS if values[name] == heads else shared
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
    """Return a random model of the task in miniature, on the CPU, in evaluation mode.

    Matrices are drawn wide: near zero, as they are drawn for training, attention is almost uniform,
    and a bias or a cap on its scores would not show. The process's random state is left as it was.

    Raises:
        ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError: If no model
            comes of it.
    """
    config = miniature(config)
    with torch.random.fork_rng(devices=[]):
        with torch.device("meta"):
            parameters = sum(
                one.numel() for one in auto_class(task).from_config(config).parameters()
            )
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


def _size(name: str, value: Any) -> int | None:
    """Return what a whole number under a name becomes; None where it stays."""
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    return next(
        (min(value, size) for pattern, size in SIZES if re.fullmatch(pattern, name)),
        None,
    )


def _fit_state_heads(values: dict[str, Any]) -> None:
    """Give the heads of state-space layers the width that their number asks for."""
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
    """Shorten lists that have an entry for each rotated pair of channels of a head."""
    if not isinstance(value, dict):
        return value
    pairs = int(width * value.get("partial_rotary_factor", 1.0)) // 2
    return {
        key: value[key][:pairs]
        if key.endswith("_factor") and isinstance(value[key], list)
        else _rope(value[key], width)
        for key in value
    }
