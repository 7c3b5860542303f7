"""Stage one: whole or absent, resumable, and only what is missing."""

import os
import shutil
import signal as signals_of_system
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.errors import IncompatibleError, IntegrityError, ResourceError
from pipeline.provenance import read_json
from pipeline.store.background import BackgroundWriter
from pipeline.store.index import read_index, withdraw
from pipeline.store.lock import writer_lock
from pipeline.store.reader import StoreReader
from pipeline.student.data.stream import StoreDataset
from pipeline.teacher.capture import capture as module
from pipeline.teacher.capture.complete import is_complete
from pipeline.teacher.capture.disk_space import DISK_RESERVE_BYTES
from pipeline.teacher.capture.encode import BatchEncoder
from pipeline.teacher.capture.segments import SegmentCapture
from pipeline.teacher.source.reference import TeacherReference, weights_sha256
from pipeline.teacher.workers import schedule
from tests.captured import (
    DAMAGES,
    OPTIONS,
    Captured,
    copied,
    prepared,
    receipts_mtimes,
    signal,
    write_teacher,
)
from tests.tiny import tiny_model

HIDDEN, HEAD = signal("hidden", 2, "int8"), signal("logits", None, "head")
SIGNALS = [signal("hidden", 1, "bfloat16"), HIDDEN, signal("attention", 2, "qk"), HEAD]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Captured:
    found = prepared(tmp_path_factory.mktemp("whole"), "llama")
    found.capture(SIGNALS, blocks=[2])
    return found


@pytest.fixture
def store(whole, tmp_path) -> Captured:
    return copied(whole, tmp_path / "copy")


