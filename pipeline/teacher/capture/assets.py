"""Assets that students need in addition to features: configuration, tokenizer, head, blocks."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.provenance import write_bytes_atomically, write_json
from pipeline.store.index import index_asset, read_index
from pipeline.store.layout import BLOCKS, Layout
from pipeline.store.shards import bytes_digest, file_digest
from pipeline.taps.anatomy import Anatomy, find_anatomy
from pipeline.taps.below import query_key_parameters
from pipeline.taps.configuration import text_part
from pipeline.taps.head import head_parameters
from pipeline.taps.magnitudes import PREFIX
from pipeline.taps.weights import plain_weights

HALF = (torch.bfloat16, torch.float16)


def write_descriptions(layout: Layout, config: dict[str, Any], tokenizer: Path) -> None:
    """Write configuration and tokenizer; the plan, written later, lists their digests."""
    write_json(layout.assets / "teacher" / "config.json", config)
    shutil.copytree(tokenizer, layout.assets / "tokenizer", dirs_exist_ok=True)


def _write(layout: Layout, name: str, tensors: dict[str, Tensor], **record: Any) -> dict[str, Any]:
    path = layout.assets / f"{name}.safetensors"
    contiguous = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    write_bytes_atomically(path, save(contiguous))
    entry = {"file": path.name, **file_digest(path, layout.root), **record}
    index_asset(layout, name, entry)
    return entry


def write_head(layout: Layout, name: str, model: PreTrainedModel) -> dict[str, Any]:
    """Write weight and bias of the output embeddings; return the index entry.

    They are stored in half precision if that loses nothing, as for a bfloat16 checkpoint that runs
    in float32, because every student loads them. A store that already has a float32 head keeps it.
    """
    weight, bias = head_parameters(model)
    tensors = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    return _write_narrowed(layout, name, tensors)


def _write_narrowed(
    layout: Layout, name: str, tensors: dict[str, Tensor], **record: Any
) -> dict[str, Any]:
    """Write tensors in half precision where that loses nothing.

    A store that already has them in float32 keeps that file: signals and students name its digest.
    """
    entry = read_index(layout)["assets"].get(name) if layout.index.exists() else None
    if entry is not None:
        wide = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
        if bytes_digest(save(wide)).items() <= entry.items():
            return _write(layout, name, wide, **record)
    narrow = {key: _narrowed(value) for key, value in tensors.items()}
    return _write(layout, name, narrow, **record)


def _narrowed(value: Tensor) -> Tensor:
    """Return the tensor on the CPU, in half precision if that changes no value."""
    value = value.detach().cpu()
    if value.dtype in HALF:
        return value
    for dtype in HALF:
        if all(
            torch.equal(chunk.to(dtype).to(value.dtype), chunk)
            for chunk in value.reshape(-1).split(2**20)
        ):
            return value.to(dtype)
    return value


def write_query_key(
    layout: Layout, name: str, model: PreTrainedModel, layer: int
) -> dict[str, Any]:
    """Write the parameters that run before a block's attention; return the index entry."""
    return _write(layout, name, query_key_parameters(model, layer))


def write_blocks(
    layout: Layout,
    model: PreTrainedModel,
    layers: list[int],
    magnitudes: Mapping[str, Tensor],
) -> dict[str, Any]:
    """Write the chosen blocks and all weights outside the blocks, under the teacher's own names.

    Each matrix of a block is stored with the RMS of its inputs, for pruning the width of students.
    For a multimodal model only the language model is written, under the names it has by itself.

    Raises:
        IncompatibleError: If the model's layers have no blocks of their own.
    """
    anatomy = find_anatomy(model)
    anatomy.require_blocks()
    prefix = f"{anatomy.path}."
    chosen = tuple(f"{prefix}{layer - 1}." for layer in layers)
    rename = _renaming(model, anatomy)
    weights = plain_weights(
        model,
        lambda name: (
            rename(name) is not None and (not name.startswith(prefix) or name.startswith(chosen))
        ),
    )
    tensors = {str(rename(name)): value for name, value in weights.items()}
    tensors |= {
        f"{PREFIX}{rename(name)}": value
        for name, value in magnitudes.items()
        if name.startswith(chosen)
    }
    return _write_narrowed(layout, BLOCKS, tensors, layers=layers)


def _renaming(model: PreTrainedModel, anatomy: Anatomy) -> Callable[[str], str | None]:
    """Return a function from a weight's name to its name in the language model by itself.

    Names differ in multimodal models; a weight outside the language model gives None.
    """
    if text_part(model.config) is model.config:
        return lambda name: name
    base, owner = f"{model.base_model_prefix}.", f"{anatomy.path.rpartition('.')[0]}."

    def rename(name: str) -> str | None:
        if name.startswith(owner):
            return base + name.removeprefix(owner)
        return None if name.startswith(base) else name

    return rename
