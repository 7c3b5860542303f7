"""A whole store, written once a session, and copies of it to damage."""

import os
import shutil
from pathlib import Path

import pytest

from tests.store.synthetic import Synthetic


@pytest.fixture(scope="session")
def whole_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed. Written without syncing: power is not what these tests cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        return Synthetic(tmp_path_factory.mktemp("store") / "whole").run()


@pytest.fixture
def store(whole_store: Path, tmp_path: Path) -> Path:
    """A copy of the whole store to damage."""
    return shutil.copytree(whole_store, tmp_path / "store", symlinks=True)


@pytest.fixture
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write without syncing, where only order and content are tested."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
