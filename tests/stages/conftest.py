"""One project in miniature that every stage has run in; tests that change it take a copy."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from stages.cli import main
from tests.cases import tiny_params, write_corpus, write_params

Decant = Callable[..., Result]
ALL = (
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
)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments), catch_exceptions=False)


@pytest.fixture(scope="session")
def decant() -> Decant:
    """Return a function that runs one command; an unexpected exception fails the test."""
    return run


@pytest.fixture(scope="session")
def poured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a project after all stages but the report."""
    folder = tmp_path_factory.mktemp("poured")
    params = tiny_params()
    del params["students"]["soft"]
    write_corpus(folder / "corpus.txt")
    write_params(folder, params)
    with contextlib.chdir(folder):
        for arguments in ALL:
            result = run(*arguments)
            assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[Path]:
    """Enter a project in which nothing has run."""
    write_corpus(tmp_path / "corpus.txt")
    write_params(tmp_path, tiny_params())
    with contextlib.chdir(tmp_path):
        yield tmp_path


@pytest.fixture
def project(poured: Path, tmp_path: Path) -> Iterator[Path]:
    """Enter a copy of the project in which everything has run."""
    folder = tmp_path / "project"
    shutil.copytree(poured, folder)
    with contextlib.chdir(folder):
        yield folder
