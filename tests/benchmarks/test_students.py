import pytest

from benchmarks.students import ARMS, Size, capture_once, child
from pipeline.store.reader import StoreReader

SMALL = Size(tokens=4096, layers=2, width=48, segment_tokens=512)


@pytest.mark.slow
def test_four_students_read_the_store_once(tmp_path, monkeypatch):
    # Where a child counts; in a process of its own it puts nothing back.
    monkeypatch.setattr(StoreReader, "read_segment", StoreReader.read_segment)
    capture_once(SMALL, tmp_path)
    alone, together = (child(arm, SMALL, tmp_path) for arm in ARMS)
    assert len(set(alone["weights"])) == 4
    assert together["weights"] == alone["weights"]
    assert alone["segments_decoded"] == 4 * together["segments_decoded"]
