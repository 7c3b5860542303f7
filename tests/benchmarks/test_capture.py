"""Every arm of the capture benchmark runs. Nothing is timed."""

from pathlib import Path

import pytest

from benchmarks.capture import ARMS, lay_out
from benchmarks.capture_arms import Arm, Setting


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Setting:
    setting = Setting(str(tmp_path_factory.mktemp("capture")), (1, 2), 512, 512)
    ran = lay_out(Path(setting.root), setting, tokens=1024, layers=2, width=24, vocab=97)
    assert ran > 0
    return setting


@pytest.mark.parametrize("name", ARMS)
def test_an_arm_runs_over_the_corpus(setting, name):
    lap = Arm(name, setting).lap()
    assert lap.seconds > 0
    assert (lap.bytes > 0) == (name not in ("base", "full"))
