"""The files whose code a module runs, found by reading import statements; nothing is imported.

Python also loads by name, so strings count: the dotted name of one of our packages stands for every
module in it, as `pipeline.registry` loads them; the name of a group of entry points for the modules
that other installed packages register in it; and the name of a file in the module's own folder for
that file.
"""

import ast
import hashlib
import importlib.util
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple

GROUPS = "decant."
"""How the names of decant's groups of entry points begin."""


class _Source(NamedTuple):
    """One file: its digest, the modules that it imports, and all of its strings."""

    sha256: str
    imports: set[str]
    strings: set[str]


class SourceCode:
    """The source files of some installed packages, and of those that register parts for them.

    Each file is read once.

    Args:
        packages: Names of top-level packages. Imports of any other package are not followed.
    """

    def __init__(self, packages: Iterable[str]) -> None:
        installed = entry_points()
        self._registered = {
            group: list(installed.select(group=group))
            for group in installed.groups
            if group.startswith(GROUPS)
        }
        theirs = (_top(entry.module) for group in self._registered.values() for entry in group)
        self._homes = {name: home for name in (*packages, *theirs) if (home := _home(name))}
        self._source = cache(_read_source)
        self._data_files = cache(_read_data_files)

    def digests(self, module: str) -> list[str]:
        """Return a line for each file that a module and its imports run, sorted by path.

        A line is the file's SHA-256, two spaces and its path below the folder of its top-level
        package. A last line for each entry point names the package that registers it.

        Raises:
            SyntaxError: If a file is not Python.
        """
        digests: dict[str, str] = {}
        entries: set[str] = set()
        waiting, seen = [module], set[str]()
        while waiting:
            name = waiting.pop()
            path = self._path(name)
            if path is None or name in seen:
                continue
            seen.add(name)
            source, folder = self._source(path), path.parent.relative_to(self._homes[_top(name)])
            digests[(folder / path.name).as_posix()] = source.sha256
            for file_name, sha256 in self._data_files(path.parent).items():
                if file_name in source.strings:
                    digests[(folder / file_name).as_posix()] = sha256
            # Importing a module runs the packages that hold it.
            waiting += [name.rpartition(".")[0], *source.imports]
            for text in source.strings:
                waiting += self._modules(text)
                for entry in self._registered.get(text, ()):
                    waiting.append(entry.module)
                    entries.add(_line(entry))
        return [*(f"{digests[name]}  {name}" for name in sorted(digests)), *sorted(entries)]

    def _path(self, module: str) -> Path | None:
        """Return the file of a module; None if none of our packages has it."""
        home = self._homes.get(_top(module))
        if home is None:
            return None
        place = home.joinpath(*module.split("."))
        candidates = (place / "__init__.py", place.with_suffix(".py"))
        return next((path for path in candidates if path.is_file()), None)

    def _modules(self, text: str) -> Iterator[str]:
        """Yield the modules of the package whose dotted name a text is, if it is one."""
        is_dotted = "." in text and text.replace(".", "").isidentifier()
        path = self._path(text) if is_dotted else None
        if path is not None and path.name == "__init__.py":
            yield from (f"{text}.{file.stem}" for file in path.parent.glob("*.py"))


def _top(module: str) -> str:
    return module.split(".")[0]


def _home(package: str) -> Path | None:
    """Return the folder in which an installed package is; None if it has no source file."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin)
    return path.parents[1] if path.name == "__init__.py" else path.parent


def _read_source(path: Path) -> _Source:
    content = path.read_bytes()
    imports, strings = set[str](), set[str]()
    for node in ast.walk(ast.parse(content)):
        if isinstance(node, ast.Import):
            imports |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            imports |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            strings.add(node.value)
    return _Source(hashlib.sha256(content).hexdigest(), imports, strings)


def _read_data_files(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of a folder that is no module, by its name."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.suffix != ".py" and path.is_file()
    }


def _line(entry: Any) -> str:
    # An `EntryPoint` of `importlib.metadata`, or of its backport where a package installs that.
    package = "unknown" if entry.dist is None else f"{entry.dist.name} {entry.dist.version}"
    return f"{package}: {entry.group} {entry.name} = {entry.value}"
