"""Signals on other axes, without arrays, and of values: as whole, resumable and exact as any."""

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pipeline.errors import ConfigError, IntegrityError, ResourceError
from pipeline.provenance import read_json
from pipeline.store.extent import PAIR_CHUNK_ROWS
from pipeline.store.index import read_index
from pipeline.store.layout import Layout
from pipeline.store.reader import StoreReader
from pipeline.student.data.stream import StoreDataset
from pipeline.teacher.capture import capture as module
from pipeline.teacher.capture.complete import is_complete
from pipeline.teacher.capture.disk_space import DISK_RESERVE_BYTES
from pipeline.teacher.capture.request import LayerRequest, resolve_signals
from pipeline.teacher.workers import schedule
from tests.captured import (
    DAMAGES,
    Captured,
    copied,
    prepared,
    receipts_mtimes,
    signal,
    tree_of_values,
)
from tests.teacher.test_capture import break_teacher, rare_token

HIDDEN, MAP = signal("hidden", 1, "int8"), signal("attention", 1, "map")
BELOW, VALUE = signal("attention", 2, "below"), signal("value", 3, "int8")
SAMPLED = signal("logits", None, "sampled", n=4)
QK = signal("attention", 1, "qk")
SIGNALS = [HIDDEN, MAP, BELOW, QK, VALUE, SAMPLED]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Captured:
    found = prepared(tmp_path_factory.mktemp("forms"), "llama")
    found.capture(SIGNALS)
    return found


@pytest.fixture
def store(whole, tmp_path) -> Captured:
    return copied(whole, tmp_path / "copy")


@pytest.fixture
def ran(monkeypatch) -> list[tuple[int, tuple[str, ...]]]:
    """Which segments the teacher ran over, and for which signals."""
    calls: list[tuple[int, tuple[str, ...]]] = []
    plain = schedule.SegmentCapture.launch

    def spied(self, number, names, *rest):
        calls.append((number, names))
        return plain(self, number, names, *rest)

    monkeypatch.setattr(schedule.SegmentCapture, "launch", spied)
    return calls


def test_a_whole_store_is_recognised_without_the_teacher(store, monkeypatch):
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr(module, "load_teacher", refuse)
    before = receipts_mtimes(store)
    assert is_complete(store.layout, SIGNALS, [])
    store.capture(SIGNALS)
    assert receipts_mtimes(store) == before


@pytest.mark.parametrize("scheduler", ["synchronous", "threads"])
def test_a_lost_store_is_captured_again_with_equal_digests(scheduler, store, whole):
    shutil.rmtree(store.stores)
    store.capture(SIGNALS, scheduler=scheduler, workers=2, writers=2)
    assert store.digests() == whole.digests()


def test_what_is_captured_beside_a_signal_does_not_change_it(store, whole):
    """Maps come from a pass of their own; the taps' pass is the same with and without them."""
    shutil.rmtree(store.stores)
    for one in ([SAMPLED], [MAP], [QK], [HIDDEN, BELOW], [VALUE]):
        store.capture(one)
    found = store.digests()
    assert {name: found[name] for name in (MAP.name, QK.name)} == {
        name: whole.digests()[name] for name in (MAP.name, QK.name)
    }
    assert found == whole.digests()


def test_attention_below_is_added_without_running_a_segment(store, ran):
    before = receipts_mtimes(store)
    added = signal("attention", 1, "below")
    store.capture([*SIGNALS, signal("hidden", 0, "float16"), added])
    assert {name for _, names in ran for name in names} == {signal("hidden", 0, "float16").name}
    assert {path: receipts_mtimes(store)[path] for path in before} == before
    stored = store.reader.signal(added.name)
    assert stored.bytes == 0
    assert stored.tokens == store.reader.signal(HIDDEN.name).tokens
    assert not list((store.store / "features.zarr/attention/1").glob("below*"))


