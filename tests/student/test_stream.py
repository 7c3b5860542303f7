"""Batches from a store: what they hold, what is read for them, and what stays in memory."""

import gc
import shutil
import weakref
from collections.abc import Callable
from threading import Lock

import numpy as np
import pytest
import torch

from pipeline.errors import IntegrityError
from pipeline.store.reader import Segment, StoreReader
from pipeline.student.data.batch_order import BatchOrder
from pipeline.student.data.stream import POOLS, StoreDataset, positions_of
from tests.captured import Captured, copied, signal

HIDDEN = signal("hidden", 1, "float16")


class Watched:
    """What was read of a store, and which segments are still in memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read: list[int] = []
        self._found: list[weakref.ref[Segment]] = []
        plain, lock = StoreReader.read_segment, Lock()

        def watching(reader: StoreReader, segment: int, signals=()) -> Segment:
            found = plain(reader, segment, signals)
            with lock:
                self.read.append(segment)
                self._found.append(weakref.ref(found))
            return found

        monkeypatch.setattr(StoreReader, "read_segment", watching)

    def alive(self) -> int:
        return sum(one() is not None for one in self._found)


@pytest.fixture
def watched(monkeypatch) -> Watched:
    return Watched(monkeypatch)


def opened(store: Captured, *, pool: int = 2) -> tuple[StoreDataset, BatchOrder]:
    """A dataset that follows the order of an epoch."""
    dataset = StoreDataset(store.pinned([HIDDEN]), [HIDDEN.name], pool_segments=pool)
    order = BatchOrder(dataset.segment, dataset.length, batch_size=4, pool_segments=pool, seed=0)
    dataset.follow(order.timetable())
    return dataset, order


def test_a_batch_holds_the_rows_and_features_of_its_examples(captured):
    """Rows join by identity: the features beside a row are those of that row, in any order."""
    store = captured("bert")
    signals = [signal("hidden", 2, "float16"), signal("logits", None, "dense")]
    names = [one.name for one in signals]
    reader = store.pinned(signals)
    dataset = StoreDataset(reader, names)
    indices = [11, 0, 6, 3]
    batch = dataset.__getitems__(indices)
    lengths = batch["attention_mask"].sum(-1).tolist()
    assert lengths == dataset.length[indices].tolist()
    states = batch["features"][names[0]]["values"].split(lengths)
    for row, i in enumerate(indices):
        example = dataset.examples[i]
        segment = reader.read_segment(int(dataset.segment[i]), names)
        place = int(np.flatnonzero(segment.examples == example)[0])
        start, count = int(segment.offset[place]), int(segment.length[place])
        for column in ("input_ids", "token_type_ids", "loss_mask"):
            expected = torch.from_numpy(segment.tokens[column][start : start + count].astype("i8"))
            assert torch.equal(batch[column][row, :count].long(), expected)
            assert not batch[column][row, count:].any()
        values = segment.features[names[0]]["values"][start : start + count]
        assert torch.equal(states[row], torch.from_numpy(values))
        logits = segment.features[names[1]]["logits"][segment.slot[place]]
        assert torch.equal(batch["features"][names[1]]["logits"][row], torch.from_numpy(logits))
        assert batch["labels"][row] == reader.examples["label"][example]


def test_features_travel_in_the_dtypes_of_the_store(captured):
    store = captured("llama")
    signals = [signal("hidden", 2, "int8"), signal("attention", 1, "qk")]
    batch = StoreDataset(store.pinned(signals), [s.name for s in signals]).__getitems__([0])
    dtypes = {v.dtype for parts in batch["features"].values() for v in parts.values()}
    assert dtypes == {torch.int8, torch.float16}
    assert "labels" not in batch


@pytest.mark.parametrize("resumed_at", [0, 9])
def test_segments_are_read_once_and_only_two_pools_are_in_memory(resumed_at, ten_segments, watched):
    """A run that resumes in mid-epoch reads nothing of what it skips alone."""
    dataset, order = opened(ten_segments)
    batches = list(order)[resumed_at:]
    for members in batches:
        dataset.__getitems__(members)
        assert watched.alive() <= POOLS * 2
    needed = {int(dataset.segment[i]) for members in batches for i in members}
    assert sorted(watched.read) == sorted(needed)
    assert (len(needed) < 10) == (resumed_at > 0)


def test_the_next_epoch_finds_its_first_segments_in_memory(ten_segments, watched):
    dataset, order = opened(ten_segments)
    then = order.next_segments()
    dataset.follow(order.timetable(), then)
    for members in order:
        dataset.__getitems__(members)
        assert watched.alive() <= POOLS * 2
    read = len(watched.read)
    order.set_epoch(1)
    dataset.follow(order.timetable())
    first = order.timetable().segments[: len(then)].tolist()
    dataset.__getitems__(next(iter(order)))
    assert sorted(first) == sorted(then)
    assert not set(first) & set(watched.read[read:])


def test_more_segments_are_in_memory_only_where_a_batch_needs_them(ten_segments, watched):
    dataset = StoreDataset(ten_segments.pinned([HIDDEN]), [HIDDEN.name])
    dataset.__getitems__(list(range(0, 80, 8)))
    assert sorted(watched.read) == list(range(10))
    dataset.__getitems__([79])
    assert watched.alive() == 1


def test_without_a_timetable_a_store_is_read_from_its_beginning_to_its_end(ten_segments, watched):
    dataset = StoreDataset(ten_segments.pinned([HIDDEN]), [HIDDEN.name])
    for first in range(0, 80, 4):
        dataset.__getitems__(list(range(first, first + 4)))
        assert watched.alive() <= POOLS
    assert watched.read == list(range(10))


def test_any_example_can_be_looked_up_at_any_time(ten_segments):
    """Also one that the timetable has over, or another rank's."""
    dataset, order = opened(ten_segments)
    batches = list(order)
    generator = np.random.default_rng(0)
    expected = StoreDataset(ten_segments.pinned([HIDDEN]), [HIDDEN.name], pool_segments=10)
    shares = BatchOrder(
        dataset.segment, dataset.length, batch_size=2, pool_segments=2, seed=0, ranks=2
    )
    dataset.follow(shares.timetable())
    for i in generator.permutation(len(batches))[:8]:
        ours, theirs = (one.__getitems__(batches[i]) for one in (dataset, expected))
        assert torch.equal(ours["input_ids"], theirs["input_ids"])
        values = (one["features"][HIDDEN.name]["values"] for one in (ours, theirs))
        assert torch.equal(*values)


