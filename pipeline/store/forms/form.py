"""The interface of a form, which encodes values of a signal as stored arrays and decodes them.

A form is written against the array namespace of its argument, so the same code encodes and decodes
numpy arrays and torch tensors, on any device. It quantises to plain integers and floats that every
Zarr reader knows. Compression is left to the store.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, ClassVar, TypeAlias

from pipeline.axes import Axis

Array: TypeAlias = Any
"""A numpy array or a torch tensor; forms do not distinguish them."""
BLOCK_VALUES = 2**16
"""256 KiB of float32, so that a block and one or two temporaries fit the cache of a core."""


def row_blocks(values: Array, block_values: int = BLOCK_VALUES) -> Iterator[slice]:
    """Yield slices along the first axis, in blocks that fit a CPU's cache; one on other devices.

    Each arithmetic operation is a pass over memory, which is most of the cost of quantising.
    Results that are computed row by row do not depend on the blocks. An empty array has one block.
    """
    rows = values.shape[0]
    step = max(1, block_values // max(1, math.prod(values.shape[1:])))
    if str(values.device) != "cpu":
        step = max(1, rows)
    for first in range(0, max(1, rows), step):
        yield slice(first, min(rows, first + step))


@dataclass(frozen=True)
class Geometry:
    """The sizes of a signal's values; a size that does not apply is 0."""

    width: int = 0
    heads: int = 0
    kv_heads: int = 0
    d_head: int = 0
    vocab: int = 0


@dataclass(frozen=True)
class Channels:
    """Mean and standard deviation of each channel, in the array namespace of the values."""

    mean: Array
    deviation: Array

    def standardise(self, values: Array) -> Array:
        """Subtract each channel's mean and divide by its deviation, in float32."""
        standardised = values - self.mean
        standardised /= self.deviation
        return standardised

    def restore(self, standardised: Array) -> Array:
        """Undo `standardise`."""
        return standardised * self.deviation + self.mean


@dataclass(frozen=True)
class ArrayType:
    """The type of a stored array: its dtype, and the shape and axis names of one row.

    Axes of the same name have the same size within a Zarr group. The names are for readers of the
    Zarr files; no value depends on them, so comparisons ignore them.
    """

    dtype: str
    row_shape: tuple[int, ...]
    row_axes: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Error:
    """The error of decoded values, and the largest error that the form allows; they broadcast."""

    found: Array
    stated: Array


class Tap(StrEnum):
    """What a form takes from the teacher's forward pass."""

    HIDDEN = "hidden"
    """`hidden`: the hidden states of a layer."""
    QUERY_KEY = "query_key"
    """`query` and `key` of a layer, as its attention multiplies them."""
    ATTENTION_MAP = "attention_map"
    """`probability`: the attention map of a layer, one row a visible pair."""
    VALUE = "value"
    """`value`: the attention values of a layer."""
    HEAD_INPUT = "head_input"
    """`head_input`: what the language-model head multiplies; the head is stored as an asset."""
    LOGITS = "logits"
    """`logits` of each token, or of each example where the form's axis is that of examples."""
    LAYER_BELOW = "layer_below"
    """Nothing: readers rebuild query and key from the hidden states of the layer below."""


class Content(StrEnum):
    """What readers get from a form. Losses are written for contents, not for forms."""

    HIDDEN = "hidden"
    """`hidden`: hidden states."""
    QUERY_KEY = "query_key"
    """`query` and `key`, from which maps are rebuilt and relations are made."""
    ATTENTION_MAP = "attention_map"
    """`probability`: attention maps, which hold no query and key."""
    VALUE = "value"
    """`value`: attention values."""
    LOGITS = "full"
    """All of the teacher's logits: stored, or rebuilt from `head_input`."""
    TOP_K = "topk"
    """`ids`, `log_probs` and `log_normalizer` of the most probable tokens."""
    SAMPLES = "sampled"
    """`samples`: ids drawn from the teacher's distribution at temperature 1."""


