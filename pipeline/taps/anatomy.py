"""Find the blocks, head and sizes of a transformers model by structure, not by module names.

The blocks are the shallowest `ModuleList` with as many entries as the configuration has layers.
Sizes come from the configuration, whose attribute map already unifies the key names of different
families. A missing feature (separate blocks, attention heads) is refused only when it is requested,
so that the model's other features stay available.
"""

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from pipeline.errors import IncompatibleError
from pipeline.taps.configuration import head_width, key_heads, size_of, text_part

ONLY_OUTPUTS = (
    "only its outputs can be used: leave hidden states, attention, value and blocks out, and set "
    "the weights of a student's feature and attention terms to 0"
)


@dataclass(frozen=True, eq=False)
class Anatomy:
    """A model's blocks in order, their module path, its head, and its sizes.

    Block l, counted from 1, reads `hidden/l-1` and writes `hidden/l`. If the layers have no blocks
    of their own (ALBERT repeats one block), `blocks` is empty and `no_blocks` holds the reason.
    `heads`, `kv_heads` and `head_dim` are 0 in a model without attention heads (Mamba).
    """

    model_class: str
    base: nn.Module
    owner: nn.Module
    path: str
    blocks: tuple[nn.Module, ...]
    no_blocks: str
    depth: int
    head: nn.Module | None
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    is_causal: bool

    def block_of(self, name: str) -> int | None:
        """Return the number, from 1, of the block that contains `name`; None if no block does."""
        prefix = f"{self.path}."
        if not self.blocks or not name.startswith(prefix):
            return None
        return int(name.removeprefix(prefix).split(".", 1)[0]) + 1

    def require_blocks(self) -> None:
        """Refuse a model whose layers have no blocks of their own.

        Raises:
            IncompatibleError: With the reason.
        """
        if not self.blocks:
            raise IncompatibleError(f"{self.model_class}: {self.no_blocks}")

    def require_layers(
        self, *, hidden: Collection[int] = (), attention: Collection[int] = ()
    ) -> None:
        """Refuse layers that the model does not have.

        Raises:
            IncompatibleError: If a number is outside 0..depth (hidden) or 1..depth (attention), or
                the model has no blocks or no attention heads.
        """
        if hidden or attention:
            self.require_blocks()
        if attention and not self.heads:
            raise IncompatibleError(
                f"{self.model_class} has no attention heads, attention asked for in layers "
                f"{', '.join(map(str, sorted(attention)))}; leave attention and value out"
            )
        for layer in sorted(hidden):
            if not 0 <= layer <= self.depth:
                raise IncompatibleError(
                    f"hidden layer {layer} asked for, {self.model_class} has 0..{self.depth} (0 is "
                    "the input of the first block); choose layers in that range"
                )
        for layer in sorted(attention):
            if not 1 <= layer <= self.depth:
                raise IncompatibleError(
                    f"attention layer {layer} asked for, {self.model_class} has 1..{self.depth}; "
                    "choose layers in that range"
                )


def find_anatomy(model: PreTrainedModel) -> Anatomy:
    """Find blocks, head and sizes of a model with one stack of transformer blocks.

    Raises:
        IncompatibleError: If it is an encoder-decoder, or its configuration has no number of layers
            or no width.
    """
    name = type(model).__name__
    config = text_part(model.config)
    if config.is_encoder_decoder or model.config.is_encoder_decoder:
        raise IncompatibleError(
            f"{name} is an encoder-decoder, expected a model with one stack of blocks; choose a "
            "decoder-only or encoder-only model"
        )
    depth, width = (size_of(config, key) for key in ("num_hidden_layers", "hidden_size"))
    if not depth or not width:
        raise IncompatibleError(
            f"{name}: its configuration has no {'hidden_size' if depth else 'num_hidden_layers'}, "
            "expected a model with one stack of blocks of one width; choose another model"
        )
    path, stack, reason = _find_blocks(model, depth)
    heads = size_of(config, "num_attention_heads")
    return Anatomy(
        model_class=name,
        base=model.base_model,
        owner=model.get_submodule(path.rpartition(".")[0]) if stack else model.base_model,
        path=path,
        blocks=tuple(stack),
        no_blocks=reason,
        depth=depth,
        head=model.get_output_embeddings(),
        width=width,
        heads=heads,
        kv_heads=key_heads(config),
        head_dim=head_width(config),
        is_causal=any(getattr(part, "is_causal", False) is True for part in model.modules()),
    )


def _find_blocks(model: nn.Module, depth: int) -> tuple[str, tuple[nn.Module, ...], str]:
    """Return the path of the blocks and the blocks, or the reason why there are none.

    The shallowest list is taken, so that a list inside a block (of experts, say) is never chosen.
    """
    candidates = [
        (path, part)
        for path, part in model.named_modules()
        if isinstance(part, nn.ModuleList) and len(part) == depth
    ]
    level = min((path.count(".") for path, _ in candidates), default=0)
    shallowest = [(path, part) for path, part in candidates if path.count(".") == level]
    if len(shallowest) != 1:
        paths = ", ".join(path for path, _ in shallowest) or "none"
        expected = f"one list of {depth} transformer blocks (config.num_hidden_layers)"
        return "", (), f"expected {expected}, found {paths}; {ONLY_OUTPUTS}"
    path, stack = shallowest[0]
    if len({id(block) for block in stack}) != depth:
        repeated = f"{path} repeats one block for several layers"
        return "", (), f"{repeated}, expected {depth} different blocks; {ONLY_OUTPUTS}"
    return path, tuple(stack), ""
