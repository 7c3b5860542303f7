"""`kill -9` at any step: readers see only whole signals; resuming gives the undisturbed store."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import IntegrityError
from pipeline.store.layout import Layout
from pipeline.store.reader import StoreReader
from tests.faults.write_and_die import NAMES
from tests.store.synthetic import Synthetic, plan

ROOT = Path(__file__).parents[2]
NEVER = 10**6


def write_and_die(store: Path, steps: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.faults.write_and_die", str(store), str(steps)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def digests(store: Path) -> dict[str, str]:
    reader = StoreReader(store)
    return {name: reader.signal(name).digest for name in reader.signals}


def check_readable(store: Path, whole: Path) -> list[str]:
    """Whatever a reader sees is whole and right; return the signals it sees."""
    if not Layout(store).index.exists():
        with pytest.raises(IntegrityError, match="no whole store is here"):
            StoreReader(store)
        return []
    reader = StoreReader(store)
    expected = StoreReader(whole)
    for number in range(plan().segments):
        found = reader.read_segment(number, reader.signals)
        wanted = expected.read_segment(number, reader.signals)
        for name, parts in wanted.features.items():
            for part, array in parts.items():
                np.testing.assert_array_equal(found.features[name][part], array)
    return reader.signals


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    store = tmp_path_factory.mktemp("undisturbed") / "s"
    result = write_and_die(store, NEVER)
    assert result.returncode == 0, result.stderr
    return store, int(result.stdout)


@pytest.mark.slow
@pytest.mark.usefixtures("unsynced")
def test_kill_at_every_kind_of_step_and_resume(tmp_path, undisturbed):
    """A process is killed at 8 steps spread over the run, resumed and killed again, to the end."""
    whole, steps = undisturbed
    for number, at in enumerate(np.linspace(1, steps - 1, 8).astype(int).tolist()):
        store = tmp_path / str(number)
        assert write_and_die(store, at).returncode == -signal.SIGKILL
        seen = check_readable(store, whole)
        Synthetic(store).run(NAMES)
        assert digests(store) == digests(whole)
        assert set(seen) <= set(NAMES)
        assert check_readable(store, whole) == sorted(NAMES)


class KilledError(BaseException):
    """Stands for a death of the process: nothing that the software catches."""


@pytest.mark.usefixtures("unsynced")
def test_death_before_or_after_any_rename(tmp_path, monkeypatch, undisturbed):
    """The same for every third rename, within this process: before odd ones, after even ones."""
    whole, _ = undisturbed
    replace = Path.replace
    for number in range(1, 1000, 3):
        left = number

        def dying(self: Path, target: Path, number: int = number) -> Path:
            nonlocal left
            left -= 1
            if left == 0 and number % 2:
                raise KilledError
            result = replace(self, target)
            if left == 0:
                raise KilledError
            return result

        synthetic = Synthetic(tmp_path / str(number))
        monkeypatch.setattr(Path, "replace", dying)
        try:
            synthetic.run(NAMES)
        except KilledError:
            pass
        else:
            break
        finally:
            monkeypatch.setattr(Path, "replace", replace)
        check_readable(synthetic.root, whole)
        synthetic.run(NAMES)
        assert digests(synthetic.root) == digests(whole)
    assert number > 50


@pytest.mark.usefixtures("unsynced")
def test_a_resumed_run_rewrites_nothing_that_is_whole(tmp_path):
    class StopError(Exception):
        """Raised between two segments."""

    def stop(step: str) -> None:
        if step.startswith("segment 1"):
            raise StopError

    synthetic = Synthetic(tmp_path / "s", stop)
    with pytest.raises(StopError):
        synthetic.run(NAMES)
    assert StoreReader(synthetic.root).signals == []
    shards = [p for p in synthetic.layout.features.rglob("c/**/*") if p.is_file()]
    before = {path: path.stat().st_mtime_ns for path in shards}
    Synthetic(synthetic.root).run(NAMES)
    assert {path: path.stat().st_mtime_ns for path in shards} == before


@pytest.mark.usefixtures("unsynced")
def test_another_signal_touches_no_other(tmp_path):
    synthetic = Synthetic(tmp_path / "s")
    synthetic.run(NAMES[:1])
    first = digests(synthetic.root)
    layout = Layout(synthetic.root)
    files = [*layout.features.rglob("c/**/*"), *(layout.root / "receipts").rglob("0*.json")]
    before = {p: p.stat().st_mtime_ns for p in [*files, layout.manifest(NAMES[0])] if p.is_file()}
    synthetic.run(NAMES)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert digests(synthetic.root).items() > first.items()
