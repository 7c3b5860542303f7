"""Stores and signals that no manifest names are found and removed; nothing else is."""

import os
import shutil
from pathlib import Path

import pytest

from pipeline.errors import ConfigError, IncompatibleError, IntegrityError, ResourceError
from pipeline.provenance import write_json
from pipeline.store.index import index_asset, read_index, withdraw
from pipeline.store.layout import Layout
from pipeline.store.lock import writer_lock
from pipeline.store.reader import StoreReader
from pipeline.store.shards import file_digest
from pipeline.store.upkeep.gc import REMOVED, remove_signal, remove_store, store_bytes
from pipeline.store.upkeep.revisions import named_signals
from pipeline.store.upkeep.unneeded import unneeded
from tests.store.synthetic import SIGNALS, Synthetic, name_of
from tests.store.test_copy import content

INT8, HEAD = name_of("hidden", 2, "int8"), name_of("logits", None, "head")
FLOAT, BRAIN = name_of("hidden", 1, "float16"), name_of("hidden", 1, "bfloat16")

pytestmark = pytest.mark.usefixtures("unsynced")


@pytest.fixture
def project(tmp_path):
    """Three stores: `used` by two teachers' manifests, `old`, and `begun` without any index."""
    for name in ("used", "old"):
        write_json(tmp_path / "stores" / name / "manifest.json", {})
        write_json(tmp_path / "stores" / name / "receipts" / "a.json", {"a": 1})
    with writer_lock(tmp_path / "stores" / "begun" / "lock"):
        pass
    for teacher in ("one", "two"):
        write_json(tmp_path / "data/manifests" / teacher / "store.json", {"store": "used"})
    return tmp_path


def names(project):
    found = unneeded(project / "stores", named_signals([project]).signals)
    return [one.store.name for one in found if one.name is None]


def test_only_stores_that_no_manifest_names_are_listed(project):
    (project / "stores" / "notes").mkdir()
    (project / "stores" / "file").write_text("")
    (project / "stores" / "link").symlink_to(project / "stores" / "old")
    assert names(project) == ["begun", "old"]


def test_nothing_is_listed_where_there_is_nothing(tmp_path):
    assert unneeded(tmp_path / "stores", {"a": {"b"}}) == []


@pytest.mark.parametrize("text", ["{", '{"signal": "hidden/1"}', "[]"])
def test_a_manifest_that_cannot_be_read_is_no_reason_to_remove_its_store(project, text):
    (project / "data/manifests/two/store.json").write_text(text)
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


def rest(store: Path, needed: set[str]) -> dict[str | None, str]:
    return {one.name: one.reason for one in unneeded(store.parent, {store.name: needed})}


def test_signals_and_blocks_that_nobody_names_are_listed_with_their_bytes(store):
    layout = Layout(store)
    blocks = layout.assets / "blocks.safetensors"
    blocks.write_bytes(b"blocks")
    record = {"file": blocks.name, **file_digest(blocks, store), "layers": [1]}
    index_asset(layout, "blocks", record)
    assert rest(store, {*SIGNALS, "blocks"}) == {}
    unnamed = unneeded(store.parent, {store.name: set(SIGNALS) - {INT8}})
    assert [(one.name, one.reason) for one in unnamed] == [
        ("blocks", "no revision names it"),
        (INT8, "no revision names it"),
    ]
    assert all(one.holder is None for one in unnamed)
    before = store_bytes(store) - (store / "lock").stat().st_size - layout.index.stat().st_size
    # The bytes that were said, and the statistics of the layer, which go with its last form.
    freed = [one.remove() for one in unnamed]
    assert freed[0] == unnamed[0].bytes
    assert freed[1] > unnamed[1].bytes
    after = store_bytes(store) - (store / "lock").stat().st_size - layout.index.stat().st_size
    assert before - after - sum(freed) < 300  # the group of the layer
    assert rest(store, set(SIGNALS)) == {}


def test_a_removed_signal_leaves_the_others_as_they_were_and_may_come_back(store, whole_store):
    before = content(store)
    for name in (INT8, HEAD):
        assert remove_signal(store, name) > 0
        reader = StoreReader(store)
        assert name not in reader.signals
        with pytest.raises(IncompatibleError, match=f"no signal {name}; it has"):
            StoreReader(store, {name: "0" * 64})
        for number in range(len(reader.plan["segments"])):
            reader.read_segment(number, reader.signals)
    left = content(store)
    assert left.items() <= (before | {"manifest.json": left["manifest.json"]}).items()
    gone = before.keys() - left.keys()
    assert {"assets/channels/hidden.2.safetensors", "assets/lm_head.safetensors"} <= gone
    assert not any((store / "features.zarr" / place).exists() for place in ("hidden/2", INT8, HEAD))
    Synthetic(store).run()
    assert content(store) == content(whole_store)


def test_what_another_signal_needs_stays(store):
    remove_signal(store, FLOAT)
    assert Layout(store).channels("hidden", 1).is_file()
    assert (store / "features.zarr/hidden/1/zarr.json").is_file()
    remove_signal(store, BRAIN)
    assert not Layout(store).channels("hidden", 1).exists()


def test_statistics_of_a_pending_signal_stay(store):
    layout = Layout(store)
    withdraw(layout, BRAIN)
    remove_signal(store, FLOAT)
    assert layout.channels("hidden", 1).is_file()


class KilledError(BaseException):
    """Stands for a death of the process."""


@pytest.mark.parametrize("cut", range(0, 8, 2))
def test_a_removal_that_is_killed_leaves_a_store_that_reads_right(store, monkeypatch, cut):
    left = [cut]

    def dying(function):
        def call(*arguments, **keys):
            left[0] -= 1
            if left[0] < 0:
                raise KilledError
            return function(*arguments, **keys)

        return call

    with monkeypatch.context() as patch:
        for name in ("replace", "rename", "unlink", "mkdir"):
            patch.setattr(os, name, dying(getattr(os, name)))
        patch.setattr(shutil, "rmtree", dying(shutil.rmtree))
        try:
            remove_signal(store, HEAD)
        except KilledError:
            pass
        else:
            assert cut > 6
    reader = StoreReader(store)
    for number in range(len(reader.plan["segments"])):
        reader.read_segment(number, reader.signals)
    is_left = rest(store, set(SIGNALS) - {HEAD})
    assert set(is_left) <= {HEAD, "lm_head"}
    for name in is_left:
        assert name is not None
        remove_signal(store, name)
    Synthetic(store).run()
    assert StoreReader(store).signals == sorted(SIGNALS)


def test_what_is_no_signal_is_not_removed(store):
    with pytest.raises(IncompatibleError, match=r"no signal .*; it has attention/1"):
        remove_signal(store, "hidden/9/int8-00")
    with (
        writer_lock(store / "lock"),
        pytest.raises(ResourceError, match="is writing this store"),
    ):
        remove_signal(store, INT8)
    assert INT8 in read_index(Layout(store))["signals"]


def test_what_is_written_is_shown_with_its_holder(store):
    with writer_lock(store / "lock"):
        [found] = unneeded(store.parent, {store.name: set(SIGNALS) - {INT8}})
    assert found.holder is not None
    assert f"process {os.getpid()} on" in found.holder


def test_signals_of_a_store_with_an_altered_record_are_not_looked_at(store, caplog):
    Layout(store).declaration(INT8).write_bytes(b"{}")
    assert rest(store, set()) == {}
    assert "store: is not looked at: " in caplog.text
