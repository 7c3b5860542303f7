"""The code dependencies of each DVC stage are exactly the files its module imports, however far.

Too few, and DVC keeps a stale result after a change; too many, and editing the report re-runs the
teacher.
"""

import re
from pathlib import Path

import grimp
import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[2]
STAGES = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"]
DATA_FILES = {"pipeline.report.page": ["pipeline/report/template.html.j2"]}


def module_file(module: str) -> str:
    path = Path(*module.split("."))
    is_package = (ROOT / path).is_dir()
    return str(path / "__init__.py" if is_package else path.with_suffix(".py"))


def import_closure(module: str) -> set[str]:
    graph = grimp.build_graph("pipeline", "stages")
    modules: set[str] = set()
    found = {module}
    while found:
        modules |= found
        for name in found.copy():
            found |= graph.find_upstream_modules(name) | discovered(name, graph)
        found -= modules
    # Importing a module runs the packages that hold it.
    packages = {".".join(m.split(".")[:i]) for m in modules for i in range(1, m.count(".") + 1)}
    data = {name for m in modules for name in DATA_FILES.get(m, ())}
    return {module_file(m) for m in modules | packages} | data


def discovered(module: str, graph: grimp.ImportGraph) -> set[str]:
    """The modules that a `Registry(..., package="...")` of this module imports by name."""
    code = (ROOT / module_file(module)).read_text()
    packages = re.findall(r'\bRegistry\([^)]*?package="([\w.]+)"', code)
    return {name for package in packages for name in graph.find_children(package)}


def declared(stage: dict) -> set[str]:
    code = [d for d in stage["deps"] if d.startswith(("pipeline", "stages"))]
    files: set[str] = set()
    for name in code:
        path = ROOT / name
        found = [path] if path.is_file() else [*path.rglob("*.py"), *path.rglob("*.j2")]
        files |= {str(file.relative_to(ROOT)) for file in found}
    return files


@pytest.mark.parametrize("name", STAGES)
def test_code_deps_are_the_import_closure(name: str):
    stage = STAGES[name].get("do", STAGES[name])
    module = stage["cmd"].split()[2]
    want, have = import_closure(module), declared(stage)
    assert have >= want, f"add to deps of {name!r}: {sorted(want - have)}"
    assert have <= want, f"remove from deps of {name!r}: {sorted(have - want)}"
