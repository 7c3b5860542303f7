"""Layer maps: which teacher layer each student layer learns from.

Layer 0 is the input of block 0 (the embeddings), layer l the output of block l; attention has no
layer 0. A map with a name is a function of this file, or of another package that gives it by an
entry point of the group `decant.layer_maps`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.errors import ConfigError, IncompatibleError
from pipeline.registry import Registry

LayerMap = Mapping[int, int | Sequence[int]]
"""From a student layer to a teacher layer, or to those that a transport plan chooses between."""


@dataclass(frozen=True)
class Layers:
    """What a layer map is made from.

    Attributes:
        student: Blocks of the student.
        teacher: Blocks of the teacher.
        has_embeddings: Whether a map with a name has the pair 0: 0.
        captured: The teacher's layers in the store.
    """

    student: int
    teacher: int
    has_embeddings: bool
    captured: Sequence[int] = ()


@dataclass(frozen=True)
class NamedMap:
    """A layer map with its name in `params.yaml`."""

    name: str
    function: Callable[[Layers], LayerMap]


LAYER_MAPS: Registry[NamedMap] = Registry(
    "layer map",
    package="pipeline.student.align.layer_maps",
    group="decant.layer_maps",
    name_of=lambda value: value.name if isinstance(value, NamedMap) else None,
)


def named_map(name: str) -> Callable[[Callable[[Layers], LayerMap]], NamedMap]:
    """Declare the function below as a layer map."""
    return lambda function: NamedMap(name, function)


def layer_map(spec: str | Mapping[int, int], layers: Layers) -> LayerMap:
    """Return student layer → teacher layer, in the order of the student's layers.

    Args:
        spec: The name of a map, or the pairs themselves.
        layers: What the map is made from. Pairs that are given name 0: 0 or do not; attention has
            no layer 0, so its caller drops that pair.

    Raises:
        ConfigError: If there is no map of that name, or there are no pairs.
        IncompatibleError: If the map names a layer that the student or the teacher does not have.
    """
    pairs = LAYER_MAPS[spec].function(layers) if isinstance(spec, str) else spec
    if not pairs:
        raise ConfigError(
            "the layer map is empty; name at least one pair 'student layer: teacher layer', "
            "use 'uniform', or set the term's weight to 0"
        )
    for student, teachers in pairs.items():
        _check_layer("student", student, 0, layers.student)
        for teacher in [teachers] if isinstance(teachers, int) else teachers:
            _check_layer("teacher", teacher, 0, layers.teacher)
    return dict(sorted(pairs.items()))


@named_map("uniform")
def uniform(layers: Layers) -> LayerMap:
    """Pair student layer i of n with layer i·L/n of the teacher's L, halves rounded up."""
    return {
        student: _proportional(student, layers.student, layers.teacher)
        for student in range(0 if layers.has_embeddings else 1, layers.student + 1)
    }


@named_map("last")
def last(layers: Layers) -> LayerMap:
    """Pair the last layers alone (MiniLM, arXiv 2002.10957)."""
    return {layers.student: layers.teacher}


@named_map("emd")
def emd(layers: Layers) -> LayerMap:
    """Let a transport plan choose between all captured layers (BERT-EMD, arXiv 2010.06133).

    Embeddings are no block's output and have no part in the plan.

    Raises:
        IncompatibleError: If no block's output is in the store.
    """
    teachers = sorted(set(layers.captured) - {0})
    if not teachers:
        raise IncompatibleError(
            "emd chooses between the teacher layers of the store, which has none; capture some, "
            "or set the term's weight to 0"
        )
    pairs: dict[int, int | list[int]] = {0: 0} if layers.has_embeddings else {}
    return pairs | {student: list(teachers) for student in range(1, layers.student + 1)}


def layer_pairs(layers: LayerMap) -> list[tuple[int, int]]:
    """Return every pair of student and teacher layer that a map lets meet."""
    return [
        (student, teacher)
        for student, teachers in layers.items()
        for teacher in ([teachers] if isinstance(teachers, int) else teachers)
    ]


def block_choice(
    spec: Literal["uniform", "first", "last"] | Sequence[int] | Mapping[Literal["every"], int],
    *,
    student_layers: int,
    teacher_layers: int,
) -> tuple[int, ...]:
    """Return the teacher block, counted from 1, that each student block starts from.

    Args:
        spec: `uniform`; `first` or `last`, as many of the teacher's as the student has;
            `{every: n}`, counted back from the teacher's last; or one teacher block for each
            student block.
        student_layers: Blocks of the student.
        teacher_layers: Blocks of the teacher.

    Raises:
        IncompatibleError: If the number of blocks is not the student's, or the teacher does not
            have one of them.
    """
    if isinstance(spec, Mapping):
        chosen = list(range(teacher_layers, 0, -spec["every"]))[::-1]
        if len(chosen) != student_layers:
            raise IncompatibleError(
                f"every {spec['every']} of the teacher's {teacher_layers} blocks gives "
                f"{len(chosen)}, the student has {student_layers}; change one of the two numbers "
                "or use 'uniform'"
            )
    elif spec == "uniform":
        chosen = [
            _proportional(block, student_layers, teacher_layers)
            for block in range(1, student_layers + 1)
        ]
    elif spec == "first":
        chosen = list(range(1, student_layers + 1))
    elif spec == "last":
        chosen = list(range(teacher_layers - student_layers + 1, teacher_layers + 1))
    else:
        assert not isinstance(spec, str)  # the words are those above
        chosen = list(spec)
    if len(chosen) != student_layers:
        raise IncompatibleError(
            f"{len(chosen)} teacher blocks are listed, the student has {student_layers}; "
            "list one for each student block or use 'uniform'"
        )
    for block in chosen:
        _check_layer("teacher", block, 1, teacher_layers)
    return tuple(chosen)


def _proportional(layer: int, student_layers: int, teacher_layers: int) -> int:
    """Scale a layer number in integers.

    Python's `round` sends halves to even, which would space 4 layers of 10 unevenly and could
    send a block to layer 0.
    """
    if layer == 0:
        return 0
    return max(1, (2 * layer * teacher_layers + student_layers) // (2 * student_layers))


def _check_layer(side: str, layer: int, first: int, last: int) -> None:
    """Refuse a layer outside first..last by name."""
    if not first <= layer <= last:
        raise IncompatibleError(
            f"{side} layer {layer} asked for, the {side} has {first}..{last}; change the layer map"
        )
