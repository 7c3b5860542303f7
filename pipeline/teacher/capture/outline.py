"""Sizes of a teacher's features, measured by a tapped forward pass on the meta device.

Nothing is allocated, and no list of families is needed: the taps that capture uses read the shapes
of tensors without values. If the pass stops where values are needed (routing to experts, say), the
sizes recorded until then are used; that is always after the first attention.
"""

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from pipeline.errors import ConfigError, in_short
from pipeline.store.forms.form import Tap
from pipeline.store.signals import Signal
from pipeline.taps.anatomy import find_anatomy
from pipeline.taps.check import TapReport
from pipeline.taps.configuration import auto_class, family_of, plain_values
from pipeline.taps.head import read_head_spec
from pipeline.taps.inputs import model_columns, run_base
from pipeline.taps.scores import Rule
from pipeline.taps.tap import Record, tap
from pipeline.teacher.capture.forward import layers_of
from pipeline.teacher.source.load import load_config

logger = logging.getLogger(__name__)
LENGTH = 4
"""Tokens of the row that is run; feature sizes do not depend on it."""


def known_config(values: Mapping[str, Any]) -> PreTrainedConfig:
    """Return a configuration of one of transformers' own families from its JSON values.

    Raises:
        IncompatibleError: If the installed transformers has no such family.
        ConfigError: If the family refuses a value.
    """
    model_type = str(values.get("model_type"))
    try:
        return family_of(model_type).from_dict(plain_values(values))
    except (StrictDataclassError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"teacher: no {model_type} configuration ({in_short(error)}); correct its config.json"
        ) from error


def pretrained_config(
    path: str,
    *,
    revision: str | None,
    trust_remote_code: bool,
    head: Mapping[str, Any] | None = None,
) -> PreTrainedConfig:
    """Return the configuration of a directory or cached hub id, without its weights.

    Args:
        path: A directory or hub id.
        revision: Revision of a hub id.
        trust_remote_code: Run code from the model's repository.
        head: Keys of a new head, from `head_options`.

    Raises:
        ConfigError: If it cannot be found.
    """
    keywords: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    values = load_config(path, **keywords)
    config = (
        AutoConfig.from_pretrained(path, **keywords) if trust_remote_code else known_config(values)
    )
    for key, value in (head or {}).items():
        setattr(config, key, value)
    return config


def outline(config: PreTrainedConfig, *, task: str, dtype: torch.dtype) -> PreTrainedModel:
    """Return the teacher on the meta device: all modules and shapes, no memory.

    Raises:
        ConfigError: If no model of the task can be built from the configuration.
    """
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        # Quantised weights have other shapes than the matrices that layers compute with.
        delattr(config, "quantization_config")
    options = {"trust_remote_code": True} if getattr(config, "auto_map", None) else {}
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model = auto_class(task).from_config(config, dtype=dtype, **options)
    except (ValueError, RuntimeError, AssertionError, KeyError, TypeError) as error:
        raise ConfigError(
            f"teacher: no {task} model of type {config.model_type} can be built from its "
            f"configuration ({in_short(error)}); change the key it names"
        ) from error
    return model.eval().requires_grad_(False)


@torch.inference_mode()
def outlined_report(model: PreTrainedModel, signals: Sequence[Signal]) -> TapReport:
    """Return the report that the tap check would give, without any check of values.

    Args:
        model: From `outline`.
        signals: The requested signals.

    Raises:
        IncompatibleError: If a layer does not exist, or requested attention cannot be tapped.
    """
    anatomy = find_anatomy(model)
    hidden, values = layers_of(signals, Tap.HIDDEN), layers_of(signals, Tap.VALUE)
    attention = layers_of(signals, Tap.QUERY_KEY, Tap.LAYER_BELOW)
    ids = torch.ones(1, LENGTH, dtype=torch.long, device="meta")
    # Without a mask, because transformers would read its values.
    columns = model_columns(model, {"input_ids": ids, "token_type_ids": torch.zeros_like(ids)})
    record = Record()
    try:
        with tap(model, hidden=hidden, attention=attention, values=values) as record:
            run_base(model, columns)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        logger.debug(
            "%s: the pass on the meta device stopped (%s)", anatomy.model_class, in_short(error)
        )
    heads, kv_heads, d_head = anatomy.heads, anatomy.kv_heads, anatomy.head_dim
    for layer, query in record.query.items():
        heads, kv_heads, d_head = query.shape[1], record.key[layer].shape[1], query.shape[3]
    d_value = d_head if values else 0
    for value in record.value.values():
        d_value = value.shape[3]
    width = next((state.shape[-1] for state in record.hidden.values()), anatomy.width)
    rule: Rule = "causal" if anatomy.is_causal else "full"
    has_head = any(signal.form.tap is Tap.HEAD_INPUT for signal in signals)
    return TapReport(
        model_class=anatomy.model_class,
        depth=anatomy.depth,
        d_teacher=width,
        causal=anatomy.is_causal,
        heads=heads,
        kv_heads=kv_heads,
        d_head=d_head,
        d_value=d_value,
        rule=dict.fromkeys(attention + layers_of(signals, Tap.ATTENTION_MAP) + values, rule),
        scaling=dict(record.scaling),
        head=read_head_spec(model) if has_head else None,
    )


def weight_bytes(model: PreTrainedModel, *, bits: int | None = None) -> int:
    """Return the bytes of a model's parameters and buffers, tied ones once.

    Args:
        model: The model.
        bits: Bits per number of the blocks' matrices if they are quantised.
    """
    tensors = [*model.parameters(), *model.buffers()]
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if bits is not None:
        for block in find_anatomy(model).blocks:
            for part in block.modules():
                if isinstance(part, nn.Linear):
                    weight = part.weight
                    total -= weight.numel() * weight.element_size() - weight.numel() * bits // 8
    return total


def widest_inner(model: PreTrainedModel) -> int:
    """Return the longest axis of any matrix in the blocks, which is the feed-forward width."""
    # If layers have no blocks of their own, use all matrices of the base model.
    blocks = find_anatomy(model).blocks or (model.base_model,)
    return max(
        max(parameter.shape[-2:])
        for block in blocks
        for parameter in block.parameters()
        if parameter.ndim > 1
    )
