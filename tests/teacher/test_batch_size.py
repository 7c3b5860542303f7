"""Batches that do not fit are found before the first segment; what was found is never changed."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.axes import SPLITS, TRAIN
from pipeline.errors import IntegrityError, ResourceError
from pipeline.store.index import read_index
from pipeline.store.layout import Layout
from pipeline.store.plan import bucketed_batches, make_plan
from pipeline.store.schema import check_plan
from pipeline.store.sealed import read_record, write_record
from pipeline.teacher.capture import capture as module
from pipeline.teacher.capture.batch_size import (
    known_batch_tokens,
    settle_batch_tokens,
    worst_batches,
)
from pipeline.teacher.capture.complete import is_complete
from pipeline.teacher.capture.spec import planned_batch_tokens
from pipeline.teacher.workers import schedule
from tests.captured import OPTIONS, Captured, copied, prepared, receipts_mtimes, signal

CPU = torch.device("cpu")
SIGNALS = [signal("hidden", 2, "int8"), signal("logits", None, "topk", k=8)]
ADDED = [signal("hidden", 1, "bfloat16")]
AUTO = replace(OPTIONS, segment_tokens=256, batch_tokens="auto")
ROOM = 150
"""Tokens for which the crowded device below has memory."""
FITTING = 128
"""The largest of 8,192 and its halves whose batches, of examples of 20 tokens, have no more."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Captured:
    return prepared(tmp_path_factory.mktemp("corpus"), "llama", options=AUTO)


@pytest.fixture
def own(corpus, tmp_path) -> Captured:
    return copied(corpus, tmp_path / "own")


@pytest.fixture
def crowd(monkeypatch) -> Callable[[int], list[int]]:
    """Make teachers run out of memory above so many padded tokens; return the sizes they ran."""
    load = module.load_teacher

    def crowded(room: int) -> list[int]:
        ran: list[int] = []

        def refuse(part: Any, args: Any, keywords: dict[str, Any]) -> None:
            tokens = keywords["input_ids"].numel()
            if tokens > room:
                raise torch.OutOfMemoryError(f"{tokens} tokens")
            ran.append(tokens)

        def loaded(*args: Any, **keywords: Any) -> Any:
            model = load(*args, **keywords)
            model.base_model.register_forward_pre_hook(refuse, with_kwargs=True)
            return model

        monkeypatch.setattr(module, "load_teacher", loaded)
        return ran

    return crowded


def test_auto_takes_what_fits_and_stays_with_it(own, crowd, monkeypatch, caplog):
    with monkeypatch.context(), caplog.at_level(logging.INFO):
        crowd(ROOM)
        own.capture(SIGNALS)
    assert caplog.text.count("do not fit into memory, trying half") == 6
    assert own.reader.plan["batch_tokens"] == FITTING
    assert own.reader.plan["spec"]["segments"]["batch_tokens"] == "auto"
    assert planned_batch_tokens(own.reader.plan) == FITTING
    assert is_complete(own.layout, SIGNALS, [])
    # With all the room there is, a layer that is added still runs in the batches of the others.
    written, store = receipts_mtimes(own), own.store
    own.capture([*SIGNALS, *ADDED])
    assert own.store == store
    assert {path: receipts_mtimes(own)[path] for path in written} == written
    # And all of it is what that number captures where it was asked for.
    twin = copied(own, own.root.parent / "twin")
    twin.capture([*SIGNALS, *ADDED], options=replace(AUTO, batch_tokens=FITTING))
    (asked,) = (path for path in twin.stores.iterdir() if path.name != store.name)
    found = read_index(Layout(asked))["signals"]
    assert {name: entry["digest"] for name, entry in found.items()} == own.digests()


def test_a_number_that_does_not_fit_is_refused_before_anything_is_written(own, crowd):
    crowd(ROOM)
    with pytest.raises(ResourceError, match=r"up to 200 tokens.*set it to auto.*nothing was writ"):
        own.capture(SIGNALS, options=replace(AUTO, batch_tokens=200))
    assert not own.layout.plan.exists()
    assert not own.layout.features.exists()


def test_what_is_added_must_fit_into_the_store_s_batches(own, crowd):
    own.capture(SIGNALS)
    assert own.reader.plan["batch_tokens"] == 8192
    digests = own.digests()
    crowd(ROOM)
    with pytest.raises(ResourceError, match=r"up to 8192 tokens.*they are fixed for this store"):
        own.capture([*SIGNALS, *ADDED])
    assert own.digests() == digests
    assert is_complete(own.layout, SIGNALS, [])