def test_a_signal_without_arrays_is_tied_to_rows_layer_and_weights(whole):
    declared = whole.reader.signal(BELOW.name).declaration
    assert declared.info["hidden"] == 1
    assert declared.info["attention-2"] == whole.index["assets"]["attention-2"]
    assert declared.asset_entries == {"attention-2": declared.info["attention-2"]}
    rows = {n: r.rows for n, r in whole.reader.signal(HIDDEN.name).receipts.items()}
    assert {n: r.rows for n, r in whole.reader.signal(BELOW.name).receipts.items()} == rows
    weights = load_file(whole.reader.asset("attention-2"))
    teacher = whole.load_teacher()
    own = dict(teacher.model.layers[1].named_parameters())
    assert all(torch.equal(weights[name], own[name]) for name in weights)
    assert "mlp.up_proj.weight" not in weights


@pytest.mark.parametrize("is_missing", [True, False])
def test_a_damaged_part_of_a_block_is_written_again(is_missing, store, whole):
    path = store.layout.assets / "attention-2.safetensors"
    if is_missing:
        path.unlink()
        assert not is_complete(store.layout, SIGNALS, [])
    else:
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        with pytest.raises(IntegrityError, match="not the asset that the index states"):
            store.reader.asset("attention-2")
    store.capture(SIGNALS)
    assert store.digests() == whole.digests()
    assert path.read_bytes() == (whole.layout.assets / path.name).read_bytes()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_of_pairs_is_found_and_captured_again(damage, store, whole, ran):
    path = store.store / f"features.zarr/{MAP.name}/levels/c/1/0"
    DAMAGES[damage](path)
    with pytest.raises(IntegrityError):
        store.reader.read_segment(1, [MAP.name])
    store.capture(SIGNALS)
    assert ran == [(1, (MAP.name,))]
    assert store.digests() == whole.digests()
    assert StoreReader(store.store).read_segment(1, [MAP.name]).features


def test_rows_of_pairs_are_the_teachers_own_maps(whole):
    """By example, query and key, all in the segment's order."""
    levels = tree_of_values(whole, MAP.name)["levels"]
    teacher, expected = whole.load_teacher(), []
    for number in whole.reader.segments("train"):
        segment = whole.reader.read_segment(number, [MAP.name])
        for start, n in zip(segment.offset, segment.length, strict=True):
            ids = torch.from_numpy(segment.tokens["input_ids"][start : start + n].astype("i8"))
            with torch.no_grad():
                [attention] = teacher(ids[None], output_attentions=True).attentions[0]
            expected += [attention[:, q, k] for q in range(n) for k in range(q + 1)]
    true = torch.stack(expected).numpy()
    assert levels.shape == true.shape
    assert np.abs((levels / 255.0) ** 2 - true).max() < 2 / 510 + 1e-5


def test_the_room_of_a_segment_of_pairs_holds_its_fullest(whole):
    stored = whole.reader.signal(MAP.name)
    rows = {len(whole.reader.read_segment(n, [MAP.name]).features[MAP.name]["levels"])
            for n in stored.receipts}  # fmt: skip
    assert rows == {PAIR_CHUNK_ROWS}


def test_too_little_space_counts_pairs(store, monkeypatch):
    shutil.rmtree(store.stores)
    usage = namedtuple("usage", "total used free")
    lengths = [9, 20, 3, 14, 7, 17, 5, 11, 20, 8, 13, 4, 16, 6]
    heads, pairs = 4, sum(n * (n + 1) // 2 for n in lengths)
    room = DISK_RESERVE_BYTES + heads * pairs
    free = [room - 1]
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage(10**12, 0, free[0]))
    with pytest.raises(ResourceError, match="free, the missing features need up to"):
        store.capture([MAP])
    free[0] = room
    store.capture([MAP])
    assert store.digests()


