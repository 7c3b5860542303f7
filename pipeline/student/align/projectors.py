"""Bridges from the student's width to the teacher's, one for each aligned pair of layers.

A student layer that a transport plan pairs anew in every batch has one for all its teachers.

They live beside the student while it trains and are in its checkpoints, never in its export.
"""

from collections.abc import Mapping, Sequence

from jaxtyping import Float
from torch import Tensor, nn

from pipeline.errors import ConfigError


class LinearProjector(nn.Module):
    """An affine map. Its start comes from torch's random generator: seed that first."""

    def __init__(self, d_student: int, d_teacher: int) -> None:
        super().__init__()
        self.linear = nn.Linear(d_student, d_teacher)

    def forward(self, hidden: Float[Tensor, "*rows d_student"]) -> Float[Tensor, "*rows d_teacher"]:
        """Project states, in the precision of the projector's weights."""
        return self.linear(hidden.to(self.linear.weight.dtype))


PROJECTORS: dict[str, type[nn.Module]] = {"linear": LinearProjector}


class Projectors(nn.Module):
    """The projectors of one student, a separate one for each pair of layers."""

    def __init__(
        self,
        kind: str,
        pairs: Mapping[int, int | Sequence[int]],
        *,
        d_student: int,
        d_teacher: int,
    ) -> None:
        """Build one projector a pair, in the order of student layers.

        Args:
            kind: A name in `PROJECTORS`.
            pairs: Student layer → teacher layer, or all that share the layer's one projector.
            d_student: Width of the student's states.
            d_teacher: Width of the teacher's states.

        Raises:
            ConfigError: If there is no projector of that name.
        """
        super().__init__()
        if kind not in PROJECTORS:
            known = ", ".join(sorted(PROJECTORS))
            raise ConfigError(f"{kind!r} is no projector; use one of: {known}")
        build = PROJECTORS[kind]
        self._keys = {
            student: pair_key(student, teacher if isinstance(teacher, int) else None)
            for student, teacher in sorted(pairs.items(), key=lambda pair: pair[0])
        }
        self.by_pair = nn.ModuleDict(
            {key: build(d_student, d_teacher) for key in self._keys.values()}
        )

    def of(self, student_layer: int) -> nn.Module:
        """Return what takes the states of one student layer to its teacher's width."""
        return self.by_pair[self._keys[student_layer]]


def pair_key(student_layer: int, teacher_layer: int | None) -> str:
    """Name a pair in state dicts and logs, for example `1->2`; None is any teacher layer."""
    return f"{student_layer}->{'any' if teacher_layer is None else teacher_layer}"
