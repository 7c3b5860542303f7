"""Cuts the teacher's weights to a narrower student: channels, heads and neurons by importance.

The importance of an input feature of a matrix is the norm of its values, as capture measured it,
times the norm of its weights (Minitron, arXiv 2407.14679; Wanda, arXiv 2306.11695). The teacher
does not have to run. Hidden channels run through the entire model and are chosen once for all of
it. Neurons, and heads in complete groups that share a key, are chosen for each block. The order
stays.

The result is a start for training, not a compressed model: a norm over fewer channels is another
norm.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedConfig

from pipeline.errors import IncompatibleError
from pipeline.taps.configuration import auto_class, head_width, key_heads, size_of

Axis: TypeAlias = Literal["channel", "head", "key", "fused", "neuron", "own"]
"""What an axis of a weight counts. `head`, `key`: heads times their width; `fused`: query, key and
value in one; `own`: classes, positions, ids, a head's own width, which are never cut."""

ROLES: tuple[tuple[str, tuple[Axis, ...]], ...] = (
    # GPT-2, whose Conv1D has the input first
    (r"\.attn\.c_attn\.weight", ("channel", "fused")),
    (r"\.attn\.c_attn\.bias", ("fused",)),
    (r"\.attn\.c_proj\.weight", ("head", "channel")),
    (r"\.mlp\.c_fc\.weight", ("channel", "neuron")),
    (r"\.mlp\.c_fc\.bias", ("neuron",)),
    (r"\.mlp\.c_proj\.weight", ("neuron", "channel")),
    (r"\.(attn|mlp)\.c_proj\.bias", ("channel",)),
    (r"\.ln_(1|2|f)\.(weight|bias)", ("channel",)),
    # Llama, Mistral, Qwen2, Qwen3
    (r"\.self_attn\.q_proj\.weight", ("head", "channel")),
    (r"\.self_attn\.q_proj\.bias", ("head",)),
    (r"\.self_attn\.[kv]_proj\.weight", ("key", "channel")),
    (r"\.self_attn\.[kv]_proj\.bias", ("key",)),
    (r"\.self_attn\.o_proj\.weight", ("channel", "head")),
    (r"\.self_attn\.[qk]_norm\.weight", ("own",)),
    (r"\.mlp\.(gate|up)_proj\.weight", ("neuron", "channel")),
    (r"\.mlp\.(gate|up)_proj\.bias", ("neuron",)),
    (r"\.mlp\.down_proj\.weight", ("channel", "neuron")),
    (r"\.(self_attn\.o_proj|mlp\.down_proj)\.bias", ("channel",)),
    (r"\.(input_layernorm|post_attention_layernorm|norm)\.weight", ("channel",)),
    # BERT, RoBERTa
    (r"\.attention\.self\.(query|key|value)\.weight", ("head", "channel")),
    (r"\.attention\.self\.(query|key|value)\.bias", ("head",)),
    (r"\.attention\.output\.dense\.weight", ("channel", "head")),
    (r"\.intermediate\.dense\.weight", ("neuron", "channel")),
    (r"\.intermediate\.dense\.bias", ("neuron",)),
    (r"\.\d+\.output\.dense\.weight", ("channel", "neuron")),
    (r"\.output\.dense\.bias", ("channel",)),
    (r"\.LayerNorm\.(weight|bias)", ("channel",)),
    # DistilBERT
    (r"\.attention\.[qkv]_lin\.weight", ("head", "channel")),
    (r"\.attention\.[qkv]_lin\.bias", ("head",)),
    (r"\.attention\.out_lin\.weight", ("channel", "head")),
    (r"\.ffn\.lin1\.weight", ("neuron", "channel")),
    (r"\.ffn\.lin1\.bias", ("neuron",)),
    (r"\.ffn\.lin2\.weight", ("channel", "neuron")),
    (r"\.(attention\.out_lin|ffn\.lin2)\.bias", ("channel",)),
    (r"\.(sa|output)_layer_norm\.(weight|bias)", ("channel",)),
    # Around the blocks
    (r"(\.|^)(embed_tokens|wte|wpe|\w+_embeddings)\.weight", ("own", "channel")),
    (r"(\.|^)(pooler\.dense|pre_classifier|classifier\.dense)\.weight", ("channel", "channel")),
    (r"(\.|^)(pooler\.dense|pre_classifier|classifier\.dense)\.bias", ("channel",)),
    (r"(\.|^)(lm_head|score|classifier|classifier\.out_proj)\.weight", ("own", "channel")),
    (r"(\.|^)(lm_head|score|classifier|classifier\.out_proj)\.bias", ("own",)),
)
"""What each axis of a weight counts, by the end of its name."""