class Form(ABC):
    """How the values of one kind of signal are stored. Subclasses are frozen dataclasses.

    Their fields are the user's options, which enter the identity of a signal.

    Attributes:
        name: The form's name in `params.yaml`.
        kind: The kind of signal: hidden, attention, value or logits.
        version: Raised whenever the stored bytes of the same values change.
        axis: What one row of an array is: a token, an example, or a visible pair of tokens.
        tap: What `encode` takes from the teacher.
        content: What a reader gets.
        rank: Fidelity among the forms of a kind; the form of the lowest rank loses least. Where a
            student may use any form of a layer, this decides.
        ratio: Expected bytes on disk over bytes before compression: between those of the trained
            teachers of docs/forms.md, which differ by up to a tenth. 1 if nobody measured it.
        needs_channels: Whether encoding and decoding need the layer's channel statistics.
        shows_nonfinite: Whether a row with a value that is not finite has a stored float that is
            not finite, so that the capture need not search the values themselves.
    """

    name: ClassVar[str]
    kind: ClassVar[str]
    version: ClassVar[int] = 1
    axis: ClassVar[Axis] = Axis.TOKEN
    tap: ClassVar[Tap]
    content: ClassVar[Content]
    rank: ClassVar[int]
    ratio: ClassVar[float] = 1.0
    needs_channels: ClassVar[bool] = False
    shows_nonfinite: ClassVar[bool] = False

    @abstractmethod
    def arrays(self, geometry: Geometry) -> dict[str, ArrayType]:
        """Return the arrays that the form stores for a signal of these sizes."""

    @abstractmethod
    def encode(self, values: Mapping[str, Array], channels: Channels | None) -> dict[str, Array]:
        """Turn the float values that `tap` names into the stored arrays.

        The first axis of values and arrays is `axis`.
        """

    @abstractmethod
    def decode(self, arrays: Mapping[str, Array], channels: Channels | None) -> dict[str, Array]:
        """Turn stored arrays into the float32 values that `content` names."""

    def decode_standardised(self, arrays: Mapping[str, Array], channels: Channels) -> Array:
        """Return hidden states in deviations from each channel's mean, as the feature loss uses."""
        return channels.standardise(self.decode(arrays, channels)["hidden"])

    @abstractmethod
    def errors(
        self, values: Mapping[str, Array], decoded: Mapping[str, Array], channels: Channels | None
    ) -> dict[str, Error]:
        """Return the error found in each decoded array, and the largest error that the form states.

        `decant verify --deep` and `--teacher` hold real features against it.
        """

    @property
    def has_channels(self) -> bool:
        """Whether a signal comes with channel statistics: the feature loss standardises by them."""
        return self.needs_channels or self.content is Content.HIDDEN

    @property
    def temperatures_served(self) -> tuple[float, ...] | None:
        """The temperatures at which an output loss can use the form; None if it can at any."""
        return None

    @classmethod
    def variants(cls, temperatures: tuple[float, ...]) -> "list[Form]":
        """Return the form with the options that `decant plan --budget` compares.

        Args:
            temperatures: The temperatures of the students' output losses.
        """
        return [cls()]

    def needs(self, layer: int | None) -> dict[str, int]:
        """Return the layer of each other kind of signal that decoding needs."""
        return {}

    def assets(self, layer: int | None) -> tuple[str, ...]:
        """Return the names of the store's assets that decoding needs."""
        return ()

    def as_written_by(self, version: int) -> "Form | None":
        """Return the form that decodes what a version wrote; None if it can no longer be read."""
        return self if version == self.version else None


class StandardisedForm(Form):
    """A form that quantises standardised hidden states: readers of these need not restore them."""

    kind: ClassVar[str] = "hidden"
    tap: ClassVar[Tap] = Tap.HIDDEN
    content: ClassVar[Content] = Content.HIDDEN
    needs_channels: ClassVar[bool] = True

    @abstractmethod
    def decode_standardised(self, arrays: Mapping[str, Array], channels: Channels) -> Array:
        """Return the standardised values in float32."""

    def decode(self, arrays: Mapping[str, Array], channels: Channels | None) -> dict[str, Array]:
        """Return raw hidden states in float32."""
        assert channels is not None
        return {"hidden": channels.restore(self.decode_standardised(arrays, channels))}


def options(form: Form) -> dict[str, Any]:
    """Return a form's options as JSON values."""
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in asdict(form).items()  # pyright: ignore[reportArgumentType]
    }
