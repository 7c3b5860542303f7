"""No space left: one line, exit code 5, and what was finished stays valid and is taken up again."""

import resource

import numpy as np
import pytest

from pipeline.errors import ResourceError
from pipeline.store.background import BackgroundWriter
from pipeline.store.reader import StoreReader
from tests.store.synthetic import Synthetic, identity, name_of, plan

NAME = name_of("hidden", 1, "float16")


@pytest.fixture
def file_limit():
    """Files of this process may not grow beyond 250 bytes: a write fails part of the way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (250, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("unsynced")
def test_earlier_segments_stay_valid(tmp_path, file_limit, whole_store, ledger):
    synthetic = Synthetic(tmp_path / "s")
    synthetic.plan()
    writer = synthetic.writer(NAME)
    writer.declare()

    def write(segment: int) -> None:
        buffers = synthetic.buffers(writer, segment)
        writer.write_segment(segment, buffers, rows=identity(segment))

    def write_all() -> None:
        with BackgroundWriter() as background:
            background.submit(lambda: write(0))
            background.submit(lambda: None)
            background.submit(file_limit)
            for segment in range(1, plan().segments):
                background.submit(lambda segment=segment: write(segment))

    said = r"cannot be written \(.*: needs [0-9,]+ bytes, [0-9,]+ free\); free space"
    with pytest.raises(ResourceError, match=said) as raised:
        write_all()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    ledger.record("file too large: shard", detected=list(writer.receipts(verify=True)) == [0])
    assert raised.value.exit_code == 5
    assert soft == 250
    assert list(writer.receipts(verify=True)) == [0]
    assert [path for path in synthetic.layout.staging.rglob("*") if path.is_file()] == []
    assert StoreReader(synthetic.root).signals == []
    synthetic.signal(NAME)
    digest = StoreReader(whole_store).signal(NAME).digest
    segment = StoreReader(synthetic.root, {NAME: digest}).read_segment(0, [NAME])
    assert np.isfinite(segment.features[NAME]["values"]).all()
