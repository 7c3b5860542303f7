"""Fills a student with blocks of the teacher, which capture keeps in the store's assets.

The file holds the chosen blocks and the teacher's weights outside its blocks, under the teacher's
names; the teacher itself is not needed. For a narrower student the weights are cut.
"""

import logging
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from pipeline.errors import IncompatibleError, IntegrityError
from pipeline.student.model.width import Sizes, WidthCut
from pipeline.taps.anatomy import Anatomy, find_anatomy
from pipeline.taps.magnitudes import PREFIX

logger = logging.getLogger(__name__)


def load_blocks(
    model: PreTrainedModel, path: Path, choice: Sequence[int], teacher: PreTrainedConfig
) -> None:
    """Fill a student with the teacher's chosen blocks and all its weights outside blocks.

    Weights are widened or narrowed to the student's dtype.

    Args:
        model: The student; its architecture is the teacher's, except for depth and widths.
        path: A safetensors file of the teacher's weights.
        choice: For each student block, the teacher's block, counted from 1.
        teacher: The teacher's configuration.

    Raises:
        IntegrityError: If the file is missing or broken.
        IncompatibleError: If it lacks a chosen block, if names or shapes do not fit the student, or
            if a weight cannot be cut.
    """
    anatomy = find_anatomy(model)
    weights = model.state_dict()
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            held = {name for name in names if not name.startswith(PREFIX)}
            sources = {name: _source(name, anatomy, choice) for name in weights}
            _check_names(path, anatomy, choice, sources, held, weights)
            # In order: sums of floating-point numbers depend on it.
            wanted = sorted(set(sources.values()) & held)
            values = {name: file.get_tensor(name) for name in wanted}
            magnitudes = {
                name: file.get_tensor(f"{PREFIX}{name}")
                for name in wanted
                if f"{PREFIX}{name}" in names
            }
    except (OSError, SafetensorError) as error:
        raise IntegrityError(
            f"{path}: not readable as safetensors ({error}); delete it and run capture again"
        ) from error
    ours, theirs = Sizes.of(model.config), Sizes.of(teacher)
    if ours != theirs:
        blocks = {name: anatomy.block_of(name) for name in values}
        cut = WidthCut(values, blocks, teacher=theirs, student=ours, magnitudes=magnitudes)
        values = {name: cut.cut(name, value) for name, value in values.items()}
        logger.info("the teacher's weights cut to %s", ours)
    with torch.no_grad():
        for name, source in sources.items():
            if source in values:
                _copy(weights[name], values[source], source)


def _source(name: str, anatomy: Anatomy, choice: Sequence[int]) -> str:
    """Return the name of the teacher's weight that fills a weight of the student."""
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
    """Require a source for each weight, and a use for each source."""
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
    for name in sorted(held - set(sources.values())):
        block = anatomy.block_of(name)
        if block is None or block in choice:
            raise IncompatibleError(
                f"init teacher-layers: the student has no place for the teacher's {name}; "
                "the student must be of the teacher's architecture and task"
            )


def _copy(target: Tensor, value: Tensor, name: str) -> None:
    """Copy a weight into the student; `copy_` alone would broadcast."""
    if target.shape != value.shape:
        raise IncompatibleError(
            f"init teacher-layers: {name} is {tuple(target.shape)} in the student, "
            f"{tuple(value.shape)} in the teacher; leave sizes out of model.architecture"
        )
    target.copy_(value)