@pytest.fixture
def no_teacher(monkeypatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr(module, "load_teacher", refuse)


def shard(store: Captured, one: Any, segment: int) -> Path:
    receipt = store.reader.signal(one.name).receipts[segment]
    return store.store / sorted(receipt.files)[0]


def test_a_whole_store_is_recognised_without_the_teacher(store, no_teacher):
    before = receipts_mtimes(store)
    index = (store.store / "manifest.json").stat().st_mtime_ns
    assert is_complete(store.layout, SIGNALS, [2])
    store.capture(SIGNALS, blocks=[2])
    assert receipts_mtimes(store) == before
    assert (store.store / "manifest.json").stat().st_mtime_ns == index
    assert not is_complete(store.layout, [*SIGNALS, signal("hidden", 3, "int8")], [2])
    assert not is_complete(store.layout, SIGNALS, [1, 2])


def test_receipts_without_manifests_are_finished_without_the_teacher(store, no_teacher):
    expected = store.digests()
    for one in SIGNALS:
        withdraw(store.layout, one.name)
    assert not store.digests()
    store.capture(SIGNALS, blocks=[2])
    assert store.digests() == expected


def test_a_damaged_manifest_is_written_again_without_the_teacher(store, whole, no_teacher):
    path = store.layout.manifest(HIDDEN.name)
    path.write_bytes(path.read_bytes()[:-30])
    assert not is_complete(store.layout, SIGNALS, [2])
    store.capture(SIGNALS, blocks=[2])
    assert store.digests() == whole.digests()
    assert is_complete(store.layout, SIGNALS, [2])


def test_a_lost_store_is_captured_again_with_equal_digests(store, whole):
    shutil.rmtree(store.stores)
    store.capture(SIGNALS, blocks=[2])
    assert store.digests() == whole.digests()
    assert store.index["assets"] == whole.index["assets"]


def test_tasks_of_a_threaded_scheduler_give_the_same_values(store, whole):
    shutil.rmtree(store.stores)
    store.capture(SIGNALS, blocks=[2], scheduler="threads", workers=2, writers=2)
    assert store.digests() == whole.digests()


def test_a_segment_is_ended_while_the_next_one_runs(store, whole, monkeypatch):
    """A GPU would otherwise wait at the end of every segment."""
    shutil.rmtree(store.stores)
    events: list[str] = []

    def tell(owner: type, method: str, event: str) -> None:
        plain = getattr(owner, method)

        def told(*arguments: Any) -> Any:
            events.append(event)
            return plain(*arguments)

        monkeypatch.setattr(owner, method, told)

    tell(SegmentCapture, "launch", "segment")
    tell(BatchEncoder, "__call__", "batch")
    tell(BackgroundWriter, "submit", "end")
    store.capture(SIGNALS, blocks=[2])
    starts = [i for i, event in enumerate(events) if event == "segment"]
    assert len(starts) > 2
    for start in starts[1:]:
        assert events[start : start + 3] == ["segment", "batch", "end"]
    assert events[-1] == "end"
    assert store.digests() == whole.digests()


def test_an_added_layer_is_captured_alone(store, whole, monkeypatch):
    before = receipts_mtimes(store)
    ran: list[tuple[str, ...]] = []
    plain = schedule.SegmentCapture.launch

    def spied(self, number, names, *rest):
        ran.append(names)
        return plain(self, number, names, *rest)

    monkeypatch.setattr(schedule.SegmentCapture, "launch", spied)
    added = signal("hidden", 3, "bfloat16")
    store.capture([*SIGNALS, added], blocks=[2])
    assert set(ran) == {(added.name,)}
    assert len(ran) == len(store.reader.segments("train"))
    after = receipts_mtimes(store)
    assert {path: after[path] for path in before} == before
    assert {name: store.digests()[name] for name in whole.digests()} == whole.digests()


def test_another_form_of_a_layer_takes_the_statistics_that_are_there(store, whole):
    """The statistics belong to the layer: writing them anew could break the first form's digest."""
    path = store.layout.channels("hidden", 2)
    written = path.stat().st_mtime_ns
    store.capture([*SIGNALS, signal("hidden", 2, "float16")])
    assert path.stat().st_mtime_ns == written
    assert {name: store.digests()[name] for name in whole.digests()} == whole.digests()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_hidden_first_and_then_captured_again(damage, store, whole, monkeypatch):
    path = shard(store, HIDDEN, 1)
    DAMAGES[damage](path)
    visible: list[set[str]] = []
    ran: list[tuple[int, tuple[str, ...]]] = []
    plain = schedule.SegmentCapture.launch

    def spied(self, number, names, *rest):
        visible.append(set(read_index(store.layout)["signals"]))
        ran.append((number, names))
        return plain(self, number, names, *rest)

    monkeypatch.setattr(schedule.SegmentCapture, "launch", spied)
    store.capture(SIGNALS, blocks=[2])
    assert ran == [(1, (HIDDEN.name,))]
    assert visible == [set(whole.digests()) - {HIDDEN.name}]
    assert store.digests() == whole.digests()
    assert StoreReader(store.store).read_segment(1, [HIDDEN.name]).features


@pytest.mark.parametrize("asset", ["channels/hidden.2.safetensors", "lm_head.safetensors",
                                   "blocks.safetensors"])  # fmt: skip
@pytest.mark.parametrize("is_missing", [True, False])
def test_a_damaged_asset_is_written_again(asset, is_missing, store, whole):
    path = store.layout.assets / asset
    if is_missing:
        path.unlink()
        assert not is_complete(store.layout, SIGNALS, [2])
    else:
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    store.capture(SIGNALS, blocks=[2])
    assert store.digests() == whole.digests()
    assert store.index["assets"] == whole.index["assets"]
    assert path.read_bytes() == (whole.layout.assets / asset).read_bytes()


KILLED = """
import os, signal, sys
from pathlib import Path
from pipeline.store.commit import SignalWriter
from tests.captured import Captured
from tests.teacher.test_capture import SIGNALS
left, plain = int(sys.argv[2]), SignalWriter.write_segment

def counted(*args, **kwargs):
    global left
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    return plain(*args, **kwargs)

SignalWriter.write_segment = counted
Captured(Path(sys.argv[1]), "causal-lm").capture(SIGNALS, blocks=[2])
"""


@pytest.mark.slow
def test_a_killed_capture_goes_on_and_ends_with_equal_digests(store, whole):
    shutil.rmtree(store.stores)
    command = [sys.executable, "-B", "-c", KILLED, str(store.root), "9"]
    killed = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, check=False
    )
    assert killed.returncode == -signals_of_system.SIGKILL
    assert not read_index(store.layout)["signals"]
    done = set(store.store.glob("receipts/*/0*.json"))
    assert len(done) == 9
    before = {path: path.stat().st_mtime_ns for path in done}
    store.capture(SIGNALS, blocks=[2])
    assert store.digests() == whole.digests()
    assert {path: path.stat().st_mtime_ns for path in done} == before


