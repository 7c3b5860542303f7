"""Staged by anybody, published by the holder of the lock alone; what is late harms nothing."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.errors import ResourceError
from pipeline.store.reader import StoreReader
from tests.store.synthetic import Synthetic, identity, name_of, plan

pytestmark = pytest.mark.usefixtures("unsynced")
NAME = name_of("hidden", 2, "int8")
BELOW = name_of("attention", 3, "below")


@pytest.fixture
def synthetic(tmp_path) -> Synthetic:
    """A store with a plan and a declared signal."""
    found = Synthetic(tmp_path / "s")
    found.plan()
    found.writer(NAME).declare()
    return found


def stage(synthetic: Synthetic, segment: int, attempt: str):
    writer = synthetic.writer(NAME)
    buffers = synthetic.buffers(writer, segment)
    return writer.stage_segment(segment, buffers, rows=identity(segment), attempt=attempt)


def files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def test_staged_and_published_is_written(synthetic, whole_store):
    synthetic.layout.attempt("a").mkdir(parents=True)
    with ThreadPoolExecutor(3) as pool:
        segments = range(plan().segments)
        receipts = list(pool.map(lambda segment: stage(synthetic, segment, "a"), segments))
    for receipt in reversed(receipts):
        synthetic.writer(NAME).publish_segment(receipt, attempt="a")
    assert files(synthetic.layout.staging) == []
    assert synthetic.writer(NAME).missing() == []
    synthetic.writer(NAME).commit()
    digest = StoreReader(whole_store).signal(NAME).digest
    assert StoreReader(synthetic.root).signal(NAME).digest == digest


def test_staging_shows_nowhere(synthetic):
    synthetic.layout.attempt("a").mkdir(parents=True)
    before = files(synthetic.layout.features) + files(synthetic.root / "receipts")
    stage(synthetic, 0, "a")
    assert files(synthetic.layout.features) + files(synthetic.root / "receipts") == before
    assert synthetic.writer(NAME).missing() == list(range(plan().segments))


def test_an_attempt_that_is_over_takes_nothing(synthetic):
    with pytest.raises(ResourceError, match=r"staging/a: is gone, so another capture .* finish"):
        stage(synthetic, 0, "a")
    assert not synthetic.layout.attempt("a").exists()


def test_what_another_capture_cleared_is_not_published(synthetic):
    synthetic.layout.attempt("a").mkdir(parents=True)
    receipt = stage(synthetic, 0, "a")
    shutil.rmtree(synthetic.layout.staging)
    with pytest.raises(ResourceError, match="is gone, so another capture") as raised:
        synthetic.writer(NAME).publish_segment(receipt, attempt="a")
    assert raised.value.exit_code == 5
    assert 0 in synthetic.writer(NAME).missing()


def test_a_late_twin_of_a_worker_cannot_alter_what_is_published(synthetic):
    """Two workers compute one segment, with other bytes, and the slower one ends last."""
    synthetic.layout.attempt("a").mkdir(parents=True)
    receipt = stage(synthetic, 0, "a")
    writer = synthetic.writer(NAME)
    others = {name: values + 1 for name, values in synthetic.buffers(writer, 0).items()}
    late = writer.stage_segment(0, others, rows=identity(0), attempt="a")
    assert late.files != receipt.files
    writer.publish_segment(receipt, attempt="a")
    assert writer.stage_segment(0, others, rows=identity(0), attempt="a") == late
    assert list(writer.receipts(verify=True)) == [0]


def test_a_receipt_does_not_outlive_the_shards_it_speaks_of(synthetic, monkeypatch):
    """Killed while a damaged segment is replaced: the old receipt must not vouch for new files."""
    synthetic.signal(NAME)
    synthetic.layout.attempt("a").mkdir(parents=True)
    receipt = stage(synthetic, 1, "a")
    path = synthetic.layout.receipt(NAME, 1)

    def killed(*_):
        assert not path.exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        synthetic.writer(NAME).publish_segment(receipt, attempt="a")
    assert synthetic.writer(NAME).receipts(verify=False).keys() == {0, 2, 3}


def test_a_signal_without_arrays_stages_nothing(synthetic):
    writer = synthetic.writer(BELOW)
    writer.declare()
    receipt = writer.stage_segment(0, {}, rows=identity(0), attempt="a")
    writer.publish_segment(receipt, attempt="a")
    assert list(writer.receipts(verify=True)) == [0]
    assert not synthetic.layout.attempt("a").exists()
