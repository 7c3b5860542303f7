"""The teacher's weights cut to a narrower student: channels, heads and neurons by importance.

What a part matters is how large it is times how strongly it is read: the norm of what capture saw
come into a matrix, feature by feature, times that of the feature's weights (Minitron,
arXiv 2407.14679; Wanda, arXiv 2306.11695). No teacher has to run for it. A hidden channel runs
through the whole model and is chosen once for all of it; heads, in whole groups that share a key,
and neurons are each block's own. What is kept stays in order.

It is where training starts, not a compressed model: a norm over fewer channels is another norm.
"""

import re
from collections.abc import Mapping
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedConfig

from pipeline.errors import IncompatibleError
from pipeline.student.model.sizes import Sizes
from pipeline.taps.configuration import auto_class

Axis: TypeAlias = Literal["channel", "head", "key", "fused", "neuron", "own"]
"""What an axis of a weight counts. `head`, `key`: heads times their width; `fused`: query, key and
value side by side; `own`: classes, positions, ids, a head's own width, which are never cut."""

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
"""By the end of a weight's name, what each of its axes counts."""

INPUT_FIRST = r"\.(attn|mlp)\.c_(attn|fc|proj)\.weight"
"""Matrices whose first axis is their input; of all others it is the second."""


def check_cuttable(student: PreTrainedConfig, teacher: PreTrainedConfig, task: str) -> None:
    """Refuse a narrower student of a family whose weights nobody knows how to cut.

    Args:
        student: The student's configuration.
        teacher: The teacher's configuration.
        task: What its head is for.

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
    """Chooses what of a teacher a narrower student keeps, and cuts weights to it.

    Args:
        weights: The teacher's weights that the student starts from, by name; all of one model.
        blocks: For each of those names the block it belongs to, None for those around the blocks.
        teacher: The teacher's sizes.
        student: The student's sizes, see `check_cut`.
        magnitudes: By the name of a block's matrix, the root mean square of what it reads.

    Raises:
        IncompatibleError: If a weight's name or shape says nothing of what its axes are, or the
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
        whole = self._teacher.heads * width
        return torch.cat([queries, whole + keys, 2 * whole + keys])


def _roles(name: str, value: Tensor, sizes: Sizes) -> tuple[Axis, ...]:
    """Find what a weight's axes count, and see that they are as long as that says."""
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
    """Return for each feature that a matrix reads the mean square of what it adds to the output."""
    if name not in magnitudes:
        raise IncompatibleError(
            f"init teacher-layers: the store does not say how large the inputs of {name} are, so "
            "it cannot be cut; delete assets/blocks.safetensors of the store and capture again"
        )
    axis = 1 if re.search(f"{INPUT_FIRST}$", name) else 0
    squares = value.double().square().sum(axis) * magnitudes[name].double().square()
    return squares.clamp_min(torch.finfo(torch.float64).tiny)


def _largest(importance: Float[Tensor, " parts"], count: int) -> Int[Tensor, " kept"]:
    """Return the places of the `count` largest values, in order; of equal ones the first."""
    ranked = importance.argsort(descending=True, stable=True)
    return ranked[:count].sort().values


def _stretches(groups: Int[Tensor, " kept"], width: int) -> Int[Tensor, " places"]:
    return (groups[:, None] * width + torch.arange(width)).flatten()
