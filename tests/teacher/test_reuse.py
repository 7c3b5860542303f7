"""More text is captured as if there were no store of less, and only what is new is computed."""

import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import IntegrityError
from pipeline.store import adopt
from pipeline.store.index import read_index
from pipeline.store.layout import Layout
from pipeline.store.reader import StoreReader
from pipeline.store.schema import check_plan
from pipeline.store.upkeep.gc import freed_bytes, remove_store, store_bytes
from pipeline.teacher.capture import capture as module
from pipeline.teacher.capture import disk_space as space
from pipeline.teacher.capture import statistics
from pipeline.teacher.capture.reuse import _other_stores
from pipeline.teacher.workers import schedule
from tests.captured import DAMAGES, OPTIONS, Captured, prepared, signal, write_teacher
from tests.faults.forked import start, until_operation
from tests.grown import digests_of, grown
from tests.tiny import tiny_model

INT8, MAP = signal("hidden", 2, "int8"), signal("attention", 3, "map")
HEAD = signal("logits", None, "head", values="int8")
KILLED = [INT8, HEAD]
SIGNALS = [signal("hidden", 1, "bfloat16"), INT8, signal("attention", 2, "qk"), MAP, HEAD]


@pytest.fixture(scope="module")
def old(tmp_path_factory) -> Captured:
    found = prepared(tmp_path_factory.mktemp("old"), "llama")
    found.capture(SIGNALS, blocks=[2])
    return found


@pytest.fixture(scope="module")
def afresh(old, tmp_path_factory) -> Captured:
    """The larger corpus, captured where no other store is."""
    found = grown(old, tmp_path_factory.mktemp("afresh") / "p", with_stores=False)
    found.capture(SIGNALS, blocks=[2])
    return found


@pytest.fixture
def larger(old, tmp_path) -> Captured:
    """The larger corpus beside the store of the smaller."""
    return grown(old, tmp_path / "larger")


@pytest.fixture
def ran(monkeypatch) -> list[tuple[int, tuple[str, ...]]]:
    """Segments that the teacher ran for, with their signals."""
    found: list[tuple[int, tuple[str, ...]]] = []
    plain = schedule.SegmentCapture.launch

    def spied(self: Any, number: int, names: tuple[str, ...], *rest: Any) -> Any:
        found.append((number, names))
        return plain(self, number, names, *rest)

    monkeypatch.setattr(schedule.SegmentCapture, "launch", spied)
    return found


def segments_of(ran: list[tuple[int, tuple[str, ...]]]) -> list[int]:
    """Return them in order: a scheduler is free to choose its own."""
    return sorted(number for number, _ in ran)


def the_one(project: Captured) -> Path:
    """The store of a project that has one beside it that is old."""
    (found,) = [path for path in project.stores.iterdir() if StoreReader(path).plan.get("parts")]
    return found


def stamps(store: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()}


def shards(store: Path, one: Any) -> list[Path]:
    receipts = StoreReader(store).signal(one.name).receipts.values()
    return [store / name for receipt in receipts for name in receipt.files]


def new_segments(store: Path) -> list[int]:
    reader = StoreReader(store)
    return reader.segments("train")[reader.parts[0] :]


def test_only_what_is_new_is_computed_and_the_store_is_that_of_a_fresh_capture(
    old, larger, afresh, ran, caplog
):
    (before,) = larger.stores.iterdir()
    untouched = stamps(before)
    with caplog.at_level(logging.INFO):
        store = larger.capture(SIGNALS, blocks=[2])
    assert segments_of(ran) == new_segments(store)
    assert digests_of(store) == digests_of(afresh.store)
    assert read_index(Layout(store))["assets"] == afresh.index["assets"]
    assert {p: t for p, t in stamps(before).items() if p.name != "lock"} == {
        p: t for p, t in untouched.items() if p.name != "lock"
    }
    assert digests_of(before) == old.digests()
    count = len(StoreReader(store).plan["segments"])
    taken = f"{count - len(ran)} of {count} segments are taken from store {before.name}"
    assert taken in caplog.text
    for number in range(count):
        ours = StoreReader(store).read_segment(number, [HEAD.name])
        theirs = afresh.reader.read_segment(number, [HEAD.name])
        for part, values in ours.features[HEAD.name].items():
            np.testing.assert_array_equal(values, theirs.features[HEAD.name][part])


def test_the_first_part_is_the_old_training_split_segment_by_segment(old, afresh):
    reader, before = afresh.reader, old.reader
    assert reader.parts == [len(before.segments("train")), len(new_segments(afresh.store))]
    assert reader.segments("train", parts=1) == before.segments("train")
    for number in before.segments("train"):
        ours, theirs = (r.examples_in(number) for r in (reader, before))
        for column in ("digest", "start", "row", "source_row", "slot"):
            np.testing.assert_array_equal(
                reader.examples[column][ours], before.examples[column][theirs]
            )


