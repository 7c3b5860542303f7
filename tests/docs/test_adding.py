"""The examples of `docs/adding.md` as an installed package, in a complete pipeline."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from pipeline.provenance import read_json
from tests.cases import tiny_params, write_params
from tests.docs.pages import ROOT, fences

PAGE = "docs/adding.md"
PACKAGE = {"package": "decant-extras", "version": "0.3"}
TEXT = ". ".join(f"the {n} birds sing {n * n} songs in tree {n % 7}" for n in range(400))
STAGES = (
    ("check",),
    ("prepare",),
    ("tokenize", "main"),
    ("teach", "main"),
    ("generate", "main"),
    ("capture", "main"),
    ("select", "aligned"),
    ("train", "aligned"),
    ("evaluate-teacher", "main"),
    ("evaluate", "aligned"),
    ("report",),
)
RUN = """
import json, sys
from stages.cli import main
for arguments in json.loads(sys.argv[1]):
    try:
        main(arguments)
    except SystemExit as end:
        if end.code:
            raise
"""


def install(site: Path) -> None:
    """Write the page's modules and the metadata that pip would write of its table."""
    package = site / "decant_extras"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    for fence in fences("python"):
        if fence.page == PAGE:
            header, _, code = fence.text.partition("\n")
            (site / header.removeprefix("# ")).write_text(code, encoding="utf-8")
    (table,) = [fence.text for fence in fences("toml") if fence.page == PAGE]
    groups = tomllib.loads(table)["project"]["entry-points"]
    lines = [
        line
        for group, parts in groups.items()
        for line in (f"[{group}]", *(f"{name} = {place}" for name, place in parts.items()))
    ]
    metadata = site / f"decant_extras-{PACKAGE['version']}.dist-info"
    metadata.mkdir()
    (metadata / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {PACKAGE['package']}\nVersion: {PACKAGE['version']}\n",
        encoding="utf-8",
    )


def decant(
    folder: Path, site: Path | None, *stages: tuple[str, ...]
) -> subprocess.CompletedProcess:
    """Run commands in one process, with the package or without it."""
    path = os.pathsep.join(str(place) for place in (site, ROOT) if place is not None)
    return subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(stages)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> tuple[Path, Path]:
    """Return a project after all stages, and where its package is."""
    folder, site = tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("site")
    install(site)
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    params = tiny_params()
    params["corpus"]["source"] = {"kind": "sentences", "file": "text.txt"}
    params["teachers"]["main"]["capture"]["hidden"]["form"] = "int16"
    del params["students"]["soft"]
    params["students"]["aligned"]["loss"]["feature"]["loss"] = "huber"
    params["evaluate"]["score"] = "bits_per_token"
    write_params(folder, params)
    done = decant(folder, site, *STAGES)
    assert done.returncode == 0, done.stderr
    return folder, site


def test_a_pipeline_runs_with_parts_of_another_package(project):
    folder, _ = project
    metrics = read_json(folder / "data/metrics/students/aligned.json")
    assert metrics["test_score"] == metrics["test_bits_per_token"]
    assert "test_bits_per_token" in (folder / "data/reports/metrics.json").read_text()
    assert "bits a token" in (folder / "data/reports/index.html").read_text()
    curve = (folder / "data/metrics/curves/aligned.csv").read_text().splitlines()
    assert "feature" in curve[0]


def test_what_the_parts_made_names_the_package(project):
    folder, _ = project
    corpus = read_json(folder / "data/corpus/text/corpus.json")
    assert corpus["source"]["given_by"] == PACKAGE
    for made in ("manifests/main/hidden.*.json", "students/aligned/*.json"):
        texts = [path.read_text() for path in (folder / "data").glob(made)]
        assert any(PACKAGE["package"] in text for text in texts), made


def test_without_the_package_its_name_is_told(project):
    folder, _ = project
    (store,) = (folder / "data/stores").iterdir()
    done = decant(folder, None, ("verify", str(store)))
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "decant-extras is not installed" in line
    assert "pip install decant-extras==0.3" in line
    assert "Traceback" not in done.stderr
