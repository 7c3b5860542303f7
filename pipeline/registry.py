"""Parts by name: forms, losses, sources and scores, ours and those of other installed packages.

A part of ours is found by being defined in its folder; no list has to be kept in step. Another
package gives parts by entry points in its `pyproject.toml`:

    [project.entry-points."decant.losses"]
    "feature.huber" = "my_package:huber"

Entry points are read by name and loaded only when they are used.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any, Generic, TypeAlias, TypeVar, cast

from pydantic import BaseModel, ConfigDict

from pipeline.errors import ConfigError

T = TypeVar("T")
AnyEntryPoint: TypeAlias = Any
"""`EntryPoint` of `importlib.metadata`, or of its backport where a package installs that."""


class Origin(BaseModel):
    """The package that gives a part, and its version; both enter the fingerprints of its results.

    Attributes:
        package: The package's name on the index.
        version: Its installed version.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    package: str
    version: str


class Registry(Mapping[str, T], Generic[T]):
    """A mapping from names to parts of one sort.

    Args:
        noun: What one of them is called in errors, such as `loss`.
        package: The package of ours whose modules define parts, or a single module.
        group: The group of entry points in which other packages give parts.
        name_of: Returns the name of a part, and None for anything else in a module.
    """

    def __init__(
        self, noun: str, *, package: str, group: str, name_of: Callable[[Any], str | None]
    ) -> None:
        self.noun = noun
        self.package = package
        self.group = group
        self._name_of = name_of
        self._loaded: dict[str, T] = {}

    def __iter__(self) -> Iterator[str]:
        yield from self.ours
        yield from (name for name in sorted(self._theirs) if name not in self.ours)

    def __len__(self) -> int:
        return len(self.ours.keys() | self._theirs.keys())

    def __contains__(self, name: object) -> bool:
        return name in self.ours or name in self._theirs

    def __getitem__(self, name: str) -> T:
        """Return the part of this name.

        Raises:
            ConfigError: If there is none; if several packages give it; or if it cannot be loaded.
        """
        theirs = self._theirs.get(name, ())
        givers = [_origin(entry).package for entry in theirs]
        if len(givers) + (name in self.ours) > 1:
            names = ["decant"] * (name in self.ours) + givers
            raise ConfigError(
                f"{self.noun} {name!r}: given by {' and '.join(names)}, expected one package; "
                "uninstall the others"
            )
        if name in self.ours:
            return self.ours[name]
        if not theirs:
            raise ConfigError(
                f"{self.noun} {name!r} is unknown; expected one of {', '.join(self)}, or one of a "
                f"package that gives it as an entry point of {self.group}"
            )
        if name not in self._loaded:
            self._loaded[name] = self._load(name, theirs[0])
        return self._loaded[name]

    def origin(self, name: str) -> Origin | None:
        """Return which package gives a part; None for one of ours."""
        theirs = self._theirs.get(name)
        return None if name in self.ours or not theirs else _origin(theirs[0])

    def require(self, name: str, origin: Origin | None) -> T:
        """Return a part that something stored was made with.

        Raises:
            ConfigError: If the package that gave it is not installed; else as for `[]`.
        """
        if origin is not None and name not in self:
            raise ConfigError(
                f"{self.noun} {name!r}: the package {origin.package} is not installed, expected "
                f"version {origin.version}; pip install {origin.package}=={origin.version}"
            )
        return self[name]

    @cached_property
    def ours(self) -> dict[str, T]:
        """The parts that are defined in our folder."""
        folder = importlib.import_module(self.package)
        modules = [self.package]
        if hasattr(folder, "__path__"):
            names = sorted(info.name for info in pkgutil.iter_modules(folder.__path__))
            modules = [f"{self.package}.{name}" for name in names]
        parts: dict[str, T] = {}
        for module in map(importlib.import_module, modules):
            parts |= {name: part for name, part in self._defined_in(module) if name not in parts}
        return parts

    def _defined_in(self, module: ModuleType) -> Iterator[tuple[str, T]]:
        for value in vars(module).values():
            # A class that a module only imports is another module's part.
            if isinstance(value, type) and value.__module__ != module.__name__:
                continue
            name = self._name_of(value)
            if name is not None:
                yield name, cast("T", value)

    @cached_property
    def _theirs(self) -> dict[str, list[AnyEntryPoint]]:
        entries: dict[str, list[AnyEntryPoint]] = {}
        for entry in entry_points(group=self.group):
            entries.setdefault(entry.name, []).append(entry)
        return entries

    def _load(self, name: str, entry: AnyEntryPoint) -> T:
        origin = _origin(entry)
        giver = f"{self.noun} {name!r}: {entry.value} of the package {origin.package}"
        try:
            part = entry.load()
        except Exception as error:  # Whatever another package's import raises.
            raise ConfigError(
                f"{giver} cannot be loaded ({type(error).__name__}: {error}); repair or uninstall "
                "the package"
            ) from error
        if (called := self._name_of(part)) != name:
            raise ConfigError(
                f"{giver} is {'no ' + self.noun if called is None else repr(called)}, expected a "
                f"{self.noun} of that name; correct its entry point"
            )
        return part


def _origin(entry: AnyEntryPoint) -> Origin:
    # An entry point that was not read from an installed package belongs to none.
    if entry.dist is None:
        return Origin(package="unknown", version="unknown")
    return Origin(package=entry.dist.name, version=entry.dist.version)
