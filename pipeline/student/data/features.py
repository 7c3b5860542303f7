"""The teacher's side of a batch: stored parts widened on the device into what the losses take."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.errors import IncompatibleError, IntegrityError
from pipeline.store.forms.form import Channels, Form
from pipeline.store.reader import StoreReader
from pipeline.store.records import Declaration
from pipeline.student.align.output_checks import temperature_index
from pipeline.taps.below import QueryKeyBlock
from pipeline.taps.head import HeadSpec, finish_logits
from pipeline.taps.scores import MapRows, first_pairs, probabilities_to_log, rows_of_vectors

HEAD = "lm_head"
WIDENED = 2**24
"""Weights of a head in half precision that are float32 at a time: 64 MiB."""


@dataclass(frozen=True)
class TeacherLogits:
    """The teacher's output at some rows: over all classes, its top k with the normaliser, or draws.

    `samples` are ids drawn from its distribution at temperature 1: the mean of -log q over them has
    the cross-entropy as its expectation, which is the KL and the teacher's entropy.
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
        temperature: The temperature of the output term; a form that keeps only some is checked for
            it.
        vocabulary: The teacher's ids that the student keeps, in the student's order; logits are
            over these.

    Raises:
        IncompatibleError: If the logits' form does not serve this temperature or vocabulary, an
            asset is not the one that belongs to its signal, or attention is to be rebuilt from a
            hidden state that is not among the signals.
    """

    head_weight: Tensor
    head_bias: Tensor | None

    def __init__(
        self,
        reader: StoreReader,
        signals: list[str],
        *,
        temperature: float = 1.0,
        vocabulary: Int[Tensor, " kept"] | None = None,
    ) -> None:
        super().__init__()
        self._forms: dict[tuple[str, int | None], tuple[str, Declaration, Form]] = {}
        self.head: HeadSpec | None = None
        self._normalizer = 0
        # No submodules: blocks are neither trained nor saved, and stay in evaluation mode.
        self._blocks: dict[int, QueryKeyBlock] = {}
        for name in signals:
            declared = reader.signal(name).declaration
            form = declared.build_form()
            self._forms[declared.kind, declared.layer] = (name, declared, form)
            channels = reader.channels(name)
            if channels is not None:
                for key in ("mean", "deviation"):
                    tensor = torch.from_numpy(getattr(channels, key).copy())
                    self.register_buffer(_buffer(declared, key), tensor, persistent=False)
            if declared.kind == "logits":
                self._normalizer = temperature_index(declared, temperature)
                _check_vocabulary(declared, vocabulary)
            if declared.form == "head":
                self._load_head(reader, declared, vocabulary)
            if declared.form == "below":
                self._load_block(reader, declared)
        for layer in self._blocks:
            below = self.declaration("attention", layer).info["hidden"]
            if ("hidden", below) not in self._forms:
                raise IncompatibleError(
                    f"attention/{layer}: rebuilt from hidden/{below}, which is not among the "
                    "student's signals; run the select stage again (`decant select STUDENT`)"
                )

    def _load_head(
        self, reader: StoreReader, declared: Declaration, vocabulary: Tensor | None
    ) -> None:
        tensors = _own_asset(reader, declared, HEAD)
        sizes = declared.geometry
        found = None if "weight" not in tensors else tuple(tensors["weight"].shape)
        if found != (sizes.vocab, sizes.width):
            raise IncompatibleError(
                f"{declared.signal}: the store's {HEAD} is {found}, the signal needs "
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
        [asset] = declared.assets
        self._blocks[declared.layer] = QueryKeyBlock(
            reader.teacher_config(), declared.layer, _own_asset(reader, declared, asset)
        )

    def declaration(self, kind: str, layer: int | None = None) -> Declaration:
        """Return the declaration of a signal."""
        return self._forms[kind, layer][1]

    def _decode(
        self,
        kind: str,
        layer: int | None,
        features: Mapping[str, Mapping[str, Tensor]],
        rows: slice | Tensor = slice(None),
    ) -> dict[str, Tensor]:
        name, declared, form = self._forms[kind, layer]
        chosen = {part: value[rows] for part, value in features[name].items()}
        return form.decode(chosen, self._channels(declared))

    def _channels(self, declared: Declaration) -> Channels | None:
        if declared.channels is None:
            return None
        return Channels(
            getattr(self, _buffer(declared, "mean")), getattr(self, _buffer(declared, "deviation"))
        )

    def hidden(
        self,
        layer: int,
        features: Mapping[str, Mapping[str, Tensor]],
        rows: slice | Tensor = slice(None),
    ) -> Float[Tensor, "rows d_teacher"]:
        """Return rows of a layer's hidden states in units of each channel's deviation.

        Args:
            layer: Which.
            features: Those of a batch.
            rows: Of its live tokens, one after the other; all if it is left out.
        """
        channels = self._channels(self.declaration("hidden", layer))
        assert channels is not None
        raw = self._decode("hidden", layer, features, rows)["hidden"]
        return (raw - channels.mean) / channels.deviation

    def attention_rows(
        self,
        layer: int,
        features: Mapping[str, Mapping[str, Tensor]],
        live: Bool[Tensor, "batch seq"],
    ) -> MapRows:
        """Return what gives rows of a layer's attention maps, which never exist as a whole."""
        name, declared, form = self._forms["attention", layer]
        if declared.form != "map":
            vectors = self.attention_vectors(layer, features, live)
            return rows_of_vectors(vectors["query"], vectors["key"], declared.info["scaling"])
        first = first_pairs(live.sum(-1), live.shape[1], declared.info["rule"])

        def rows(
            examples: slice, queries: slice, visible: Bool[Tensor, "some 1 rows keys"]
        ) -> Float[Tensor, "some heads rows keys"]:
            seen = visible[:, 0]
            keys = torch.arange(seen.shape[-1], device=seen.device)
            places = torch.where(seen, first[examples, queries, None] + keys, 0)
            chosen = {part: value[places] for part, value in features[name].items()}
            maps = form.decode(chosen, None)["probability"] * seen[..., None]
            return probabilities_to_log(maps.permute(0, 3, 1, 2))

        return rows

    def attention_vectors(
        self,
        layer: int,
        features: Mapping[str, Mapping[str, Tensor]],
        live: Bool[Tensor, "batch seq"],
    ) -> dict[str, Float[Tensor, "batch some_heads seq d_head"]]:
        """Return a layer's `query` and (possibly of fewer heads) `key`, zero at padding.

        Raises:
            IncompatibleError: If the layer's form is `map`, which keeps no vectors.
        """
        declared = self.declaration("attention", layer)
        if declared.form == "map":
            raise IncompatibleError(
                f"{declared.signal}: maps hold no query and key, which relations are made of; "
                "capture this layer in form qk or below, or use another loss.attention.loss"
            )
        if declared.form != "below":
            return _padded(self._decode("attention", layer, features), live)
        hidden = self._decode("hidden", declared.info["hidden"], features)["hidden"]
        states = hidden.new_zeros((*live.shape, hidden.shape[-1]))
        states[live] = hidden
        found = zip(("query", "key"), self._blocks[layer](states), strict=True)
        return {key: value * live[:, None, :, None] for key, value in found}

    def values(
        self,
        layer: int,
        features: Mapping[str, Mapping[str, Tensor]],
        live: Bool[Tensor, "batch seq"],
    ) -> Float[Tensor, "batch kv_heads seq d_value"]:
        """Return a layer's attention values, zero at padding."""
        return _padded(self._decode("value", layer, features), live)["value"]

    def output_parts(
        self,
        features: Mapping[str, Mapping[str, Tensor]],
        rows: Bool[Tensor, " tokens"] | None,
    ) -> tuple[Tensor, ...]:
        """Return the output signal's tensors at the kept rows, as `logits` takes them in chunks."""
        parts = self._decode("logits", None, features, slice(None) if rows is None else rows)
        if "ids" in parts:
            return parts["ids"], parts["log_probs"], parts["log_normalizer"][:, self._normalizer]
        [part] = parts.values()
        return (part,)

    def logits(self, *parts: Tensor) -> TeacherLogits:
        """Turn a chunk of `output_parts` into the teacher's output."""
        if len(parts) == 3:
            return TeacherLogits(ids=parts[0], log_probs=parts[1], log_normalizer=parts[2])
        if self.declaration("logits").form == "sampled":
            return TeacherLogits(samples=parts[0])
        if self.head is None:
            return TeacherLogits(full=parts[0])
        with torch.no_grad(), torch.autocast(parts[0].device.type, enabled=False):
            full = finish_logits(_product(parts[0], self.head_weight, self.head_bias), self.head)
        return TeacherLogits(full=full)


