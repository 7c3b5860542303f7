"""A plan's bytes beside those of the store that the same capture then writes."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.planning.estimate import (
    SegmentRows,
    asset_bytes,
    buffered_bytes,
    estimate_signal,
)
from pipeline.planning.probe import probe
from pipeline.planning.token_count import counted, sample_segment
from pipeline.store.forms.registry import FORMS
from pipeline.store.reader import StoreReader
from pipeline.teacher.capture.outline import known_config, outline, outlined_report
from pipeline.teacher.capture.spec import SegmentOptions
from pipeline.teacher.source.load import load_teacher
from pipeline.teacher.source.reference import TeacherReference
from tests.captured import prepared, signal

BATCH_TOKENS = 256
OPTIONS = SegmentOptions(segment_tokens=512, chunk_tokens=64, batch_tokens=BATCH_TOKENS)
GENERATOR = np.random.default_rng(0)
ROWS = {
    "lengths": {
        "train": tuple(GENERATOR.integers(3, 31, 120).tolist()),
        "validation": (6, 12, 30, 9),
        "test": (10, 4, 15, 7),
    }
}
SIGNALS = [
    *(signal("hidden", 1, form) for form in ("float16", "bfloat16", "int8")),
    signal("attention", 2, "below"),
    *(signal("attention", 2, form) for form in ("qk", "map")),
    signal("value", 3, "int8"),
    signal("logits", None, "topk", k=16),
    signal("logits", None, "sampled", n=8),
    signal("logits", None, "head"),
]
BLOCKS = [1, 3]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    found = prepared(tmp_path_factory.mktemp("planned"), "llama", options=OPTIONS, rows=ROWS)
    found.capture(SIGNALS, blocks=BLOCKS)
    return found


@pytest.fixture(scope="module")
def planned(whole):
    """The plan, the teacher's outline, and what it says of its sizes."""
    config = known_config(TeacherReference.load(whole.teacher).config)
    model = outline(config, task="causal-lm", dtype=torch.float32)
    return counted(whole.tokens).plan(OPTIONS), model, outlined_report(model, SIGNALS)


@pytest.fixture(scope="module")
def probed(whole):
    count = counted(whole.tokens)
    device = torch.device("cpu")
    model = load_teacher(
        whole.teacher,
        TeacherReference.load(whole.teacher),
        task="causal-lm",
        device=device,
        dtype=torch.float32,
    )
    return probe(
        model,
        sample_segment(count.token_set, OPTIONS, 700),
        SIGNALS,
        batch_tokens=BATCH_TOKENS,
        chunk_tokens=OPTIONS.chunk_tokens,
        pad_id=count.meta.pad_id,
        max_length=count.meta.max_length,
        device=device,
    )


def estimates(planned, ratios=None):
    plan, model, report = planned
    return [
        estimate_signal(
            one,
            SegmentRows(plan, OPTIONS.chunk_tokens),
            model=model,
            report=report,
            ratio=(ratios or {}).get(one.name),
        )
        for one in SIGNALS
    ]


def live_bytes(reader: StoreReader, name: str) -> int:
    """The bytes of the rows of examples, as the store's own arrays have them."""
    found = 0
    for number in reader.signal(name).receipts:
        segment = reader.read_segment(number, [name])
        rows = sum(last - first for first, last in segment.spans[name].tolist())
        found += sum(rows * values[:1].nbytes for values in segment.features[name].values())
    return found


def test_bytes_before_compression_are_exactly_those_of_the_stores_arrays(whole, planned):
    for one in estimates(planned):
        assert one.raw_bytes == live_bytes(whole.reader, one.signal.name), one.signal.name
        assert one.tokens == whole.reader.signal(one.signal.name).tokens


def test_no_signal_takes_more_than_it_may_at_most(whole, planned):
    for one in estimates(planned):
        took = whole.reader.signal(one.signal.name).bytes
        assert took <= one.most_bytes, one.signal.name
        assert one.expected_bytes <= one.most_bytes


def test_a_probe_tells_the_bytes_of_every_form_within_five_percent(whole, planned, probed):
    for one in estimates(planned, probed.ratios):
        took = whole.reader.signal(one.signal.name).bytes
        assert one.expected_bytes == pytest.approx(took, rel=0.05), one.signal.name
        assert one.is_measured == (one.signal.form.name != "below")


def test_a_probe_times_the_teacher_within_its_capture_and_finds_the_sizes(probed, planned):
    assert 0 < probed.forward_seconds < probed.capture_seconds
    assert probed.read_seconds > 0
    assert probed.peak_bytes > 0
    report = planned[2]
    for key in ("heads", "kv_heads", "d_head", "d_value", "d_teacher", "rule", "depth"):
        assert getattr(probed.report, key) == getattr(report, key), key


def test_assets_are_told_to_the_byte_but_for_their_headers(whole, planned):
    _, model, report = planned
    told = asset_bytes(SIGNALS, BLOCKS, model, report)
    for name, entry in whole.index["assets"].items():
        found = entry["bytes"]
        # safetensors says names, dtypes and shapes before the values.
        assert told[name] <= found < told[name] + 8192, name
    statistics = sum(path.stat().st_size for path in Path(whole.store, "assets").rglob("*hidden*"))
    assert told["channels"] >= statistics * 0.3


def test_every_form_has_a_ratio():
    assert all(0 < form().ratio <= 1 for form in FORMS.values())


def test_the_form_inside_a_head_decides_its_ratio():
    for name in ("float16", "bfloat16", "int8"):
        inner = signal("hidden", 1, name).form
        assert signal("logits", None, "head", values=name).form.ratio == inner.ratio


def test_a_segment_in_memory_is_at_least_the_fullest_one(whole, planned):
    plan = planned[0]
    found = buffered_bytes(estimates(planned)[:3], plan)
    assert found == plan.segment_tokens * sum(one.row_bytes for one in estimates(planned)[:3])