def test_released_segments_are_gone_and_a_batch_keeps_none(ten_segments, watched):
    dataset, order = opened(ten_segments)
    batch = dataset.__getitems__(next(iter(order)))
    assert watched.alive()
    dataset.release()
    # What is being read is given up when it is there.
    dataset._reads.close()
    gc.collect()
    assert watched.alive() == 0
    assert batch["features"][HIDDEN.name]["values"].abs().sum() > 0


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda path: path.unlink(), id="missing"),
        pytest.param(lambda path: path.write_bytes(path.read_bytes()[:-1]), id="short"),
    ],
)
def test_what_a_thread_cannot_read_stops_the_batch_that_needs_it(
    damage: Callable, ten_segments, tmp_path
):
    """Read ahead long before; and again at every batch that needs it, for nothing hangs."""
    dataset, order = opened(copied(ten_segments, tmp_path / "copy"))
    timetable = order.timetable()
    number, first = int(timetable.segments[4]), int(timetable.first[4])
    name = dataset.reader.signal(HIDDEN.name).receipts[number].files
    damage(dataset.reader.layout.root / next(iter(name)))
    batches = list(order)
    for members in batches[:first]:
        dataset.__getitems__(members)
    for _ in range(2):
        with pytest.raises(IntegrityError, match="capture TEACHER --verify"):
            dataset.__getitems__(batches[first])


def test_a_store_that_is_gone_says_so(ten_segments, tmp_path):
    dataset, order = opened(copied(ten_segments, tmp_path / "copy"))
    shutil.rmtree(dataset.reader.layout.root)
    with pytest.raises(IntegrityError, match="the store was removed while it was read"):
        dataset.__getitems__(next(iter(order)))


def test_a_split_without_the_signal_is_refused_by_name(captured):
    store = captured("llama")
    one = signal("hidden", 2, "float16")
    dataset = StoreDataset(store.pinned([one]), [one.name], split="test")
    with pytest.raises(Exception, match="not captured for split test; it was for train"):
        dataset.__getitems__([0])


def test_positions_written_out():
    mask = np.array([[1, 1, 0, 1], [1, 1, 1, 0]], bool)
    live = np.array([[1, 1, 1, 1], [1, 1, 0, 0]], bool)
    expected = {
        "live": [0, 1, 2, 3, 4, 5],
        "later": [1, 2, 3, 5],
        "later_tokens": [1, 2, 3, 5],
        "targets": [0, 2, 4],
        "target_tokens": [0, 2, 4],
    }
    found = {name: values.tolist() for name, values in positions_of(live, mask).items()}
    assert found == expected
    short = positions_of(live[::-1], mask[::-1])
    assert short["targets"].tolist() == [0, 4, 6]
    assert short["target_tokens"].tolist() == [0, 2, 4]
    assert "targets" not in positions_of(live, None)