INPUT_FIRST = r"\.(attn|mlp)\.c_(attn|fc|proj)\.weight"
"""Matrices whose first axis is their input; all others have it second."""


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
    """Sizes of a model that a cut can change, and the width of a head, which it cannot."""

    width: int
    heads: int
    key_heads: int
    head_width: int
    neurons: int

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "Sizes":
        """Read the sizes from a configuration, under the names of its family."""
        neurons = [getattr(config, key, None) for key in ("intermediate_size", "hidden_dim")]
        width = size_of(config, "hidden_size")
        return cls(
            width,
            size_of(config, "num_attention_heads"),
            key_heads(config),
            head_width(config),
            # GPT-2 has no number if it is four times the width.
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
        size, most = getattr(student, key), getattr(teacher, key)
        if size > most:
            raise IncompatibleError(
                f"init teacher-layers: the student's {name} is {size}, the teacher's {most}; a "
                "student is cut out of its teacher: lower it or use init: random"
            )
    if student.head_width != teacher.head_width:
        raise IncompatibleError(
            f"init teacher-layers: the student's head_dim is {student.head_width}, the teacher's "
            f"{teacher.head_width}; only complete heads are kept: give head_dim "
            f"{teacher.head_width}, or if the family has no such key hidden_size = "
            f"num_attention_heads x {teacher.head_width}"
        )
    if student.group != teacher.group:
        raise IncompatibleError(
            f"init teacher-layers: {student.group} of the student's heads share a key, "
            f"{teacher.group} of the teacher's; only complete groups are kept: give "
            f"num_key_value_heads {max(1, student.heads // teacher.group)}"
        )


def check_cuttable(student: PreTrainedConfig, teacher: PreTrainedConfig, task: str) -> None:
    """Refuse a narrower student of a family whose weights cannot be cut.

    Args:
        student: The student's configuration.
        teacher: The teacher's configuration.
        task: One of `pipeline.tasks`.

    Raises:
        IncompatibleError: Naming a weight whose axes are not known.
    """
    sizes = Sizes.of(teacher)
    if Sizes.of(student) == sizes:
        return
    with torch.device("meta"):
        model = auto_class(task).from_config(teacher)
    for name, value in model.state_dict().items():
        _roles(name, value, sizes)


class WidthCut:
    """Chooses which parts of the teacher a narrower student keeps, and cuts weights to them.

    Args:
        weights: The teacher's weights that the student starts from, by name; all of one model.
        blocks: The block that each of those names belongs to; None for weights outside the blocks.
        teacher: The teacher's sizes.
        student: The student's sizes, see `check_cut`.
        magnitudes: Root mean square of each input of a block's matrix, by the matrix's name.

    Raises:
        IncompatibleError: If the axes of a weight are not known by its name and shape, or the
            magnitudes of a block's matrix are missing.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        blocks: Mapping[str, int | None],
        *,
        teacher: Sizes,
        student: Sizes,
        magnitudes: Mapping[str, Tensor],
    ) -> None:
        self._teacher, self._student = teacher, student
        self._roles = {name: _roles(name, value, teacher) for name, value in weights.items()}
        self.blocks = dict(blocks)
        energies = {
            name: _energy(name, value, magnitudes)
            for name, value in weights.items()
            if blocks[name] is not None and value.ndim == 2
        }
        inputs = {name: _input_role(name, self._roles[name]) for name in energies}
        shares = [
            energies[name] / energies[name].sum() for name in energies if inputs[name] == "channel"
        ]
        self.channels = _largest(torch.stack(shares).sum(0), student.width)
        self.groups: dict[int, Int[Tensor, " kept"]] = {}
        self.neurons: dict[int, Int[Tensor, " kept"]] = {}
        for block in sorted({block for block in blocks.values() if block is not None}):
            own = {inputs[name]: energies[name] for name in energies if blocks[name] == block}
            heads = own["head"].reshape(teacher.key_heads, -1).sum(1)
            self.groups[block] = _largest(heads, student.key_heads)
            self.neurons[block] = _largest(own["neuron"], student.neurons)

    def cut(self, name: str, value: Tensor) -> Tensor:
        """Return a weight with the kept parts of each of its axes."""
        for axis, role in enumerate(self._roles[name]):
            if role != "own":
                value = value.index_select(axis, self._kept(role, self.blocks[name]))
        return value

    def _kept(self, role: Axis, block: int | None) -> Int[Tensor, " kept"]:
        if role == "channel":
            return self.channels
        assert block is not None  # heads and neurons are in blocks, see ROLES
        if role == "neuron":
            return self.neurons[block]
        width = self._teacher.head_width
        keys = _stretches(self.groups[block], width)
        if role == "key":
            return keys
        queries = _stretches(self.groups[block], self._teacher.group * width)
        if role == "head":
            return queries
        # Query, key and value, each as wide as all of the teacher's heads (GPT-2: no groups).
        size = self._teacher.heads * width
        return torch.cat([queries, size + keys, 2 * size + keys])


def _roles(name: str, value: Tensor, sizes: Sizes) -> tuple[Axis, ...]:
    """Return what a weight's axes count; their lengths must agree with it."""
    lengths: dict[Axis, int] = {
        "channel": sizes.width,
        "head": sizes.heads * sizes.head_width,
        "key": sizes.key_heads * sizes.head_width,
        "fused": 3 * sizes.heads * sizes.head_width,
        "neuron": sizes.neurons,
    }
    for pattern, roles in ROLES:
        if re.search(f"(?:{pattern})$", name):
            expected = [lengths.get(role, n) for role, n in zip(roles, value.shape, strict=False)]
            if len(roles) == value.ndim and expected == list(value.shape):
                return roles
    raise IncompatibleError(
        f"init teacher-layers: it is not known what the axes of the teacher's {name} "
        f"{tuple(value.shape)} are, so it cannot be cut; leave sizes out of model.architecture or "
        "use init: random"
    )


def _input_role(name: str, roles: tuple[Axis, ...]) -> Axis:
    return roles[0] if re.search(f"{INPUT_FIRST}$", name) else roles[1]


def _energy(name: str, value: Tensor, magnitudes: Mapping[str, Tensor]) -> Float[Tensor, " inputs"]:
    """Return the importance of each input of a matrix: its mean square in the output."""
    if name not in magnitudes:
        raise IncompatibleError(
            f"init teacher-layers: the store does not say how large the inputs of {name} are, so "
            "it cannot be cut; delete assets/blocks.safetensors of the store and capture again"
        )
    axis = 1 if re.search(f"{INPUT_FIRST}$", name) else 0
    squares = value.double().square().sum(axis) * magnitudes[name].double().square()
    return squares.clamp_min(torch.finfo(torch.float64).tiny)


def _largest(importance: Float[Tensor, " parts"], count: int) -> Int[Tensor, " kept"]:
    """Return the indices of the `count` largest values, in order; of equal ones the first."""
    ranked = importance.argsort(descending=True, stable=True)
    return ranked[:count].sort().values


def _stretches(groups: Int[Tensor, " kept"], width: int) -> Int[Tensor, " indices"]:
    return (groups[:, None] * width + torch.arange(width)).flatten()
