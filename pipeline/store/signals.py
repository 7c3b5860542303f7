"""A signal is one layer's kind of feature in one form, as in `hidden/8/int8-1f3a9c02`."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pipeline.axes import Axis
from pipeline.registry import Origin
from pipeline.store.forms.form import Form
from pipeline.store.forms.registry import FORMS, identity, origin_of


@dataclass(frozen=True)
class Signal:
    """A form of one layer's features; the layer of logits is None."""

    form: Form
    layer: int | None

    @property
    def kind(self) -> str:
        """The kind of feature: hidden, attention, value or logits."""
        return self.form.kind

    @property
    def axis(self) -> Axis:
        """The axis of the signal's rows."""
        return self.form.axis

    @cached_property
    def name(self) -> str:
        """The signal's identity, which is also its path below `features.zarr`."""
        place = self.kind if self.layer is None else f"{self.kind}/{self.layer}"
        return f"{place}/{identity(self.form)}"

    @property
    def assets(self) -> tuple[str, ...]:
        """The names of the assets that decoding needs."""
        return self.form.assets(self.layer)

    @property
    def needs(self) -> dict[str, int]:
        """The layer of each other kind of signal that decoding needs."""
        return self.form.needs(self.layer)


@dataclass(frozen=True)
class CapturedSignal:
    """A signal as `data/manifests/<teacher>/` names it.

    Attributes:
        name: The signal's name.
        kind: Its kind.
        layer: Its layer; None for logits.
        form_name: Its form; `form` is the class.
        digest: The digest of its values.
        needs: The layer of each other kind of signal that decoding needs.
        origin: The package that provides the form; None for a built-in form.
    """

    name: str
    kind: str
    layer: int | None
    form_name: str
    digest: str
    needs: dict[str, int]
    origin: Origin | None

    @property
    def form(self) -> type[Form]:
        """The class of the form.

        Raises:
            ConfigError: If the package that gave it is not installed.
        """
        return FORMS.require(f"{self.kind}.{self.form_name}", self.origin)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "CapturedSignal":
        """Read what `manifest_record` returned."""
        origin = record.get("origin")
        return cls(
            record["signal"],
            record["kind"],
            record["layer"],
            record["form"],
            record["digest"],
            record.get("needs", {}),
            None if origin is None else Origin(**origin),
        )


def manifest_record(signal: Signal, digest: str) -> dict[str, Any]:
    """Return the JSON values of a captured signal for `data/manifests/<teacher>/`."""
    origin = origin_of(signal.form)
    return {
        "signal": signal.name,
        "kind": signal.kind,
        "layer": signal.layer,
        "form": signal.form.name,
        "digest": digest,
        **({"needs": signal.needs} if signal.needs else {}),
        **({} if origin is None else {"origin": origin.model_dump()}),
    }


def dotted(name: str) -> str:
    """Return the signal's name as one file name, without suffix."""
    return name.replace("/", ".")
