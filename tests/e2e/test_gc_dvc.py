"""gc asks what DVC itself wrote: experiments that ran and experiments that wait in its queue."""

import sys
from pathlib import Path

import pytest

from pipeline.store.upkeep.revisions import named_signals
from tests.e2e.test_dvc import commit, run

pytestmark = pytest.mark.e2e
PIPELINE = f"""
stages:
  capture:
    cmd: {sys.executable} capture.py
    params: [layer]
    outs:
      - data/manifests/main:
          cache: false
          persist: true
"""
CAPTURE = """
import json, pathlib
folder = pathlib.Path("data/manifests/main")
folder.mkdir(parents=True, exist_ok=True)
layer = pathlib.Path("params.yaml").read_text().split()[1]
(folder / "a.json").write_text(json.dumps({"store": "s", "signal": "hidden/" + layer}))
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    run(tmp_path, "git", "init", "-q")
    run(tmp_path, "dvc", "init", "-q")
    (tmp_path / "dvc.yaml").write_text(PIPELINE)
    (tmp_path / "capture.py").write_text(CAPTURE)
    (tmp_path / "params.yaml").write_text("layer: 1\n")
    run(tmp_path, "dvc", "repro", "-q")
    commit(tmp_path, "run")
    return tmp_path


def test_experiments_are_asked_before_and_after_they_ran(project: Path) -> None:
    assert named_signals([project]).signals == {"s": {"hidden/1"}}
    run(project, "dvc", "exp", "run", "-q", "-n", "two", "-S", "layer=2")
    run(project, "git", "checkout", "-q", ".")
    assert named_signals([project]).signals == {"s": {"hidden/1", "hidden/2"}}
    # What is queued names what its workspace did: it has captured nothing of its own yet.
    (project / "data/manifests/main/a.json").write_text('{"store": "s", "signal": "hidden/7"}')
    for layer in (3, 4):
        run(project, "dvc", "exp", "run", "-q", "--queue", "-S", f"layer={layer}")
    run(project, "git", "checkout", "-q", ".")
    assert named_signals([project]).signals == {"s": {"hidden/1", "hidden/2", "hidden/7"}}
    run(project, "dvc", "exp", "remove", "-q", "two")
    assert named_signals([project]).signals == {"s": {"hidden/1", "hidden/7"}}
