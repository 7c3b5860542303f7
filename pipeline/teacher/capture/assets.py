"""What students need besides features: configuration, tokenizer, head, blocks or parts of them."""

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
from pipeline.store.layout import Layout
from pipeline.store.shards import bytes_digest, file_digest
from pipeline.taps.anatomy import Anatomy, find_anatomy
from pipeline.taps.below import query_key_parameters
from pipeline.taps.configuration import text_part
from pipeline.taps.head import head_parameters
from pipeline.taps.magnitudes import PREFIX
from pipeline.taps.weights import plain_weights

BLOCKS = "blocks"
HALF = (torch.bfloat16, torch.float16)


def write_descriptions(layout: Layout, config: dict[str, Any], tokenizer: Path) -> None:
    """Write configuration and tokenizer; before the plan, which lists their digests."""
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
    """Write weight and bias of the output embeddings; return the index's entry.

    In half precision if that holds the same numbers: a checkpoint in bfloat16 that runs in float32
    has such a head, and every student has it beside itself. A store that has a wider one keeps it,
    for its signals name that.
    """
    weight, bias = head_parameters(model)
    tensors = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    return _write_narrowed(layout, name, tensors)


def _write_narrowed(
    layout: Layout, name: str, tensors: dict[str, Tensor], **record: Any
) -> dict[str, Any]:
    """Write tensors in half precision where that holds the same numbers.

    A store that has them wider keeps that: signals and students name the file by its digest.
    """
    known = read_index(layout)["assets"].get(name) if layout.index.exists() else None
    if known is not None:
        wide = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
        if bytes_digest(save(wide)).items() <= known.items():
            return _write(layout, name, wide, **record)
    narrow = {key: _narrowed(value) for key, value in tensors.items()}
    return _write(layout, name, narrow, **record)


def _narrowed(value: Tensor) -> Tensor:
    """Return the tensor on the host, in half precision where no number changes."""
    value = value.detach().cpu()
    if value.dtype in HALF:
        return value
    for dtype in HALF:
        if all(
            torch.equal(part.to(dtype).to(value.dtype), part)
            for part in value.reshape(-1).split(2**20)
        ):
            return value.to(dtype)
    return value


def write_query_key(
    layout: Layout, name: str, model: PreTrainedModel, layer: int
) -> dict[str, Any]:
    """Write the parameters that run before a block's attention; return the index's entry."""
    return _write(layout, name, query_key_parameters(model, layer))


def write_blocks(
    layout: Layout,
    model: PreTrainedModel,
    layers: list[int],
    magnitudes: Mapping[str, Tensor],
) -> dict[str, Any]:
    """Write the chosen blocks and everything outside the blocks, under the teacher's own names.

    Each matrix of a block comes with the magnitudes of its inputs, for students that are cut. Of a
    model that reads images too only the language model is written, under the names it has alone.

    Raises:
        IncompatibleError: If the model's blocks cannot be told apart.
    """
    anatomy = find_anatomy(model)
    anatomy.require_blocks()
    prefix = f"{anatomy.path}."
    wanted = tuple(f"{prefix}{layer - 1}." for layer in layers)
    rename = _renaming(model, anatomy)
    weights = plain_weights(
        model,
        lambda name: (
            rename(name) is not None and (not name.startswith(prefix) or name.startswith(wanted))
        ),
    )
    tensors = {str(rename(name)): value for name, value in weights.items()}
    tensors |= {
        f"{PREFIX}{rename(name)}": value
        for name, value in magnitudes.items()
        if name.startswith(wanted)
    }
    return _write_narrowed(layout, BLOCKS, tensors, layers=layers)


def _renaming(model: PreTrainedModel, anatomy: Anatomy) -> Callable[[str], str | None]:
    """Return what tells a weight's name in a model of the text part alone; None: it is not there.

    Names differ where the language model is one of several parts.
    """
    if text_part(model.config) is model.config:
        return lambda name: name
    base, owner = f"{model.base_model_prefix}.", f"{anatomy.path.rpartition('.')[0]}."

    def rename(name: str) -> str | None:
        if name.startswith(owner):
            return base + name.removeprefix(owner)
        return None if name.startswith(base) else name

    return rename
