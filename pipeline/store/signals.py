"""A signal is one layer's kind of feature in one form, as in `hidden/8/int8-1f3a9c02`."""

from dataclasses import dataclass

from pipeline.store.forms.form import Form, identity


@dataclass(frozen=True)
class Signal:
    """What is captured: kind, layer (None for logits) and form."""

    kind: str
    layer: int | None
    form: Form

    @property
    def name(self) -> str:
        """The signal's identity, which is also its path below `features.zarr`."""
        place = self.kind if self.layer is None else f"{self.kind}/{self.layer}"
        return f"{place}/{identity(self.form)}"


def dotted(name: str) -> str:
    """Return the signal's name as one file name, without suffix."""
    return name.replace("/", ".")
