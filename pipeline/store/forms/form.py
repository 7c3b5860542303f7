"""What a form is: how a signal's values become the arrays that are stored, and back.

A form is written against the array namespace of its argument, so the same lines encode and
decode numpy arrays and torch tensors, on any device. It quantises in plain integers and floats that
every Zarr reader knows; compression is the store's business.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Protocol, TypeAlias, runtime_checkable

from pipeline.axes import Axis
from pipeline.provenance import fingerprint

Array: TypeAlias = Any
"""A numpy array or a torch tensor; forms never ask which."""
BLOCK_VALUES = 2**16
"""256 KiB of float32: with a temporary or two of that size it stays in a core's cache."""


def row_blocks(values: Array, block_values: int = BLOCK_VALUES) -> Iterator[slice]:
    """Yield rows in blocks that a CPU's cache holds; all at once on another device.

    A step of arithmetic is a pass over memory, and that is most of what quantising costs. What is
    computed row by row does not depend on the blocks. Of no rows there is one block.
    """
    rows = values.shape[0]
    step = max(1, block_values // max(1, math.prod(values.shape[1:])))
    if str(values.device) != "cpu":
        step = max(1, rows)
    for first in range(0, max(1, rows), step):
        yield slice(first, min(rows, first + step))


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
    """One stored array: its dtype, the shape of one row, and what the axes of a row are called.

    Arrays of one Zarr group that share an axis's name have the same size there. Names are for
    readers of the Zarr files; no value depends on them, so they are not compared.
    """

    dtype: str
    row_shape: tuple[int, ...]
    row_axes: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Error:
    """How far decoded values are off and how far they may be, two arrays that broadcast."""

    found: Array
    stated: Array


@runtime_checkable
class Form(Protocol):
    """A frozen dataclass whose fields are the user's options; they enter the signal's identity.

    `version` rises whenever the stored bytes of the same values change. `encode` takes and `decode`
    returns named arrays whose first axis is the form's `axis`. A form may say `shows_nonfinite =
    True`: a row of values that are not finite then has a stored float that is not, so that the
    capture need not look through the values themselves.
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
