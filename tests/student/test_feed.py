"""Batches that are built ahead are those that would have been looked up."""

import threading
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.errors import IntegrityError
from pipeline.student.data.batch_order import BatchOrder
from pipeline.student.data.feed import Arriving, Feed
from pipeline.student.data.stream import StoreDataset
from tests.captured import Captured, copied, signal
from tests.student.test_reads import assert_equal

HIDDEN = signal("hidden", 1, "float16")
CPU = torch.device("cpu")


def count(batch) -> dict[str, int]:
    return {"tokens": int(batch["attention_mask"].sum()), "rows": len(batch["input_ids"])}


def opened(
    store: Captured, *, piece_size: int | None = None, device: torch.device = CPU
) -> tuple[Feed, BatchOrder, StoreDataset]:
    dataset = StoreDataset(store.pinned([HIDDEN]), [HIDDEN.name], pool_segments=2)
    order = BatchOrder(dataset.segment, dataset.length, batch_size=6, pool_segments=2, seed=0)
    dataset.follow(order.timetable())
    return Feed(dataset, device, count, piece_size=piece_size), order, dataset


def builders() -> list[threading.Thread]:
    return [one for one in threading.enumerate() if one.name.startswith("batch-builder")]


@pytest.mark.parametrize("piece_size", [None, 1, 4, 100])
@pytest.mark.parametrize("taken", [1, 3])
def test_a_feed_gives_the_batches_of_the_order(ten_segments, piece_size, taken):
    feed, order, _ = opened(ten_segments, piece_size=piece_size)
    plain = StoreDataset(ten_segments.pinned([HIDDEN]), [HIDDEN.name], pool_segments=10)
    batches, found, given = iter(order), [], 0
    while fed := feed.take(batches, taken):
        given += 1
        found += fed
    feed.close()
    assert given == -(-len(order) // taken)
    for one, members in zip(found, order, strict=True):
        size = piece_size or len(members)
        cuts = [members[first : first + size] for first in range(0, len(members), size)]
        assert len(one.pieces) == len(cuts)
        for piece, cut in zip(one.pieces, cuts, strict=True):
            assert_equal(piece, plain.__getitems__(cut))
        tokens = int(plain.length[members].sum())
        assert one.tokens == tokens
        assert one.counts == {"tokens": tokens, "rows": len(members)}


def test_an_epoch_that_ends_early_leaves_nothing_to_the_next(ten_segments):
    feed, order, dataset = opened(ten_segments)
    feed.take(iter(order), 2)
    order.set_epoch(1)
    dataset.follow(order.timetable())
    second = iter(order)
    fed = [one for _ in range(len(order)) for one in feed.take(second, 1)]
    feed.close()
    assert [one.counts["rows"] for one in fed] == [len(members) for members in order]
    ids = [piece["input_ids"] for one in fed for piece in one.pieces]
    expected = [dataset.__getitems__(members)["input_ids"] for members in order]
    assert all(torch.equal(*both) for both in zip(ids, expected, strict=True))


def test_a_feed_that_is_closed_has_no_thread_and_may_go_on(ten_segments):
    feed, order, _ = opened(ten_segments)
    batches = iter(order)
    feed.take(batches, 1)
    assert builders()
    feed.close()
    feed.close()
    assert not builders()
    assert len(feed.take(iter(order), 1)) == 1
    feed.close()


def test_an_error_comes_with_the_batch_it_belongs_to(ten_segments, tmp_path):
    feed, order, dataset = opened(copied(ten_segments, tmp_path / "copy"))
    timetable = order.timetable()
    number, first = int(timetable.segments[4]), int(timetable.first[4])
    files = dataset.reader.signal(HIDDEN.name).receipts[number].files
    (dataset.reader.layout.root / next(iter(files))).unlink()
    batches = iter(order)
    assert len(feed.take(batches, first)) == first
    with pytest.raises(IntegrityError, match="capture TEACHER --verify"):
        feed.take(batches, 1)
    feed.close()
    assert not builders()


def test_no_random_number_is_drawn(ten_segments):
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    before = torch.get_rng_state(), str(np.random.get_state())  # noqa: NPY002
    feed, order, _ = opened(ten_segments)
    feed.take(iter(order), 5)
    feed.close()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert str(np.random.get_state()) == before[1]  # noqa: NPY002


class SlowWay:
    """Sends to nowhere, and notes what is sent and what arrives."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def send(self, piece):
        self.seen.append(f"send {piece['number']}")
        return piece

    def arrive(self, sent):
        self.seen.append(f"arrive {sent['number']}")
        return sent


def test_while_a_piece_is_used_the_next_is_on_its_way_and_no_more():
    way: Any = SlowWay()
    pieces = Arriving([{"number": n} for n in range(3)], way)
    assert way.seen == ["send 0"]
    assert [piece["number"] for piece in pieces] == [0, 1, 2]
    assert way.seen == ["send 0", "send 1", "arrive 0", "send 2", "arrive 1", "arrive 2"]
    # Once more, as after a step that was too large for the memory.
    assert [piece["number"] for piece in pieces[1:]] == [1, 2]
    assert pieces[-1]["number"] == 2


@pytest.mark.gpu
@pytest.mark.parametrize("piece_size", [None, 2])
def test_batches_are_on_the_gpu_when_they_are_taken(ten_segments, piece_size):
    device = torch.device("cuda", torch.cuda.current_device())
    feed, order, dataset = opened(ten_segments, piece_size=piece_size, device=device)
    batches, found = iter(order), []
    while fed := feed.take(batches, 1):
        # Kept as copies: the memory of pieces is used again meanwhile.
        found += [{key: on_host(value) for key, value in p.items()} for p in fed[0].pieces]
        assert all(piece["input_ids"].device == device for piece in fed[0].pieces)
    feed.close()
    dataset.pins_memory = False
    size = piece_size or 6
    cuts = [m[first : first + size] for m in order for first in range(0, len(m), size)]
    assert len(found) == len(cuts)
    for piece, cut in zip(found, cuts, strict=True):
        assert_equal(piece, dataset.__getitems__(cut))


def on_host(value):
    if isinstance(value, dict):
        return {key: on_host(one) for key, one in value.items()}
    return value.clone().cpu()
