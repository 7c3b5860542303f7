"""A student that starts from the teacher's own blocks, which capture put beside the features.

The file holds the teacher's weights outside its blocks and the chosen blocks, under the teacher's
names; the teacher itself is not needed.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from pipeline.errors import IncompatibleError, IntegrityError
from pipeline.taps.anatomy import Anatomy, find_anatomy

SIZES = (
    "model_type",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
)


def check_sizes(student: PreTrainedConfig, teacher: PreTrainedConfig) -> None:
    """Refuse a student whose blocks are not built like the teacher's.

    Equal shapes would not be enough: two head counts have the same weights' shapes.

    Raises:
        IncompatibleError: Naming the first size that differs, with both values.
    """
    for key in SIZES:
        found, expected = getattr(student, key, None), getattr(teacher, key, None)
        if found != expected:
            raise IncompatibleError(
                f"init teacher-layers: the student's {key} is {found}, the teacher's {expected}; "
                "leave it out of model.architecture or use init: random"
            )


def load_blocks(model: PreTrainedModel, path: Path, choice: Sequence[int]) -> None:
    """Fill a student with the teacher's chosen blocks and all its weights outside blocks.

    Weights are widened or narrowed to the student's dtype.

    Args:
        model: The student, of the teacher's architecture but for its depth.
        path: A safetensors file of the teacher's weights.
        choice: For each student block, the teacher's block, counted from 1.

    Raises:
        IntegrityError: If the file is missing or broken.
        IncompatibleError: If it lacks a chosen block, or names or shapes do not fit the student.
    """
    anatomy = find_anatomy(model)
    weights = model.state_dict()
    try:
        with safe_open(path, framework="pt") as file:
            held = set(file.keys())
            sources = {name: _source(name, anatomy, choice) for name in weights}
            _check_names(path, anatomy, choice, sources, held, weights)
            with torch.no_grad():
                for name, source in sources.items():
                    if source in held:
                        _copy(weights[name], file.get_tensor(source), source)
    except (OSError, SafetensorError) as error:
        raise IntegrityError(
            f"{path}: not readable as safetensors ({error}); delete it and run capture again"
        ) from error


def _source(name: str, anatomy: Anatomy, choice: Sequence[int]) -> str:
    """Name the teacher's weight that fills a student's."""
    block = anatomy.block_of(name)
    if block is None:
        return name
    rest = name.removeprefix(f"{anatomy.path}.{block - 1}.")
    return f"{anatomy.path}.{choice[block - 1] - 1}.{rest}"


def _check_names(
    path: Path,
    anatomy: Anatomy,
    choice: Sequence[int],
    sources: dict[str, str],
    held: set[str],
    weights: dict[str, Tensor],
) -> None:
    """Require a source for each weight, and a use for each source, so that nothing is dropped."""
    numbered = re.compile(rf"{re.escape(anatomy.path)}\.(\d+)\.")
    blocks = {int(match[1]) + 1 for match in map(numbered.match, held) if match}
    for block in choice:
        if block not in blocks:
            has = ", ".join(map(str, sorted(blocks))) or "none"
            raise IncompatibleError(
                f"init teacher-layers: teacher block {block} is not in {path.name} (it has {has}); "
                "add it to the blocks that capture keeps, or choose others"
            )
    # A tied weight has two names and one storage; the file may hold either name.
    filled = {weights[name].data_ptr() for name, source in sources.items() if source in held}
    for name, source in sources.items():
        if source not in held and weights[name].data_ptr() not in filled:
            raise IncompatibleError(
                f"init teacher-layers: {path.name} has no {source} for the student's {name}; "
                "the student must be of the teacher's architecture and task"
            )
    wanted = held - set(sources.values())
    for name in sorted(wanted):
        block = anatomy.block_of(name)
        if block is None or block in choice:
            raise IncompatibleError(
                f"init teacher-layers: the student has no place for the teacher's {name}; "
                "the student must be of the teacher's architecture and task"
            )


def _copy(target: Tensor, value: Tensor, name: str) -> None:
    """Copy one weight into the student, where `copy_` alone would broadcast."""
    if target.shape != value.shape:
        raise IncompatibleError(
            f"init teacher-layers: {name} is {tuple(target.shape)} in the student, "
            f"{tuple(value.shape)} in the teacher; leave sizes out of model.architecture"
        )
    target.copy_(value)
