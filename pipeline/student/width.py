"""The teacher's weights cut to a narrower student: channels, heads and neurons by importance.

Importance is read off the weights alone, so no teacher has to run: the idea of Minitron
(arXiv 2407.14679) and LLM-Pruner (arXiv 2305.11627), which estimate it from activations or
gradients, with the magnitudes that these weights have. A hidden channel runs through the whole
model and is chosen once for all of it; heads, in whole groups that share a key, and neurons are
each block's own. What is kept stays in order.

It is where training starts, not a compressed model: norms say little of what a small teacher can do
without, and a norm over fewer channels is another norm.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pipeline.errors import IncompatibleError
from pipeline.student.sizes import Sizes

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

# The parts of a block that a head's and a neuron's importance are the product of.
HEAD_OUT = r"(o_proj|attn\.c_proj|attention\.output\.dense|out_lin)\.weight"
HEAD_VALUE = r"(v_proj|c_attn|self\.value|v_lin)\.weight"


class WidthCut:
    """Chooses what of a teacher a narrower student keeps, and cuts weights to it.

    Args:
        weights: The teacher's weights that the student starts from, by name; all of one model.
        blocks: For each of those names the block it belongs to, None for those around the blocks.
        teacher: The teacher's sizes.
        student: The student's sizes, see `check_cut`.

    Raises:
        IncompatibleError: If a weight's name or shape says nothing of what its axes are.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        blocks: Mapping[str, int | None],
        *,
        teacher: Sizes,
        student: Sizes,
    ) -> None:
        self._teacher, self._student = teacher, student
        self._roles = {name: _roles(name, value, teacher) for name, value in weights.items()}
        self.blocks = dict(blocks)
        importance = _channel_importance(weights, self._roles, teacher.width)
        self.channels = _largest(importance, student.width)
        self.groups: dict[int, Int[Tensor, " kept"]] = {}
        self.neurons: dict[int, Int[Tensor, " kept"]] = {}
        for block in sorted({block for block in blocks.values() if block is not None}):
            own = {name: value for name, value in weights.items() if blocks[name] == block}
            groups = _group_importance(own, self._roles, teacher)
            self.groups[block] = _largest(groups, student.key_heads)
            neurons = _neuron_importance(own, self._roles, teacher.neurons)
            self.neurons[block] = _largest(neurons, student.neurons)

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


def _channel_importance(
    weights: Mapping[str, Tensor], roles: Mapping[str, Sequence[Axis]], width: int
) -> Float[Tensor, " channels"]:
    """Sum the squares of all that reads or writes a channel, every matrix with the same say."""
    total = torch.zeros(width, dtype=torch.float64)
    for name, value in weights.items():
        if value.ndim != 2:
            continue  # a norm's gain scales what others write
        squares = value.double().square()
        squares /= squares.sum().clamp_min(torch.finfo(torch.float64).tiny)
        for axis, role in enumerate(roles[name]):
            if role == "channel":
                total += squares.sum(1 - axis)
    return total


def _group_importance(
    block: Mapping[str, Tensor], roles: Mapping[str, Sequence[Axis]], sizes: Sizes
) -> Float[Tensor, " groups"]:
    """Multiply the norms of what a group's values are made by and what its heads are read by."""
    importance = torch.ones(sizes.key_heads, dtype=torch.float64)
    for name, value in block.items():
        is_out, is_value = (re.search(f"{p}$", name) for p in (HEAD_OUT, HEAD_VALUE))
        if not (is_out or is_value):
            continue
        axis = next(i for i, role in enumerate(roles[name]) if role in ("head", "key", "fused"))
        rows = value.double().movedim(axis, 0)
        if roles[name][axis] == "fused":
            rows = rows[-sizes.heads * sizes.head_width :]
        importance *= rows.reshape(sizes.key_heads, -1).norm(dim=1)
    return importance


def _neuron_importance(
    block: Mapping[str, Tensor], roles: Mapping[str, Sequence[Axis]], neurons: int
) -> Float[Tensor, " neurons"]:
    """Multiply the norms of all matrices' parts that belong to a neuron: in, gate and out."""
    importance = torch.ones(neurons, dtype=torch.float64)
    for name, value in block.items():
        if value.ndim == 2 and "neuron" in roles[name]:
            importance *= value.double().norm(dim=1 - roles[name].index("neuron"))
    return importance


def _largest(importance: Float[Tensor, " parts"], count: int) -> Int[Tensor, " kept"]:
    """Return the places of the `count` largest values, in order; of equal ones the first."""
    ranked = importance.argsort(descending=True, stable=True)
    return ranked[:count].sort().values


def _stretches(groups: Int[Tensor, " kept"], width: int) -> Int[Tensor, " places"]:
    return (groups[:, None] * width + torch.arange(width)).flatten()
