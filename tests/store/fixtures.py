"""A whole store, written once a session, and copies of it to damage."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.store.synthetic import Synthetic


@contextmanager
def without_sync() -> Iterator[None]:
    """Write without syncing, where power is not what a test cuts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="session")
def whole_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    with without_sync():
        return Synthetic(tmp_path_factory.mktemp("store") / "whole").run()


@pytest.fixture
def store(whole_store: Path, tmp_path: Path) -> Path:
    """A copy of the whole store to damage."""
    return shutil.copytree(whole_store, tmp_path / "store", symlinks=True)


@pytest.fixture
def unsynced() -> Iterator[None]:
    """Write without syncing, where only order and content are tested."""
    with without_sync():
        yield