def test_features_that_are_not_finite_are_skipped_on_every_axis(store):
    token, bad = rare_token(store)
    break_teacher(store, 1, token)
    with pytest.raises(IntegrityError, match=r"not finite in example slots .*nonfinite: skip"):
        store.capture([MAP])
    store.capture(SIGNALS, nonfinite="skip")
    reader = store.pinned(SIGNALS)
    for one in (MAP, VALUE, SAMPLED):
        skipped = {
            int(reader.examples_in(n)[slot])
            for n, receipt in reader.signal(one.name).receipts.items()
            for slot in receipt.skipped
            if reader.plan["segments"][n] == "train"
        }
        assert skipped == bad
    names = [one.name for one in SIGNALS]
    dataset = StoreDataset(reader, names)
    assert not set(dataset.examples.tolist()) & bad
    batch = dataset.__getitems__(list(range(len(dataset))))
    assert len(batch["features"][MAP.name]["levels"]) == sum(
        n * (n + 1) // 2 for n in dataset.length.tolist()
    )
    assert batch["features"][BELOW.name] == {}


def test_manifests_name_what_a_signal_needs(store):
    found = store.manifests(SIGNALS)
    records = {r["signal"]: r for p in found.glob("*.json") if "kind" in (r := read_json(p))}
    assert records[BELOW.name]["needs"] == {"hidden": 1}
    assert all("needs" not in r for name, r in records.items() if name != BELOW.name)
    assert records[VALUE.name]["kind"] == "value"


def test_attention_below_needs_its_hidden_layer_captured():
    def resolved(hidden: list[int]) -> list[str]:
        requests = [
            LayerRequest(HIDDEN.form, hidden),
            LayerRequest(BELOW.form, [2, 3]),
            LayerRequest(VALUE.form, "all"),
        ]
        found = resolve_signals(requests, None, depth=3, task="causal-lm", key="teachers.t.capture")
        return [one.name.rsplit("-", 1)[0] for one in found]

    assert resolved([1, 2]) == [
        "hidden/1/int8", "hidden/2/int8", "attention/2/below", "attention/3/below",
        "value/1/int8", "value/2/int8", "value/3/int8",
    ]  # fmt: skip
    with pytest.raises(
        ConfigError,
        match=r"t\.capture\.attention: form below of layer 2 .* add 1 to .*hidden\.layers",
    ):
        resolved([2])


@pytest.mark.parametrize("kind", ["bert", "deberta_v2"])
def test_a_bidirectional_teacher_has_all_pairs(kind, tmp_path):
    store = prepared(tmp_path, kind, layers=1)
    store.capture([MAP])
    names = [MAP.name]
    dataset = StoreDataset(store.pinned([MAP]), names)
    batch = dataset.__getitems__([0, 1, 2])
    pairs = sum(n * n for n in dataset.length[:3].tolist())
    assert len(batch["features"][MAP.name]["levels"]) == pairs
    assert store.reader.signal(MAP.name).declaration.rule == "full"


def test_targets_of_a_regression_are_joined_to_their_rows(tmp_path):
    for task, outputs in (("regression", 1), ("multi-label", 3)):
        store = prepared(tmp_path / task, "bert", task=task, layers=1)
        one = signal("logits", None, "dense")
        store.capture([one])
        reader = store.pinned([one])
        assert reader.targets is not None
        assert reader.targets.shape == (reader.plan["examples"], outputs)
        dataset = StoreDataset(reader, [one.name])
        batch = dataset.__getitems__([5, 0, 2])
        assert batch["labels"].dtype == torch.float32
        expected = reader.targets[dataset.examples[[5, 0, 2]]]
        np.testing.assert_array_equal(batch["labels"].numpy(), expected)
        path = store.store / "features.zarr/examples/targets/c/0/0"
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        with pytest.raises(IntegrityError, match="targets"):
            _ = StoreReader(store.store).targets


def test_a_store_without_targets_has_none(whole):
    assert whole.reader.targets is None
    assert "outputs" not in whole.reader.plan or not whole.reader.plan["outputs"]


def test_a_pending_signal_without_arrays_is_invisible(store):
    layout = Layout(store.store)
    Path(layout.receipt(BELOW.name, 0)).unlink()
    layout.manifest(BELOW.name).unlink()
    assert not is_complete(layout, SIGNALS, [])
    store.capture(SIGNALS)
    assert BELOW.name in read_index(layout)["signals"]
    assert is_complete(layout, SIGNALS, [])
