"""A package installed next to ours: a module and its metadata on `sys.path`, as pip leaves them."""

import sys
from importlib import invalidate_caches
from pathlib import Path

import pytest


def install_package(
    monkeypatch: pytest.MonkeyPatch,
    site: Path,
    *,
    name: str,
    code: str,
    entries: dict[str, dict[str, str]],
    version: str = "1.0",
) -> None:
    """Write a package into the directory `site` and put that on `sys.path`.

    Args:
        monkeypatch: Undoes it.
        site: A directory of the test's own.
        name: The package's name; its module has underscores for hyphens.
        code: The module's source.
        entries: For each group of entry points, from their names to `module:object`.
        version: The package's version.
    """
    module = name.replace("-", "_")
    (site / f"{module}.py").write_text(code, encoding="utf-8")
    metadata = site / f"{module}-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8"
    )
    lines = [
        line
        for group, parts in entries.items()
        for line in (f"[{group}]", *(f"{part} = {value}" for part, value in parts.items()))
    ]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    monkeypatch.syspath_prepend(site)
    invalidate_caches()
    monkeypatch.delitem(sys.modules, module, raising=False)
