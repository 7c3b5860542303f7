"""Each DVC stage depends on exactly the files that its module imports, directly or not.

With too few, DVC keeps a stale result after a change; with too many, editing the report re-runs the
teacher. The import graph here is grimp's, and the registries are asked themselves for what they
load; `pipeline.source_code` reads neither.
"""

from importlib import import_module
from pathlib import Path

import grimp
import pytest
from ruamel.yaml import YAML

from pipeline.registry import Registry
from pipeline.source_code import SourceCode
from stages.cli import STAGES, module_name

ROOT = Path(__file__).parents[2]
PIPELINE = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"]
DATA_FILES = {"pipeline.report.page": ["pipeline/report/template.html.j2"]}
STORE_ALONE = ("pipeline.teacher", "pipeline.generation")
FORBIDDEN = {
    "prepare": ("pipeline.store", "pipeline.student", "pipeline.evaluate", "pipeline.report"),
    "tokenize": ("pipeline.store", "pipeline.student", "pipeline.evaluate", "pipeline.report"),
    "teach": ("pipeline.student", "pipeline.evaluate", "pipeline.report"),
    "generate": ("pipeline.student", "pipeline.evaluate", "pipeline.report"),
    "capture": ("pipeline.student", "pipeline.evaluate", "pipeline.planning"),
    "select": (*STORE_ALONE, "pipeline.corpus", "pipeline.report", "pipeline.planning"),
    "train": (*STORE_ALONE, "pipeline.evaluate", "pipeline.report"),
    "evaluate-teacher": ("pipeline.student", "pipeline.report", "pipeline.planning"),
    "evaluate": ("pipeline.report", "pipeline.planning"),
    "report": ("pipeline.student", "pipeline.planning", "pipeline.taps", "pipeline.training"),
}
"""Rooms whose edits must not re-run a stage."""


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    graph = grimp.build_graph("pipeline", "stages")
    for module in graph.find_modules_that_directly_import("pipeline.registry"):
        for value in vars(import_module(module)).values():
            if isinstance(value, Registry):
                for part in graph.find_children(value.package):
                    graph.add_import(importer=module, imported=part)
    return graph


def closure(graph: grimp.ImportGraph, module: str) -> set[str]:
    modules = {module} | graph.find_upstream_modules(module)
    # Importing a module runs the packages that hold it.
    packages = {".".join(m.split(".")[:i]) for m in modules for i in range(1, m.count(".") + 1)}
    return modules | packages


def module_file(module: str) -> str:
    path = Path(*module.split("."))
    is_package = (ROOT / path).is_dir()
    return str(path / "__init__.py" if is_package else path.with_suffix(".py"))


@pytest.mark.parametrize("name", STAGES)
def test_the_files_of_a_stage_are_its_import_closure(graph, name):
    modules = closure(graph, module_name(name))
    files = {module_file(module) for module in modules}
    files |= {file for module in modules for file in DATA_FILES.get(module, ())}
    lines = SourceCode(["pipeline", "stages"]).digests(module_name(name))
    assert {line.split("  ")[1] for line in lines} == files


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_depends_on_its_own_files_and_on_no_other_code(name):
    stage = PIPELINE[name].get("do", PIPELINE[name])
    deps = [dep for dep in stage["deps"] if not dep.startswith("data/") or "data/code" in dep]
    assert deps == [f"data/code/{name}.txt"]


@pytest.mark.parametrize("name", FORBIDDEN)
def test_a_stage_stays_out_of_rooms_whose_edits_are_not_its_own(graph, name):
    modules = closure(graph, module_name(name))
    assert not {module for module in modules if module.startswith(FORBIDDEN[name])}