def test_parts_that_are_not_those_of_the_segments_are_refused(afresh):
    plan = afresh.reader.plan
    assert plan["spec"]["parts"] == [14, 5]
    check_plan(plan, afresh.layout.plan)
    with pytest.raises(IntegrityError, match="expected the segments of train in all"):
        check_plan(plan | {"parts": [1, 1]}, afresh.layout.plan)


def test_shards_are_shared_by_hard_links_and_outlive_the_old_store(larger, afresh):
    (before,) = larger.stores.iterdir()
    store = larger.capture([INT8])
    linked = [path for path in shards(store, INT8) if path.stat().st_nlink == 2]
    assert len(linked) == len(shards(before, INT8))
    alone = sum(p.stat().st_size for p in before.rglob("*") if p.is_file())
    assert freed_bytes(before) < store_bytes(before) == alone
    assert remove_store(before) < alone
    assert all(path.stat().st_nlink == 1 for path in shards(store, INT8))
    reader = StoreReader(store)
    for number in reader.signal(INT8.name).receipts:
        assert reader.read_segment(number, [INT8.name]).features
    assert digests_of(store)[INT8.name] == digests_of(afresh.store)[INT8.name]


def test_where_there_are_no_hard_links_shards_are_copied(larger, afresh, ran, monkeypatch):
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    store = larger.capture([INT8])
    assert segments_of(ran) == new_segments(store)
    assert all(path.stat().st_nlink == 1 for path in shards(store, INT8))
    assert digests_of(store)[INT8.name] == digests_of(afresh.store)[INT8.name]
    assert not any(larger.stores.glob("*/staging"))


def _link_out(path: Path) -> None:
    elsewhere = path.parents[6] / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


@pytest.mark.parametrize(
    "damage",
    ["flipped byte", "link", *(pytest.param(d, marks=pytest.mark.slow) for d in list(DAMAGES)[1:])],
)
def test_a_damaged_shard_of_the_old_store_is_not_taken(damage, larger, afresh, ran):
    (before,) = larger.stores.iterdir()
    path = before / min(StoreReader(before).signal(INT8.name).receipts[1].files)
    (_link_out if damage == "link" else DAMAGES[damage])(path)
    store = larger.capture([INT8])
    assert segments_of(ran) == [1, *new_segments(store)]
    assert digests_of(store)[INT8.name] == digests_of(afresh.store)[INT8.name]


@pytest.mark.parametrize("unreadable", ["directory", "index"])
def test_a_store_that_this_user_may_not_read_is_passed_over(unreadable, tmp_path, monkeypatch):
    """As another user's is below a directory that they share; the tests may run as root."""
    other = tmp_path / "stores" / "theirs"
    other.mkdir(parents=True)
    closed = other if unreadable == "directory" else Layout(other).index
    plain = Path.stat

    def stat(self: Path, **keywords: Any) -> os.stat_result:
        if self == closed:
            raise PermissionError(13, "Permission denied", str(self))
        return plain(self, **keywords)

    monkeypatch.setattr(Path, "stat", stat)
    assert not list(_other_stores(Layout(tmp_path / "stores" / "ours"), {}))


def test_another_teacher_shares_nothing(larger, ran):
    write_teacher(larger.teacher, tiny_model("llama", layers=3, seed=1))
    store = larger.capture([INT8])
    assert segments_of(ran) == StoreReader(store).segments("train")


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"batch_tokens": 40}, {"chunk_tokens": 32}, {"seed": 1}])
def test_rows_in_another_batch_chunk_or_order_are_not_taken(change, larger, ran):
    store = larger.capture([INT8], options=replace(larger.options, **change))
    assert segments_of(ran) == StoreReader(store).segments("train")


@pytest.mark.slow
def test_signals_that_are_declared_otherwise_are_computed_anew_and_said(
    larger, afresh, ran, monkeypatch, caplog
):
    """Other statistics give other bytes of int8; what needs none is taken all the same."""
    shutil.rmtree(larger.stores)
    smaller = replace(larger, root=larger.root / "smaller")
    base = prepared(smaller.root, "llama")
    with monkeypatch.context() as patch:
        patch.setattr(statistics, "SAMPLE_TOKENS", 10)
        base.capture(SIGNALS, blocks=[2])
    smaller.stores.rename(larger.stores)
    ran.clear()
    store = larger.capture(SIGNALS, blocks=[2])
    new = new_segments(store)
    names = {name for number, names in ran if number not in new for name in names}
    assert names == {SIGNALS[0].name, INT8.name, HEAD.name}
    reason = "computed again, because its declaration differs in channels"
    assert f"have the same rows but are {reason}" in caplog.text
    assert digests_of(store) == digests_of(afresh.store)


