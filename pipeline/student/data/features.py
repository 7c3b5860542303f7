"""Decodes the teacher's stored signals of a batch, on the device, for the losses."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.axes import Axis
from pipeline.errors import IncompatibleError, IntegrityError
from pipeline.store.forms.form import Channels, Content, Tap
from pipeline.store.forms.registry import names_of
from pipeline.store.reader import StoreReader
from pipeline.store.records import Declaration
from pipeline.student.align.output_checks import temperature_index
from pipeline.taps.below import QueryKeyBlock
from pipeline.taps.head import HeadSpec, finish_logits
from pipeline.taps.scores import MapRows, first_pairs, probabilities_to_log, rows_of_vectors

SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}
WIDENED = 2**24
"""Weights of a head in half precision that are float32 at a time: 64 MiB."""


@dataclass(frozen=True)
class TeacherLogits:
    """The teacher's output at some rows: all logits, the top-k with the normaliser, or samples.

    `samples` are ids drawn from its distribution at temperature 1. The expectation of the mean of
    -log q over them is the cross-entropy, that is the KL plus the teacher's entropy.
    """

    full: Float[Tensor, "rows vocab"] | None = None
    ids: Tensor | None = None
    log_probs: Tensor | None = None
    log_normalizer: Tensor | None = None
    samples: Int[Tensor, "rows n"] | None = None

    def rows(self, chosen: slice) -> "TeacherLogits":
        """Return the output at some of the rows."""
        return TeacherLogits(
            **{name: part[chosen] for name, part in vars(self).items() if part is not None}
        )


class TeacherFeatures(nn.Module):
    """Decodes the signals a student uses; its buffers (statistics, head) are not trained.

    Args:
        reader: The store, pinned to the student's signals.
        signals: Names of the signals.
        temperature: The temperature of the output term; the form of the logits must serve it.
        vocabulary: The teacher's ids that the student keeps, in the student's order; logits have
            these alone.

    Raises:
        IncompatibleError: If the logits' form does not serve this temperature or vocabulary, an
            asset does not belong to its signal, or a signal is rebuilt from another that is not
            among the signals.
    """

    head_weight: Tensor
    head_bias: Tensor | None
    outputs: int

    def __init__(
        self,
        reader: StoreReader,
        signals: list[str],
        *,
        temperature: float = 1.0,
        vocabulary: Int[Tensor, " kept"] | None = None,
    ) -> None:
        super().__init__()
        self._signals: dict[tuple[str, int | None], Declaration] = {}
        self._vocabulary = vocabulary
        self.head: HeadSpec | None = None
        self._normalizer = 0
        # Not submodules: blocks are neither trained nor saved, and stay in evaluation mode.
        self._blocks: dict[int, QueryKeyBlock] = {}
        for name in signals:
            declared = reader.signal(name).declaration
            self._signals[declared.kind, declared.layer] = declared
            channels = reader.channels(name)
            if channels is not None:
                for key in ("mean", "deviation"):
                    tensor = torch.from_numpy(getattr(channels, key).copy())
                    self.register_buffer(_buffer(declared, key), tensor, persistent=False)
            if declared.kind == "logits":
                self._normalizer = temperature_index(declared, temperature)
                _check_vocabulary(declared, vocabulary)
                # A student with a smaller vocabulary has logits of its own ids alone.
                self.outputs = declared.geometry.vocab if vocabulary is None else len(vocabulary)
            if declared.form.tap is Tap.HEAD_INPUT:
                self._load_head(reader, declared, vocabulary)
            if declared.form.tap is Tap.LAYER_BELOW:
                self._load_block(reader, declared)
        for declared in self._signals.values():
            for kind, layer in declared.needs.items():
                if (kind, layer) not in self._signals:
                    raise IncompatibleError(
                        f"{declared.kind}/{declared.layer}: rebuilt from {kind}/{layer}, which is "
                        "not among the student's signals; run the select stage again (`decant "
                        "select STUDENT`)"
                    )

    def _load_head(
        self, reader: StoreReader, declared: Declaration, vocabulary: Tensor | None
    ) -> None:
        [asset] = declared.assets
        tensors = _own_asset(reader, declared, asset)
        sizes = declared.geometry
        shape = None if "weight" not in tensors else tuple(tensors["weight"].shape)
        if shape != (sizes.vocab, sizes.width):
            raise IncompatibleError(
                f"{declared.name}: the store's {asset} is {shape}, the signal needs "
                f"{(sizes.vocab, sizes.width)}; run the capture stage again (`decant capture "
                "TEACHER`)"
            )
        rows = slice(None) if vocabulary is None else vocabulary.long().cpu()
        bias = tensors.get("bias")
        self.register_buffer("head_weight", tensors["weight"][rows], persistent=False)
        self.register_buffer(
            "head_bias", None if bias is None else bias[rows].float(), persistent=False
        )
        self.head = HeadSpec(bias is not None, declared.info["scale"], declared.info["softcap"])

    def _load_block(self, reader: StoreReader, declared: Declaration) -> None:
        assert declared.layer is not None
        [asset] = declared.asset_entries
        self._blocks[declared.layer] = QueryKeyBlock(
            reader.teacher_config(), declared.layer, _own_asset(reader, declared, asset)
        )

    def declaration(self, kind: str, layer: int | None = None) -> Declaration:
        """Return the declaration of a signal."""
        return self._signals[kind, layer]

    def _decode(
        self,
        kind: str,
        layer: int | None,
        batch: Mapping[str, Any],
        rows: slice | Tensor = slice(None),
    ) -> dict[str, Tensor]:
        declared = self.declaration(kind, layer)
        chosen = _stored(batch, declared, rows)
        return declared.form.decode(chosen, self._channels(declared))

    def _channels(self, declared: Declaration) -> Channels | None:
        if declared.channels is None:
            return None
        return Channels(
            getattr(self, _buffer(declared, "mean")), getattr(self, _buffer(declared, "deviation"))
        )

    def hidden(
        self,
        layer: int,
        batch: Mapping[str, Any],
        rows: slice | Tensor = slice(None),
    ) -> Float[Tensor, "rows d_teacher"]:
        """Return rows of a layer's hidden states in units of each channel's deviation.

        Args:
            layer: The layer.
            batch: A batch with its features.
            rows: Which of the batch's live tokens, counted one after the other.
        """
        declared = self.declaration("hidden", layer)
        channels = self._channels(declared)
        assert channels is not None
        return declared.form.decode_standardised(_stored(batch, declared, rows), channels)

    def attention_rows(self, layer: int, batch: Mapping[str, Any]) -> MapRows:
        """Return a function that decodes some rows of a layer's attention maps at a time."""
        declared = self.declaration("attention", layer)
        if declared.form.content is not Content.ATTENTION_MAP:
            vectors = self.attention_vectors(layer, batch)
            return rows_of_vectors(vectors["query"], vectors["key"], declared.info["scaling"])
        live, stored = batch["attention_mask"], batch["features"][declared.name]
        first = first_pairs(live.sum(-1), live.shape[1], declared.info["rule"])

        def rows(
            examples: slice, queries: slice, visible: Bool[Tensor, "some 1 rows keys"]
        ) -> Float[Tensor, "some heads rows keys"]:
            seen = visible[:, 0]
            keys = torch.arange(seen.shape[-1], device=seen.device)
            pairs = torch.where(seen, first[examples, queries, None] + keys, 0)
            chosen = {array: value[pairs] for array, value in stored.items()}
            maps = declared.form.decode(chosen, None)["probability"] * seen[..., None]
            return probabilities_to_log(maps.permute(0, 3, 1, 2))

        return rows

    def attention_vectors(
        self, layer: int, batch: Mapping[str, Any]
    ) -> dict[str, Float[Tensor, "batch some_heads seq d_head"]]:
        """Return a layer's `query` and `key`, which may have fewer heads, zero at padding.

        Raises:
            IncompatibleError: If the layer's form keeps attention maps instead of vectors.
        """
        declared = self.declaration("attention", layer)
        if declared.form.content is Content.ATTENTION_MAP:
            raise IncompatibleError(
                f"{declared.name}: maps hold no query and key, which relations are made of; "
                f"capture this layer in form {names_of(Content.QUERY_KEY)}, or use another "
                "loss.attention.loss"
            )
        if declared.form.tap is not Tap.LAYER_BELOW:
            vectors = self._decode("attention", layer, batch)
            return {key: _padded(value, batch).transpose(1, 2) for key, value in vectors.items()}
        states = _padded(self._decode("hidden", declared.needs["hidden"], batch)["hidden"], batch)
        live = batch["attention_mask"].bool()
        vectors = dict(zip(("query", "key"), self._blocks[layer](states), strict=True))
        return {key: value * live[:, None, :, None] for key, value in vectors.items()}

    def values(
        self, layer: int, batch: Mapping[str, Any]
    ) -> Float[Tensor, "batch kv_heads seq d_value"]:
        """Return a layer's attention values, zero at padding."""
        return _padded(self._decode("value", layer, batch)["value"], batch).transpose(1, 2)

    def output_parts(self, batch: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """Return the decoded output signal, which `logits` takes in chunks.

        Rows are a language model's targets, in the order of the batch, or the examples.
        """
        is_by_token = self.declaration("logits").axis is Axis.TOKEN
        rows = batch["positions"]["target_tokens"] if is_by_token else slice(None)
        parts = self._decode("logits", None, batch, rows)
        if self.declaration("logits").form.content is Content.TOP_K:
            return parts["ids"], parts["log_probs"], parts["log_normalizer"][:, self._normalizer]
        [part] = parts.values()
        return (part,)

    def logits(self, *parts: Tensor) -> TeacherLogits:
        """Turn a chunk of `output_parts` into the teacher's output."""
        content = self.declaration("logits").form.content
        if content is Content.TOP_K:
            return TeacherLogits(ids=parts[0], log_probs=parts[1], log_normalizer=parts[2])
        if content is Content.SAMPLES:
            return TeacherLogits(samples=parts[0])
        if self.head is None:
            kept = slice(None) if self._vocabulary is None else self._vocabulary.to(parts[0].device)
            return TeacherLogits(full=parts[0][:, kept])
        with torch.no_grad(), torch.autocast(parts[0].device.type, enabled=False):
            full = finish_logits(_product(parts[0], self.head_weight, self.head_bias), self.head)
        return TeacherLogits(full=full)


def _product(
    head_input: Float[Tensor, "rows d"],
    weight: Float[Tensor, "vocab d"],
    bias: Float[Tensor, " vocab"] | None,
) -> Float[Tensor, "rows vocab"]:
    """Return the head's product in float32, without a float32 copy of a head in half precision."""
    if weight.dtype == torch.float32:
        return F.linear(head_input, weight, bias)
    product = head_input.new_empty(len(head_input), len(weight))
    size = max(1, WIDENED // weight.shape[1])
    for first in range(0, len(weight), size):
        ids = slice(first, first + size)
        product[:, ids] = F.linear(
            head_input, weight[ids].float(), None if bias is None else bias[ids]
        )
    return product


def _stored(
    batch: Mapping[str, Any], declared: Declaration, rows: slice | Tensor
) -> dict[str, Tensor]:
    """Return some rows of a signal's stored arrays."""
    arrays: Mapping[str, Tensor] = batch["features"][declared.name]
    if isinstance(rows, slice):
        return {name: array[rows] for name, array in arrays.items()}
    chosen = {}
    for name, array in arrays.items():
        # CUDA cannot index unsigned integers of more than 8 bits.
        plain = array.view(SIGNED.get(array.dtype, array.dtype))
        chosen[name] = plain.index_select(0, rows).view(array.dtype)
    return chosen


def _padded(
    values: Float[Tensor, "tokens ..."], batch: Mapping[str, Any]
) -> Float[Tensor, "batch seq ..."]:
    """Scatter values of the live tokens to a padded batch, with zeros elsewhere."""
    shape = batch["attention_mask"].shape
    full = values.new_zeros((shape.numel(), *values.shape[1:]))
    return full.index_copy_(0, batch["positions"]["live"], values).unflatten(0, shape)


def _own_asset(reader: StoreReader, declared: Declaration, name: str) -> dict[str, Tensor]:
    """Load an asset; it must be the one that its signal was captured with."""
    if reader.index["assets"].get(name) != declared.info.get(name):
        raise IncompatibleError(
            f"{declared.name}: the store's asset {name} is not the one it was captured with; "
            "run the capture stage again (`decant capture TEACHER`)"
        )
    path = reader.asset(name)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise IntegrityError(
            f"{path}: not readable as safetensors ({error}); delete it and run capture again"
        ) from error


def _check_vocabulary(declared: Declaration, vocabulary: Tensor | None) -> None:
    if vocabulary is not None and declared.form.content is not Content.LOGITS:
        raise IncompatibleError(
            f"{declared.name}: the student keeps {len(vocabulary)} of the teacher's "
            f"{declared.geometry.vocab} ids, and {declared.form.name} holds no logits of just "
            f"these; capture logits in form {names_of(Content.LOGITS)}"
        )


def _buffer(declared: Declaration, key: str) -> str:
    return f"{declared.kind}_{declared.layer}_{key}"