def test_memory_that_is_gone_later_ends_the_capture(own, monkeypatch):
    """Batches were tried, so the plan stays and finished segments are kept."""

    def full(*_: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(schedule.SegmentCapture, "launch", full)
        with pytest.raises(ResourceError, match=r"in a batch of the store's 8192 tokens.*are kept"):
            own.capture(SIGNALS)
    own.capture(SIGNALS)
    assert is_complete(own.layout, SIGNALS, [])


def test_blocks_alone_are_tried_as_well(own, crowd):
    ran = crowd(ROOM)
    own.capture([], blocks=[1])
    assert own.reader.plan["batch_tokens"] == FITTING
    assert max(ran) <= ROOM


def test_a_plan_must_say_what_auto_came_to(own):
    own.capture(SIGNALS)
    assert known_batch_tokens(own.layout, "auto") == 8192
    assert known_batch_tokens(own.layout, 7) == 7
    record = read_record(own.layout.plan, own.store)
    without = {key: value for key, value in record.items() if key != "batch_tokens"}
    with pytest.raises(IntegrityError, match="expected the number that auto came to"):
        check_plan(without, own.layout.plan)
    digests = own.digests()
    write_record(own.layout.plan, without)
    assert known_batch_tokens(own.layout, "auto") is None
    own.capture(SIGNALS)
    assert known_batch_tokens(own.layout, "auto") == 8192
    assert own.digests() == digests


def settled(fits: Callable[[int], bool], **options: Any) -> int:
    defaults: dict[str, Any] = {
        "known": None,
        "is_stored": False,
        "nearby": None,
        "device": CPU,
        "longest": 100,
    }
    return settle_batch_tokens(fits=fits, **defaults | options)


def test_halving_begins_with_the_device_or_a_store_beside():
    assert settled(lambda _: True) == 8192
    assert settled(lambda _: True, device=torch.device("cuda")) == 65_536
    assert settled(lambda size: size < 3000) == 2048
    assert settled(lambda _: True, nearby=96) == 96
    assert settled(lambda size: size < 50, nearby=96, longest=20) == 48


def test_one_example_that_does_not_fit_ends_the_search():
    tried: list[int] = []
    with pytest.raises(ResourceError, match="not even one example of 100 tokens"):
        settled(lambda size: tried.append(size) or False)
    assert tried[-1] == 64


lengths = st.lists(st.integers(1, 40), min_size=1, max_size=30)


@given(train=lengths, test=st.lists(st.integers(1, 60), max_size=10), size=st.integers(1, 100))
def test_no_batch_needs_more_than_the_worst(train, test, size):
    of = {"train": np.array(train), "validation": np.array([], int), "test": np.array(test, int)}
    plan = make_plan(of, segment_tokens=64, seed=0)
    found = worst_batches(plan, size)

    def needs(number: int, members: Any) -> tuple[int, int, int]:
        own = plan.length[plan.in_segment(number)][members]
        return own.max() * len(own), own.max() ** 2 * len(own), own.sum()

    tried = {split: [needs(*one) for one in batches] for split, batches in found.items()}
    assert TRAIN in found
    for split in SPLITS:
        worst = np.max([*tried[TRAIN], *tried.get(split, [])], axis=0)
        for number in plan.segments_of(split):
            for members in bucketed_batches(plan.length[plan.in_segment(number)], size):
                assert (needs(number, members) <= worst).all()


SCRIPT = """
import resource, sys, torch
from pathlib import Path
from tests.captured import Captured
from tests.teacher.test_batch_size import LIMITED, SIGNALS
torch.randn(64, 64) @ torch.randn(64, 64)
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + int(sys.argv[2]) * 2**20,) * 2)
Captured(Path(sys.argv[1]), "causal-lm", LIMITED).capture(SIGNALS)
"""
LIMITED = replace(OPTIONS, segment_tokens=16_384, batch_tokens="auto")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit of address space")
def test_auto_finds_what_a_process_may_have(tmp_path):
    """A pass of 8,192 tokens makes three arrays of 512 MiB; 700 MiB have room for none of it."""
    rows = {"lengths": {"train": [64] * 128, "validation": [8], "test": [8]}, "max_length": 64}
    own = prepared(
        tmp_path, "llama", options=LIMITED, rows=rows, layers=2, intermediate_size=16_384
    )
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), "700"],
        # glibc reserves 64 MiB of addresses, not of memory, for each thread that begins.
        env=os.environ | {"MALLOC_ARENA_MAX": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    assert own.reader.plan["batch_tokens"] in (1024, 2048, 4096)
    assert is_complete(own.layout, SIGNALS, [])
