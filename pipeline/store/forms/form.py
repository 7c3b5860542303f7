"""What a form is: how a signal's values become the arrays that are stored, and back.

A form is written against the array namespace of its argument, so the same lines encode and
decode numpy arrays and torch tensors, on any device. It quantises in plain integers and floats that
every Zarr reader knows; compression is the store's business.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol, TypeAlias, runtime_checkable

from pipeline.axes import Axis
from pipeline.provenance import fingerprint

Array: TypeAlias = Any
"""A numpy array or a torch tensor; forms never ask which."""


@dataclass(frozen=True)
class Geometry:
    """Sizes of what a signal holds; a size that does not apply is 0."""

    width: int = 0
    heads: int = 0
    kv_heads: int = 0
    d_head: int = 0
    vocab: int = 0


@dataclass(frozen=True)
class Channels:
    """Mean and deviation of every channel over a fixed sample, in the namespace of the values."""

    mean: Array
    deviation: Array


@dataclass(frozen=True)
class Part:
    """One stored array of a signal: its dtype and the shape of one row."""

    dtype: str
    row_shape: tuple[int, ...]


@dataclass(frozen=True)
class Error:
    """How far decoded values are off and how far they may be, two arrays that broadcast."""

    found: Array
    stated: Array


@runtime_checkable
class Form(Protocol):
    """A frozen dataclass whose fields are the user's options; they enter the signal's identity.

    `version` rises whenever the stored bytes of the same values change. `encode` takes and `decode`
    returns named arrays whose first axis is the form's `axis`.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    kind: ClassVar[str]
    axis: ClassVar[Axis]
    needs_channels: ClassVar[bool]

    def parts(self, geometry: Geometry) -> dict[str, Part]:
        """Return the arrays this form stores for a signal of these sizes."""
        ...

    def encode(self, values: Mapping[str, Array], channels: Channels | None) -> dict[str, Array]:
        """Turn float values into the stored arrays."""
        ...

    def decode(self, parts: Mapping[str, Array], channels: Channels | None) -> dict[str, Array]:
        """Turn stored arrays back into float32 values, within the form's stated error."""
        ...

    def errors(
        self, values: Mapping[str, Array], decoded: Mapping[str, Array], channels: Channels | None
    ) -> dict[str, Error]:
        """Hold decoded values against the true ones: the error found and the one stated, by name.

        This is where a form states its error; `decant verify --deep` asks it of real features.
        """
        ...


def options(form: Form) -> dict[str, Any]:
    """Return the form's options as JSON values."""
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in asdict(form).items()  # pyright: ignore[reportArgumentType]
    }


def identity(form: Form) -> str:
    """Return the form's name with a hash of its options and version, as in `int8-1f3a9c02`."""
    stamp = fingerprint({"name": form.name, "version": form.version, "options": options(form)})
    return f"{form.name}-{stamp[:8]}"
