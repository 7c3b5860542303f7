"""Where a Hugging Face transformer keeps its blocks, found by structure and not by names.

The blocks are the shallowest `ModuleList` with as many entries as the configuration has layers.
Sizes come from the configuration, whose attribute map already unites the names that families use
for one thing.
"""

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from pipeline.errors import IncompatibleError


@dataclass(frozen=True, eq=False)
class Anatomy:
    """A model taken apart: its blocks in order, their name, and the sizes that signals have.

    Layer numbers are the project's: block l, counted from 1, reads `hidden/l-1` and writes
    `hidden/l`.
    """

    model_class: str
    base: nn.Module
    owner: nn.Module
    path: str
    blocks: tuple[nn.Module, ...]
    head: nn.Module | None
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    is_causal: bool

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    def block_of(self, name: str) -> int | None:
        """Return the block, from 1, that submodule or parameter `name` is in; None if in none."""
        prefix = f"{self.path}."
        if not name.startswith(prefix):
            return None
        return int(name.removeprefix(prefix).split(".", 1)[0]) + 1

    def require_layers(
        self, *, hidden: Collection[int] = (), attention: Collection[int] = ()
    ) -> None:
        """Refuse layers the model does not have.

        Raises:
            IncompatibleError: If a number is outside 0..depth (hidden) or 1..depth (attention).
        """
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
        IncompatibleError: If it has two stacks, shares one block between layers, or shows no stack
            at all.
    """
    name = type(model).__name__
    config = model.config.get_text_config()
    if config.is_encoder_decoder:
        raise IncompatibleError(
            f"{name} is an encoder-decoder, expected a model with one stack of blocks; choose a "
            "decoder-only or encoder-only model"
        )
    path, stack = _find_blocks(model, name, getattr(config, "num_hidden_layers", None))
    width, heads = config.hidden_size, config.num_attention_heads
    return Anatomy(
        model_class=name,
        base=model.base_model,
        owner=model.get_submodule(path.rpartition(".")[0]),
        path=path,
        blocks=tuple(stack),
        head=model.get_output_embeddings(),
        width=width,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or width // heads,
        is_causal=any(getattr(part, "is_causal", False) is True for part in stack.modules()),
    )


def _find_blocks(model: nn.Module, name: str, depth: int | None) -> tuple[str, nn.ModuleList]:
    """Take the shallowest list, so that one inside a block (experts, say) is never the stack."""
    found = [
        (path, part)
        for path, part in model.named_modules()
        if isinstance(part, nn.ModuleList) and len(part) == depth
    ]
    level = min((path.count(".") for path, _ in found), default=0)
    shallowest = [(path, part) for path, part in found if path.count(".") == level]
    if len(shallowest) != 1:
        places = ", ".join(path for path, _ in shallowest) or "none"
        raise IncompatibleError(
            f"{name}: expected one list of {depth} transformer blocks (config.num_hidden_layers), "
            f"found {places}; this architecture cannot be tapped, choose another model"
        )
    path, stack = shallowest[0]
    if len({id(block) for block in stack}) != depth:
        raise IncompatibleError(
            f"{name}: {path} repeats one block for several layers, expected {depth} different "
            "blocks; this architecture cannot be tapped, choose another model"
        )
    return path, stack
