"""Which teacher layer each student layer follows.

Layer 0 is the input of block 0 (the embeddings), layer l the output of block l; attention has
no layer 0.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

from pipeline.errors import ConfigError, IncompatibleError


def layer_map(
    spec: Literal["uniform", "last"] | Mapping[int, int],
    *,
    student_layers: int,
    teacher_layers: int,
    include_embeddings: bool,
) -> dict[int, int]:
    """Return student layer → teacher layer, in the order of the student's layers.

    Args:
        spec: `uniform` pairs student layer i of n with layer i·L/n of the teacher's L, halves
            rounded up; `last` pairs the last layers alone; or the pairs themselves.
        student_layers: Blocks of the student.
        teacher_layers: Blocks of the teacher.
        include_embeddings: Whether a uniform map has the pair 0: 0. An explicit one names it or
            not; attention has no layer 0, so its caller drops that pair.

    Raises:
        ConfigError: If an explicit map is empty.
        IncompatibleError: If an explicit map names a layer that one of the two does not have.
    """
    if spec == "uniform":
        first = 0 if include_embeddings else 1
        return {
            student: _proportional(student, student_layers, teacher_layers)
            for student in range(first, student_layers + 1)
        }
    if spec == "last":
        return {student_layers: teacher_layers}
    assert not isinstance(spec, str)  # the words are those above
    if not spec:
        raise ConfigError(
            "the layer map is empty; name at least one pair 'student layer: teacher layer', "
            "use 'uniform', or set the term's weight to 0"
        )
    for student, teacher in spec.items():
        _check_layer("student", student, 0, student_layers)
        _check_layer("teacher", teacher, 0, teacher_layers)
    return dict(sorted(spec.items()))


def transport_map(
    captured: Sequence[int], *, student_layers: int, include_embeddings: bool
) -> dict[int, int | list[int]]:
    """Return student layer → all teacher layers that a transport plan chooses between.

    Args:
        captured: The teacher's layers in the store.
        student_layers: Blocks of the student; each takes part.
        include_embeddings: Whether the pair 0: 0 stands beside them. Embeddings are no block's
            output and have no part in the plan.

    Raises:
        IncompatibleError: If no block's output is in the store.
    """
    teachers = sorted(set(captured) - {0})
    if not teachers:
        raise IncompatibleError(
            "emd chooses between the teacher layers of the store, which has none; capture some, "
            "or set the term's weight to 0"
        )
    first: dict[int, int | list[int]] = {0: 0} if include_embeddings else {}
    return first | {student: list(teachers) for student in range(1, student_layers + 1)}


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
        IncompatibleError: If the blocks are not as many as the student's, or the teacher does not
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
