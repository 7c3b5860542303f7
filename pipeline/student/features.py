"""The teacher's side of a batch: stored parts widened on the device into what the losses take."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.errors import IncompatibleError
from pipeline.store.forms.form import Channels, Form
from pipeline.store.reader import StoreReader
from pipeline.store.records import Declaration
from pipeline.taps.head import HeadSpec, apply_head
from pipeline.taps.scores import attention_log_probs, visible_keys

HEAD = "lm_head"


@dataclass(frozen=True)
class TeacherLogits:
    """The teacher's output at some rows: over all classes, or the top k with its normaliser."""

    full: Float[Tensor, "rows vocab"] | None = None
    ids: Tensor | None = None
    log_probs: Tensor | None = None
    log_normalizer: Tensor | None = None


class TeacherFeatures(nn.Module):
    """Decodes the signals a student uses; its buffers (statistics, head) are not trained.

    Args:
        reader: The store, pinned to the student's signals.
        signals: Names of the signals.
        temperature: The temperature of the output term; a form that keeps only some is checked for
            it.

    Raises:
        IncompatibleError: If `topk` was not captured at this temperature, or the head is not the
            one that belongs to the signal.
    """

    head_weight: Tensor
    head_bias: Tensor | None

    def __init__(
        self, reader: StoreReader, signals: list[str], *, temperature: float = 1.0
    ) -> None:
        super().__init__()
        self._forms: dict[tuple[str, int | None], tuple[str, Declaration, Form]] = {}
        self.head: HeadSpec | None = None
        self._normalizer = 0
        for name in signals:
            declared = reader.signal(name).declaration
            form = declared.build_form()
            self._forms[declared.kind, declared.layer] = (name, declared, form)
            channels = reader.channels(name)
            if channels is not None:
                for key in ("mean", "deviation"):
                    tensor = torch.from_numpy(getattr(channels, key).copy())
                    self.register_buffer(_buffer(declared, key), tensor, persistent=False)
            if declared.form == "topk":
                self._normalizer = _temperature_index(declared, temperature)
            if declared.form == "head":
                self._load_head(reader, declared)

    def _load_head(self, reader: StoreReader, declared: Declaration) -> None:
        if reader.index["assets"].get(HEAD) != declared.info[HEAD]:
            raise IncompatibleError(
                f"{declared.signal}: the store's asset {HEAD} is not the one it was captured with; "
                "run the capture stage again"
            )
        tensors = load_file(reader.asset(HEAD))
        self.register_buffer("head_weight", tensors["weight"].float(), persistent=False)
        bias = tensors.get("bias")
        self.register_buffer("head_bias", None if bias is None else bias.float(), persistent=False)
        self.head = HeadSpec(bias is not None, declared.info["scale"], declared.info["softcap"])

    def declaration(self, kind: str, layer: int | None = None) -> Declaration:
        """Return the declaration of a signal."""
        return self._forms[kind, layer][1]

    def _decode(
        self, kind: str, layer: int | None, features: Mapping[str, Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        name, declared, form = self._forms[kind, layer]
        return form.decode(features[name], self._channels(declared))

    def _channels(self, declared: Declaration) -> Channels | None:
        if declared.channels is None:
            return None
        return Channels(
            getattr(self, _buffer(declared, "mean")), getattr(self, _buffer(declared, "deviation"))
        )

    def hidden(
        self, layer: int, features: Mapping[str, Mapping[str, Tensor]]
    ) -> Float[Tensor, "tokens d_teacher"]:
        """Return a layer's hidden states in units of each channel's deviation, live tokens only."""
        raw = self._decode("hidden", layer, features)["hidden"]
        channels = self._channels(self.declaration("hidden", layer))
        assert channels is not None
        return (raw - channels.mean) / channels.deviation

    def attention_log_probs(
        self,
        layer: int,
        features: Mapping[str, Mapping[str, Tensor]],
        live: Bool[Tensor, "batch seq"],
    ) -> Float[Tensor, "batch heads seq seq"]:
        """Return the log of a layer's attention maps."""
        parts = self._decode("attention", layer, features)
        padded = {}
        for key, value in parts.items():
            full = value.new_zeros((*live.shape, *value.shape[1:]))
            full[live] = value
            padded[key] = full.transpose(1, 2)
        info = self.declaration("attention", layer).info
        visible = visible_keys(live.sum(-1), live.shape[1], info["rule"])
        return attention_log_probs(padded["query"], padded["key"], info["scaling"], visible)

    def output_parts(
        self,
        features: Mapping[str, Mapping[str, Tensor]],
        rows: Bool[Tensor, " tokens"] | None,
    ) -> tuple[Tensor, ...]:
        """Return the output signal's tensors at the kept rows, as `logits` takes them in chunks."""
        parts = self._decode("logits", None, features)
        if rows is not None:
            parts = {key: value[rows] for key, value in parts.items()}
        if "ids" in parts:
            return parts["ids"], parts["log_probs"], parts["log_normalizer"][:, self._normalizer]
        return (parts["head_input"] if "head_input" in parts else parts["logits"],)

    def logits(self, *parts: Tensor) -> TeacherLogits:
        """Turn a chunk of `output_parts` into the teacher's output."""
        if len(parts) == 3:
            return TeacherLogits(ids=parts[0], log_probs=parts[1], log_normalizer=parts[2])
        if self.head is None:
            return TeacherLogits(full=parts[0])
        with torch.no_grad(), torch.autocast(parts[0].device.type, enabled=False):
            full = apply_head(parts[0], self.head_weight, self.head_bias, self.head)
        return TeacherLogits(full=full)


def _buffer(declared: Declaration, key: str) -> str:
    return f"{declared.kind}_{declared.layer}_{key}"


def _temperature_index(declared: Declaration, temperature: float) -> int:
    captured = [float(t) for t in declared.options["temperatures"]]
    if float(temperature) not in captured:
        raise IncompatibleError(
            f"loss.output.temperature: {temperature}, but {declared.signal} was captured at "
            f"{captured}; "
            "choose one of these, capture at this one too, or use the form head"
        )
    return captured.index(float(temperature))
