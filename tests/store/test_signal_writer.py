"""Declaring, writing, committing and taking up again: what is trusted, and what readers may see."""

import numpy as np
import pytest

from pipeline.axes import SPLITS
from pipeline.errors import IncompatibleError
from pipeline.provenance import read_json
from pipeline.store import commit
from pipeline.store.commit import content_digest
from pipeline.store.index import index_signal, read_index
from pipeline.store.reader import StoreReader
from pipeline.store.sealed import read_record, write_record
from tests.store.synthetic import Synthetic, identity, name_of, plan

pytestmark = pytest.mark.usefixtures("unsynced")
NAME = name_of("hidden", 1, "float16")


def fill(synthetic: Synthetic, name: str, segments) -> None:
    writer = synthetic.writer(name)
    for segment in segments:
        writer.write_segment(segment, synthetic.buffers(writer, segment), rows=identity(segment))


def test_a_signal_is_pending_until_its_last_segment(tmp_path):
    synthetic = Synthetic(tmp_path / "s")
    synthetic.plan()
    writer = synthetic.writer(NAME)
    writer.declare()
    for segment in range(plan().segments):
        assert writer.commit() is None
        assert StoreReader(synthetic.root).signals == []
        fill(synthetic, NAME, [segment])
    assert writer.commit() is not None
    assert StoreReader(synthetic.root).signals == [NAME]


def test_the_order_of_segments_does_not_show(tmp_path, whole_store):
    synthetic = Synthetic(tmp_path / "s")
    synthetic.plan()
    synthetic.writer(NAME).declare()
    fill(synthetic, NAME, reversed(range(plan().segments)))
    manifest = synthetic.writer(NAME).commit()
    assert manifest is not None
    assert manifest["digest"] == StoreReader(whole_store).signal(NAME).digest


def test_a_signal_of_some_splits_has_only_their_segments(tmp_path):
    synthetic = Synthetic(tmp_path / "s")
    synthetic.plan()
    synthetic.signal(NAME, ("train",))
    reader = StoreReader(synthetic.root)
    assert list(reader.signal(NAME).receipts) == reader.segments("train")
    [test, *_] = reader.segments("test")
    with pytest.raises(IncompatibleError, match="not captured for split test; it was for train"):
        reader.read_segment(test, [NAME])


def test_receipts_of_another_declaration_are_not_trusted(store):
    """Also when the change was cut short between two steps."""
    synthetic = Synthetic(store)
    declared = synthetic.layout.declaration(NAME)
    record = read_record(declared, store)
    write_record(declared, {**record, "info": {"other": 1}})
    other = synthetic.writer(NAME)
    assert set(other.receipts(verify=False)) == set(range(plan().segments))
    object.__setattr__(other.declared, "info", {"other": 1})
    assert other.receipts(verify=False) == {}


def test_declaring_anew_withdraws_first(store, caplog):
    synthetic = Synthetic(store)
    writer = synthetic.writer(NAME, ("train",))
    writer.declare()
    assert NAME not in StoreReader(store).signals
    assert not synthetic.layout.manifest(NAME).exists()
    assert "withdrawn" in caplog.text
    assert writer.missing() == StoreReader(store).segments("train")


def test_declaring_the_same_again_changes_nothing(store):
    before = read_index(Synthetic(store).layout)
    writer = Synthetic(store).writer(NAME)
    writer.declare()
    assert NAME in StoreReader(store).signals
    assert writer.missing() == []
    assert writer.commit() is not None
    assert read_index(Synthetic(store).layout) == before


def test_a_damaged_declaration_costs_no_segment(store):
    synthetic = Synthetic(store)
    synthetic.layout.declaration(NAME).write_text("{}")
    writer = synthetic.writer(NAME)
    writer.declare()
    assert writer.missing() == []


def test_damage_withdraws_the_signal_before_anything_is_rewritten(store, caplog):
    synthetic = Synthetic(store)
    digest = StoreReader(store).signal(NAME).digest
    path = store / f"features.zarr/{NAME}/values/c/2/0"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    writer = synthetic.writer(NAME)
    assert writer.missing() == [2]
    assert NAME not in StoreReader(store).signals
    assert not synthetic.layout.manifest(NAME).exists()
    assert "segments [2] are damaged" in caplog.text
    synthetic.signal(NAME)
    assert StoreReader(store, {NAME: digest}).read_segment(2, [NAME])


def test_a_receipt_moved_to_another_segment_is_not_trusted(store):
    layout = Synthetic(store).layout
    layout.receipt(NAME, 1).write_bytes(layout.receipt(NAME, 0).read_bytes())
    assert Synthetic(store).writer(NAME).missing() == [1]


def test_a_flipped_receipt_is_not_trusted(store):
    path = Synthetic(store).layout.receipt(NAME, 0)
    text = path.read_text()
    digest = read_json(path)["content"]
    path.write_text(text.replace(digest, digest[::-1]))
    assert Synthetic(store).writer(NAME).missing() == [0]


def test_a_later_run_does_not_sign_for_values_it_did_not_compute(store, monkeypatch):
    monkeypatch.setattr(commit, "software", lambda: {"torch": "99"})
    manifest = Synthetic(store).writer(NAME).commit()
    assert manifest is not None
    assert manifest["software"] != {"torch": "99"}
    layout = Synthetic(store).layout
    assert read_record(layout.manifest(NAME), store)["software"] != {"torch": "99"}


def test_content_is_of_live_rows_in_order_and_of_nothing_else():
    values = np.arange(12, dtype=np.int8).reshape(6, 2)
    padded = values.copy()
    padded[4:] = 9
    assert content_digest({"a": values}, 4) == content_digest({"a": padded}, 4)
    assert content_digest({"a": values}, 4) != content_digest({"a": values[::-1]}, 4)
    assert content_digest({"a": values}, 4) != content_digest({"b": values}, 4)
    assert content_digest({"a": values}, 4) != content_digest({"a": values.view(np.uint8)}, 4)
    reshaped = values[:4].reshape(2, 4)
    assert content_digest({"a": values}, 4) != content_digest({"a": reshaped}, 2)


def test_splits_are_all_by_default(whole_store):
    assert StoreReader(whole_store).signal(NAME).declaration.splits == SPLITS


def test_a_manifest_that_lacks_a_key_is_written_again(tmp_path):
    """Its seal and the index's entry are good: a record of other software, or a forged one."""
    synthetic = Synthetic(tmp_path / "s")
    synthetic.plan()
    synthetic.signal(NAME)
    digest = StoreReader(synthetic.root).signal(NAME).digest
    path = synthetic.layout.manifest(NAME)
    manifest = read_record(path, synthetic.root)
    del manifest["receipts"]
    write_record(path, manifest)
    index_signal(synthetic.layout, NAME, digest)
    assert synthetic.writer(NAME).commit() is not None
    assert StoreReader(synthetic.root).signal(NAME).digest == digest