def break_teacher(store: Captured, layer: int, token: int) -> None:
    """Give the teacher a NaN in one layer for every example that has a token."""
    path = store.teacher / "model" / "model.safetensors"
    weights = load_file(path)
    weights["model.embed_tokens.weight"][token] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    reference = replace(
        TeacherReference.load(store.teacher), weights_sha256=weights_sha256(path.parent)
    )
    reference.save(store.teacher)
    shutil.rmtree(store.stores)


def rare_token(store: Captured) -> tuple[int, set[int]]:
    """A token of one or two training examples, none of them in the checked batch."""
    reader = store.reader
    places: dict[int, set[int]] = {}
    for number in reader.segments("train"):
        segment = reader.read_segment(number)
        for example, start, n in zip(segment.examples, segment.offset, segment.length, strict=True):
            for token in segment.tokens["input_ids"][start : start + n].tolist():
                places.setdefault(token, set()).add(int(example))
    checked = set(reader.examples_in(longest_segment_of(reader)).tolist())
    return min(
        (token, found) for token, found in places.items() if not found & checked and len(found) < 3
    )


def longest_segment_of(reader: StoreReader) -> int:
    train = reader.examples["split"] == 0
    longest = np.where(train, reader.examples["length"], 0).argmax()
    return int(reader.examples["segment"][longest])


def test_features_that_are_not_finite_stop_the_capture_or_are_skipped(store):
    token, bad = rare_token(store)
    break_teacher(store, 1, token)
    with pytest.raises(IntegrityError, match=r"not finite in example slots .*nonfinite: skip"):
        store.capture(SIGNALS)
    assert not read_index(store.layout)["signals"]
    store.capture(SIGNALS, nonfinite="skip")
    names = [one.name for one in SIGNALS]
    reader = store.pinned(SIGNALS)
    table = reader.examples
    for name in names:
        for receipt in reader.signal(name).receipts.values():
            expected = {
                int(table["slot"][i]) for i in bad if table["segment"][i] == receipt.segment
            }
            if reader.plan["segments"][receipt.segment] == "train":
                assert set(receipt.skipped) == expected
    dataset = StoreDataset(reader, names)
    assert set(dataset.examples.tolist()) == set(np.flatnonzero(table["split"] == 0)) - bad
    batch = dataset.__getitems__(list(range(len(dataset))))
    assert not (batch["input_ids"] == token).any()
    for parts in batch["features"].values():
        assert all(v.isfinite().all() for v in parts.values() if v.is_floating_point())


def test_values_beyond_a_forms_range_are_not_finite_in_it(tmp_path):
    """65,504 is the end of float16; bfloat16 takes what float32 does."""
    model = tiny_model("llama", layers=1)
    with torch.no_grad():
        model.model.embed_tokens.weight[9, 0] = 1e5
    store = prepared(tmp_path, "llama", layers=1)
    shutil.rmtree(store.teacher)
    write_teacher(store.teacher, model)
    store.capture([signal("hidden", 0, "bfloat16")])
    with pytest.raises(IntegrityError, match=r"hidden/0/float16.*choose a form of wider range"):
        store.capture([signal("hidden", 0, "float16")])