@pytest.mark.slow
def test_a_larger_share_of_the_corpus_begins_with_the_segments_of_the_smaller(larger, afresh, ran):
    few = larger.capture(SIGNALS, options=replace(OPTIONS, limit=16))
    count = len(StoreReader(few).segments("train"))
    ran.clear()
    shutil.rmtree(next(p for p in larger.stores.iterdir() if p != few and not _has_parts(p)))
    store = larger.capture(SIGNALS, blocks=[2])
    assert digests_of(store) == digests_of(afresh.store)
    # The last segment of the smaller one may have had room.
    trained = segments_of(ran)
    assert len(StoreReader(store).segments("train")) - count <= len(trained)
    assert set(trained) <= set(new_segments(store))


def _has_parts(store: Path) -> bool:
    return "parts" in StoreReader(store).plan


def test_what_is_lost_later_is_taken_again_without_the_teacher(larger, afresh, monkeypatch):
    signals = [INT8, MAP]
    store = larger.capture(signals)
    for one in signals:
        shards(store, one)[0].unlink()

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr(module, "load_teacher", refuse)
    assert larger.capture(signals) == store
    assert {one.name: afresh.digests()[one.name] for one in signals} == digests_of(store)


def test_room_is_needed_for_what_is_new_alone(larger, ran, monkeypatch):
    needed: list[int] = []
    plain = space.require_space

    def spied(root: Path, count: int) -> None:
        needed.append(count)
        plain(root, count)

    monkeypatch.setattr(module, "require_space", spied)
    store = larger.capture(SIGNALS[:1])
    tokens = StoreReader(store).signal(SIGNALS[0].name).receipts
    assert segments_of(ran) == new_segments(store)
    new = sum(tokens[number].tokens for number in new_segments(store))
    width = StoreReader(store).teacher_config()["hidden_size"]
    assert needed == [2 * width * new] * 3


def test_rows_of_one_label_each_move_into_shards_of_another_size(tmp_path, ran):
    """A fuller segment makes room for more examples in every shard of the example axis."""
    one = [signal("logits", None, "dense")]
    small = prepared(tmp_path / "small", "bert", layers=1)
    small.capture(one)
    large = grown(small, tmp_path / "large", lengths=[3] * 30)
    alone = grown(small, tmp_path / "alone", lengths=[3] * 30, with_stores=False)
    alone.capture(one)
    ran.clear()
    store = large.capture(one)
    assert segments_of(ran) == new_segments(store)
    rooms = [r.plan["examples_per_segment"] for r in (small.reader, StoreReader(store))]
    assert rooms[0] < rooms[1]
    assert digests_of(store) == digests_of(alone.store)


@pytest.mark.slow
def test_text_may_be_added_twice(larger, tmp_path, ran):
    first = larger.capture(SIGNALS, blocks=[2])
    twice = grown(larger, tmp_path / "twice", lengths=(9, 9, 9, 9, 9, 9, 9, 9), seed=8)
    ran.clear()
    store = twice.capture(SIGNALS, blocks=[2])
    reader = StoreReader(store)
    assert reader.parts[:2] == StoreReader(first).parts
    assert segments_of(ran) == reader.segments("train")[sum(reader.parts[:2]) :]
    alone = replace(twice, root=tmp_path / "alone")
    shutil.copytree(twice.root, alone.root, ignore=shutil.ignore_patterns("stores"))
    assert digests_of(alone.capture(SIGNALS, blocks=[2])) == digests_of(store)


@pytest.mark.parametrize("wait", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 7))])
def test_a_capture_killed_while_it_takes_over_goes_on(wait, larger, afresh, ran, tmp_path):
    """Killed before an operation on a file that follows the first hard link by so many."""
    child = start(_killed_after_links, larger, wait, stderr=tmp_path / "stderr")
    assert child.wait() == -9, child.errors()
    store = the_one(larger)
    assert not read_index(Layout(store))["signals"]
    assert larger.capture(KILLED) == store
    assert segments_of(ran) == new_segments(store)
    assert {one.name: afresh.digests()[one.name] for one in KILLED} == digests_of(store)
    assert not (store / "staging").exists()


def _killed_after_links(project: Captured, wait: int) -> None:
    plain: Callable[..., None] = os.link
    log = project.root / "operations"

    def link(*args: Any, **kwargs: Any) -> None:
        plain(*args, **kwargs)
        os.link = plain
        until_operation(1 + wait, log, lambda: None)

    adopt.os.link = link  # pyright: ignore[reportAttributeAccessIssue]
    project.capture(KILLED)


@pytest.mark.slow
def test_worker_processes_run_for_new_segments_alone(larger, afresh):
    (before,) = larger.stores.iterdir()
    store = larger.capture([INT8], scheduler="processes", workers=1)
    assert digests_of(store)[INT8.name] == digests_of(afresh.store)[INT8.name]
    linked = [path for path in shards(store, INT8) if path.stat().st_nlink == 2]
    assert len(linked) == len(shards(before, INT8))
