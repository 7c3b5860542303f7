"""Stores that no manifest names are found and removed; nothing else is."""

import shutil

import pytest

from pipeline.errors import ConfigError, IntegrityError, ResourceError
from pipeline.provenance import write_json
from pipeline.store.gc import REMOVED, remove_store, store_bytes, unreferenced_stores
from pipeline.store.lock import writer_lock


@pytest.fixture
def project(tmp_path):
    """Three stores: `used` by two teachers' manifests, `old`, and `begun` without any index."""
    for name in ("used", "old"):
        write_json(tmp_path / "stores" / name / "manifest.json", {})
        write_json(tmp_path / "stores" / name / "receipts" / "a.json", {"a": 1})
    with writer_lock(tmp_path / "stores" / "begun" / "lock"):
        pass
    for teacher in ("one", "two"):
        write_json(tmp_path / "manifests" / teacher / "store.json", {"store": "used"})
    return tmp_path


def names(project):
    return [p.name for p in unreferenced_stores(project / "stores", project / "manifests")]


def test_only_stores_that_no_manifest_names_are_listed(project):
    (project / "stores" / "notes").mkdir()
    (project / "stores" / "file").write_text("")
    (project / "stores" / "link").symlink_to(project / "stores" / "old")
    assert names(project) == ["begun", "old"]


def test_nothing_is_listed_where_there_is_nothing(tmp_path):
    assert unreferenced_stores(tmp_path / "stores", tmp_path / "manifests") == []


@pytest.mark.parametrize("text", ["{", '{"signal": "hidden/1"}', "[]"])
def test_a_manifest_that_cannot_be_read_is_no_reason_to_remove_its_store(project, text):
    (project / "manifests" / "two" / "store.json").write_text(text)
    with pytest.raises(IntegrityError, match=r"two.store\.json"):
        names(project)


def test_a_store_is_removed_whole(project):
    size = store_bytes(project / "stores" / "old")
    assert size > 0
    assert remove_store(project / "stores" / "old") == size
    assert names(project) == ["begun"]
    assert sorted(p.name for p in (project / "stores").iterdir()) == ["begun", "used"]


def test_a_store_that_is_being_written_stays(project):
    with (
        writer_lock(project / "stores" / "old" / "lock"),
        pytest.raises(ResourceError, match="is writing this store"),
    ):
        remove_store(project / "stores" / "old")
    assert (project / "stores" / "old" / "manifest.json").exists()


def test_readers_lose_the_store_before_its_files(project, monkeypatch):
    """Cut short, the removal leaves no index in place, and the rest is found again."""

    def killed(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove_store(project / "stores" / "old")
    monkeypatch.undo()
    assert not (project / "stores" / "old").exists()
    [left] = [name for name in names(project) if name.startswith(REMOVED)]
    remove_store(project / "stores" / left)
    assert names(project) == ["begun"]


@pytest.mark.parametrize("name", ["notes", "absent"])
def test_what_is_no_store_is_not_removed(project, name):
    (project / "stores" / "notes").mkdir()
    with pytest.raises(ConfigError, match="not a store"):
        remove_store(project / "stores" / name)