def test_too_little_space_is_refused_before_anything_is_written(store, monkeypatch):
    shutil.rmtree(store.stores)
    usage = namedtuple("usage", "total used free")
    free = DISK_RESERVE_BYTES + 1000
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage(10**12, 0, free))
    needs = "67,109,864 bytes free, the missing features need up to 67,1"
    with pytest.raises(ResourceError, match=needs):
        store.capture(SIGNALS)
    assert not (store.store / "features.zarr").exists()
    assert not store.layout.plan.exists()


def test_a_second_writer_is_told_who_writes(store):
    with (
        writer_lock(store.layout.lock),
        pytest.raises(ResourceError, match=rf"process {os.getpid()} on .* is writing"),
    ):
        store.capture(SIGNALS, wait=False)


def test_the_fingerprint_follows_what_changes_values_and_nothing_else(store, whole):
    store.capture([HIDDEN], scheduler="threads", workers=2, writers=2)
    assert len(list(store.stores.iterdir())) == 1
    (segments,) = store.stores.iterdir()
    for change in ({"segment_tokens": 32}, {"batch_tokens": 30}, {"seed": 1}, {"fraction": 0.5}):
        store.capture([HIDDEN], options=replace(OPTIONS, **change))
    assert len(list(store.stores.iterdir())) == 5
    assert segments.name == whole.store.name


def test_signals_are_on_the_splits_that_need_them(whole):
    """Logits serve agreement too, so they are in every split; the rest trains."""
    reader = whole.reader
    splits = {
        one.name: {reader.plan["segments"][n] for n in reader.signal(one.name).receipts}
        for one in SIGNALS
    }
    assert splits[HEAD.name] == {"train", "validation", "test"}
    assert splits[HIDDEN.name] == {"train"}


def test_channel_statistics_are_those_of_all_tokens_and_never_zero(whole):
    teacher = whole.load_teacher()
    states = []
    for number in whole.reader.segments("train"):
        segment = whole.reader.read_segment(number)
        for start, n in zip(segment.offset, segment.length, strict=True):
            ids = torch.from_numpy(segment.tokens["input_ids"][start : start + n].astype("i8"))
            with torch.no_grad():
                output = teacher(ids[None], output_hidden_states=True, use_cache=False)
            states.append(output.hidden_states[2][0].double())
    channels = whole.reader.channels(HIDDEN.name)
    assert channels is not None
    joined = torch.cat(states)
    for found, expected in (
        (channels.mean, joined.mean(0)),
        (channels.deviation, joined.std(0, correction=0)),
    ):
        torch.testing.assert_close(torch.from_numpy(found).double(), expected, rtol=1e-4, atol=1e-5)


def test_manifests_are_deterministic_and_name_only_what_is_asked_for(store, whole):
    first = store.manifests(SIGNALS, [2])
    content = {path.name: path.read_bytes() for path in first.iterdir()}
    assert len(content) == len(SIGNALS) + 2
    assert content == {p.name: p.read_bytes() for p in whole.manifests(SIGNALS, [2]).iterdir()}
    stamps = {path: path.stat().st_mtime_ns for path in first.iterdir()}
    store.manifests(SIGNALS, [2])
    assert stamps == {path: path.stat().st_mtime_ns for path in first.iterdir()}
    store.manifests(SIGNALS[:1])
    assert sorted(path.name for path in first.iterdir()) == sorted(
        ["store.json", f"{SIGNALS[0].name.replace('/', '.')}.json"]
    )
    assert read_json(first / "store.json")["layers"] == 3


def test_ids_of_another_tokenizer_are_refused(store, no_teacher):
    """A teacher that was trained here knows whose ids it learnt."""
    made_of = {"tokenizer": "of old" + "0" * 58, "tokens": "of the same text"}
    replace(TeacherReference.load(store.teacher), made_of=made_of).save(store.teacher)
    with pytest.raises(IncompatibleError, match=r"made of tokenizer of old0+, expected tiny as"):
        store.capture([*SIGNALS, signal("hidden", 3, "bfloat16")])
