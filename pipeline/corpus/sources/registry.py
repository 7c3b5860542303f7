"""All corpus sources by their kind, and the type of the parameter `corpus.source`."""

import json
from collections.abc import Callable
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, SerializeAsAny, TypeAdapter, WrapValidator

from pipeline.corpus.sources.base import Reading, SourceConfig
from pipeline.registry import Registry


def _kind(part: Any) -> str | None:
    """Return the kind of a class of sources; a base class has none."""
    if not (isinstance(part, type) and issubclass(part, SourceConfig)):
        return None
    kind = part.model_fields.get("kind")
    return None if kind is None else kind.default


SOURCES: Registry[type[SourceConfig]] = Registry(
    "corpus source", package="pipeline.corpus.sources", group="decant.sources", name_of=_kind
)


def _validated(value: Any, handler: Callable[[Any], SourceConfig]) -> SourceConfig:
    """Validate a section by the class of its kind, which may be another package's."""
    if not isinstance(value, dict):
        return handler(value)
    kind = value.get("kind")
    adapter: TypeAdapter[SourceConfig] = TypeAdapter(_Ours)
    if isinstance(kind, str) and SOURCES.origin(kind) is not None:
        adapter = TypeAdapter(SOURCES[kind])
    # As JSON: there a list is a tuple and an integer a float, and nothing else is lenient.
    return adapter.validate_json(json.dumps(value, default=str), strict=True)


if TYPE_CHECKING:
    _Ours = CorpusSource = SourceConfig
else:
    _Ours = Annotated[reduce(or_, SOURCES.ours.values()), Field(discriminator="kind")]
    CorpusSource = Annotated[SerializeAsAny[_Ours], WrapValidator(_validated)]


def provenance(source: SourceConfig, reading: Reading) -> dict[str, Any]:
    """Return a reading's provenance, with the package that gave the source if it is another's."""
    origin = SOURCES.origin(str(getattr(source, "kind", "")))
    given_by = {} if origin is None else {"given_by": origin.model_dump()}
    return {**reading.provenance, **given_by}
