"""Sizes of a student that its teacher's weights can be cut to, told by configurations alone."""

from dataclasses import dataclass

from transformers import PreTrainedConfig

from pipeline.errors import IncompatibleError
from pipeline.taps.configuration import head_width, key_heads, size_of


def check_sizes(student: PreTrainedConfig, teacher: PreTrainedConfig) -> None:
    """Refuse a student whose blocks are neither built like the teacher's nor cut out of them.

    Equal shapes would not be enough: two head counts have the same weights' shapes.

    Raises:
        IncompatibleError: Naming the first size that does not fit, with both values.
    """
    if student.model_type != teacher.model_type:
        raise IncompatibleError(
            f"init teacher-layers: the student's model_type is {student.model_type}, the "
            f"teacher's {teacher.model_type}; leave it out of model.architecture or use init: "
            "random"
        )
    check_cut(Sizes.of(student), Sizes.of(teacher))


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model that a cut can change, and the head's width, which it cannot."""

    width: int
    heads: int
    key_heads: int
    head_width: int
    neurons: int

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "Sizes":
        """Read them from a configuration, by whichever names its family has."""
        neurons = [getattr(config, key, None) for key in ("intermediate_size", "hidden_dim")]
        width = size_of(config, "hidden_size")
        return cls(
            width,
            size_of(config, "num_attention_heads"),
            key_heads(config),
            head_width(config),
            # GPT-2 writes no number where it means four times the width.
            next((n for n in neurons if n), None) or getattr(config, "n_inner", None) or 4 * width,
        )

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.heads // self.key_heads if self.key_heads else 1


def check_cut(student: Sizes, teacher: Sizes) -> None:
    """Refuse sizes that the teacher's weights cannot be cut to.

    Raises:
        IncompatibleError: If the student is wider anywhere, its heads have another width, or its
            keys are shared by another number of heads.
    """
    for key, name in (
        ("width", "hidden_size"),
        ("heads", "num_attention_heads"),
        ("key_heads", "num_key_value_heads"),
        ("neurons", "intermediate_size"),
    ):
        found, most = getattr(student, key), getattr(teacher, key)
        if found > most:
            raise IncompatibleError(
                f"init teacher-layers: the student's {name} is {found}, the teacher's {most}; a "
                "student is cut out of its teacher: lower it or use init: random"
            )
    if student.head_width != teacher.head_width:
        raise IncompatibleError(
            f"init teacher-layers: the student's head_dim is {student.head_width}, the teacher's "
            f"{teacher.head_width}; whole heads are kept: give head_dim {teacher.head_width}, or "
            f"where the family has no such key hidden_size = num_attention_heads x "
            f"{teacher.head_width}"
        )
    if student.group != teacher.group:
        raise IncompatibleError(
            f"init teacher-layers: {student.group} of the student's heads share a key, "
            f"{teacher.group} of the teacher's; whole groups are kept: give num_key_value_heads "
            f"{max(1, student.heads // teacher.group)}"
        )
