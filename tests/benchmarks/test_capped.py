import json

import pytest

from benchmarks.capped import OVER, run
from benchmarks.capped_arms import Size, capture_once

SMALL = Size(
    layers=2, width=32, heads=4, vocab=300, student_width=16, maps=((1, 2),), length=32, rows=16,
    segment_rows=8, batch=2, steps=2,
)  # fmt: skip


@pytest.mark.slow
def test_a_cap_is_what_a_process_may_take_and_no_more(tmp_path):
    capture_once(SMALL, tmp_path, "cpu")
    free = run("live", SMALL, tmp_path, "cpu")
    assert free["tokens_a_second"] > 0
    cap = round(OVER * free["capped_bytes"])
    assert run("aligned", SMALL, tmp_path, "cpu", cap=cap)["capped_bytes"] <= cap
    refused = run("aligned", SMALL, tmp_path, "cpu", cap=free["library_capped_bytes"])
    assert "error" in refused, json.dumps(refused)
