"""Segments are read once for all who use them at the same time."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.axes import TRAIN
from pipeline.store.reader import StoreReader
from pipeline.student.data.reads import SegmentReads
from pipeline.student.data.stream import StoreDataset
from tests.store.fixtures import without_sync
from tests.store.synthetic import Synthetic, identity, name_of, plan

SKIPPING, WHOLE = name_of("hidden", 1, "float16"), name_of("hidden", 2, "int8")
PAIRS, CLASSES = name_of("attention", 2, "map"), name_of("logits", None, "dense")
NAMES = [SKIPPING, WHOLE, PAIRS, CLASSES]


@pytest.fixture
def store(tmp_path) -> Path:
    """Of one signal the first example of each segment was skipped."""
    synthetic = Synthetic(tmp_path / "store")
    with without_sync():
        synthetic.plan()
        for name in NAMES:
            writer = synthetic.writer(name)
            writer.declare()
            for number in range(plan().segments):
                writer.write_segment(
                    number,
                    synthetic.buffers(writer, number),
                    rows=identity(number),
                    skipped=(0,) if name == SKIPPING else (),
                )
            writer.commit()
    return synthetic.root


def read_by(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The segments that are read from here on."""
    read: list[int] = []
    plain = StoreReader.read_segment

    def spied(self, segment, signals=()):
        read.append(segment)
        return plain(self, segment, signals)

    monkeypatch.setattr(StoreReader, "read_segment", spied)
    return read


def assert_equal(ours, theirs) -> None:
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_equal(ours[key], theirs[key])
    else:
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def test_datasets_that_share_reads_give_what_each_gives_alone(store, monkeypatch):
    """Of other signals, and of examples that one of them skips; each segment is read once."""
    reader = StoreReader(store)
    wanted = [[SKIPPING], [WHOLE, PAIRS], [CLASSES]]
    segments = reader.segments(TRAIN)
    read = read_by(monkeypatch)
    reads = SegmentReads(reader, NAMES)
    together = [StoreDataset(reader, names, reads=reads) for names in wanted]
    found = [
        (i, members, one.__getitems__(members))
        for number in segments
        for i, one in enumerate(together)
        if (members := np.flatnonzero(one.segment == number)[::-1].tolist())
    ]
    assert sorted(read) == segments
    alone = [StoreDataset(reader, names) for names in wanted]
    assert [len(one) for one in together] == [len(one) for one in alone]
    assert len(alone[0]) == len(alone[1]) - len(segments)
    for i, members, batch in found:
        assert set(batch["features"]) == set(wanted[i])
        assert_equal(batch, alone[i].__getitems__(members))


def test_a_segment_is_remembered_while_one_holds_it(store, monkeypatch):
    reader = StoreReader(store)
    read = read_by(monkeypatch)
    reads = SegmentReads(reader, [WHOLE])
    held = reads.get(0)
    assert reads.get(0) is held
    assert held.result().number == 0
    del held
    assert reads.get(0).result().number == 0
    assert read == [0, 0]


def test_a_segment_is_kept_until_every_user_has_asked_for_it(store, monkeypatch):
    """Users who let go at once, one far ahead of the other."""
    reader = StoreReader(store)
    first, second = reader.segments(TRAIN)
    read = read_by(monkeypatch)
    reads = SegmentReads(reader, [WHOLE], users=2, most_kept=1)

    def ask(*numbers: int) -> list[int]:
        """Return which of them had to be read."""
        before = len(read)
        for number in numbers:
            assert reads.get(number).result().number == number
        return read[before:]

    assert ask(first, first, second, second) == [first, second]
    # Both had come by.
    assert ask(first, second) == [first, second]
    # One is kept, not both.
    assert ask(second, first) == [first]
    reads.leave()
    assert ask(first, first) == [first, first]


def test_reads_without_a_signal_that_is_needed_are_refused(store):
    reader = StoreReader(store)
    with pytest.raises(ValueError, match="shared reads without"):
        StoreDataset(reader, [WHOLE], reads=SegmentReads(reader, [SKIPPING]))


def test_threads_end_when_reads_are_closed_or_gone(store):
    reader = StoreReader(store)
    before = threading.active_count()
    for ends in (SegmentReads.close, lambda _: None):
        reads = SegmentReads(reader, [WHOLE], threads=2)
        reads.get(0).result()
        threads = list(reads._threads._threads)
        assert len(threads) >= 1
        ends(reads)
        del reads
        for thread in threads:
            thread.join(timeout=10)
    assert threading.active_count() == before
