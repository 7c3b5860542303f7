"""What `make` says before anything is installed: no .git, no Python, a Python too old."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make on PATH")


def make(folder: Path, *arguments: str, **extra: str) -> subprocess.CompletedProcess:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copyfile(ROOT / name, folder / name)
    return subprocess.run(
        ["make", *arguments],
        cwd=folder,
        env={"PATH": os.environ["PATH"], **extra},
        capture_output=True,
        text=True,
        check=False,
    )


def error_line(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    return line


def test_a_python_too_old_is_named_before_anything_is_installed(tmp_path):
    old = tmp_path / "python3.9"
    old_version = "import sys; sys.version_info = (3, 9, 1); exec(sys.argv[1])"
    old.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{old_version}' \"$2\"\n")
    old.chmod(0o755)
    line = error_line(make(tmp_path, "install", f"PYTHON={old}"))
    assert line.startswith("error: Python 3.9 found, 3.11 or newer expected; run make PYTHON=")
    assert not (tmp_path / ".venv").exists()


def test_no_python_is_named(tmp_path):
    line = error_line(make(tmp_path, "install", "PYTHON=nowhere-python"))
    assert "no nowhere-python on PATH, Python 3.11 or newer expected" in line


def test_no_git_is_named_before_anything_is_installed(tmp_path):
    line = error_line(make(tmp_path, "repro", GIT_CEILING_DIRECTORIES=str(tmp_path.parent)))
    assert line.startswith("error: no .git here, and DVC needs one; git clone the project")
    assert not (tmp_path / ".venv").exists()