def _product(
    head_input: Float[Tensor, "rows d"],
    weight: Float[Tensor, "vocab d"],
    bias: Float[Tensor, " vocab"] | None,
) -> Float[Tensor, "rows vocab"]:
    """Return the head's product in float32; of a head in half precision no wide copy exists."""
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


def _padded(
    parts: Mapping[str, Tensor], live: Bool[Tensor, "batch seq"]
) -> dict[str, Float[Tensor, "batch some_heads seq d_head"]]:
    """Put rows of live tokens, each (heads, d_head), back to their places; zeros elsewhere."""
    padded = {}
    for key, value in parts.items():
        full = value.new_zeros((*live.shape, *value.shape[1:]))
        full[live] = value
        padded[key] = full.transpose(1, 2)
    return padded


def _own_asset(reader: StoreReader, declared: Declaration, name: str) -> dict[str, Tensor]:
    """Load an asset after seeing that it is the one its signal was captured with."""
    if reader.index["assets"].get(name) != declared.info.get(name):
        raise IncompatibleError(
            f"{declared.signal}: the store's asset {name} is not the one it was captured with; "
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
    if vocabulary is not None and declared.form in ("topk", "sampled"):
        raise IncompatibleError(
            f"{declared.signal}: the student keeps {len(vocabulary)} of the teacher's "
            f"{declared.geometry.vocab} ids, and {declared.form} holds no logits of just these; "
            "capture logits in form head"
        )


def _buffer(declared: Declaration, key: str) -> str:
    return f"{declared.kind}_{declared.layer}_{key}"
