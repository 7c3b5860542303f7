"""Earlier versions of forms: a store written with one is read for ever; nothing new is.

A signal's name holds its form's version, so a capture that asks for the form makes a new signal
beside the old one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from array_api_compat import array_namespace

from pipeline.store.forms.form import Array, Channels, Geometry, Part
from pipeline.store.forms.ids import gaps_of, ids_of
from pipeline.store.forms.sampled import Sampled
from pipeline.store.forms.topk import TopK

GAPS, IDS = "id_gaps", "ids"


def _with_ids(encoded: Mapping[str, Array]) -> dict[str, Array]:
    xp, gaps = array_namespace(encoded[GAPS]), encoded[GAPS]
    others = {key: value for key, value in encoded.items() if key != GAPS}
    return {IDS: xp.astype(ids_of(gaps), gaps.dtype)} | others


def _with_gaps(parts: Mapping[str, Array]) -> dict[str, Array]:
    xp, ids = array_namespace(parts[IDS]), parts[IDS]
    others = {key: value for key, value in parts.items() if key != IDS}
    # The vocabulary only decides the type, which decoding does not look at.
    return {GAPS: gaps_of(xp.astype(ids, xp.int64), vocab=2**32)} | others


@dataclass(frozen=True)
class TopK1(TopK):
    """Version 1: ids as they are."""

    version: ClassVar[int] = 1

    def parts(self, geometry: Geometry) -> dict[str, Part]:
        """As version 2, under the older name."""
        return {IDS if key == GAPS else key: part for key, part in super().parts(geometry).items()}

    def encode(self, values: Mapping[str, Array], channels: Channels | None) -> dict[str, Array]:
        """As version 2, but for the ids."""
        return _with_ids(super().encode(values, channels))

    def decode(self, parts: Mapping[str, Array], channels: Channels | None) -> dict[str, Array]:
        """As version 2."""
        return super().decode(_with_gaps(parts), channels)


@dataclass(frozen=True)
class Sampled1(Sampled):
    """Version 1: ids as they are."""

    version: ClassVar[int] = 1

    def parts(self, geometry: Geometry) -> dict[str, Part]:
        """As version 2, under the older name."""
        return {IDS: super().parts(geometry)[GAPS]}

    def encode(self, values: Mapping[str, Array], channels: Channels | None) -> dict[str, Array]:
        """As version 2, but for the ids."""
        return _with_ids(super().encode(values, channels))

    def decode(self, parts: Mapping[str, Array], channels: Channels | None) -> dict[str, Array]:
        """As version 2."""
        return super().decode(_with_gaps(parts), channels)
