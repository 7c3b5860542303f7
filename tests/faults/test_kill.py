"""`kill -9` at any step: readers see only whole signals; resuming gives the undisturbed store."""

import signal
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import IntegrityError
from pipeline.store.layout import Layout
from pipeline.store.reader import StoreReader
from tests.faults.forked import Child, start
from tests.faults.write_and_die import NAMES, main
from tests.store.synthetic import Synthetic, plan

NEVER = 10**6


def write_and_die(store: Path, steps: int) -> Child:
    store.mkdir()
    return start(main, store, steps, stderr=store.with_suffix(".txt"))


def digests(store: Path) -> dict[str, str]:
    reader = StoreReader(store)
    return {name: reader.signal(name).digest for name in reader.signals}


def check_readable(store: Path, whole: Path) -> list[str]:
    """Whatever a reader sees is whole and right; return the signals it sees."""
    if not Layout(store).index.exists():
        with pytest.raises(IntegrityError, match="no complete store is here"):
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
    child = write_and_die(store, NEVER)
    assert child.wait() == 0, child.errors()
    return store, int(child.errors())


@pytest.mark.usefixtures("unsynced")
def test_kill_at_every_kind_of_step_and_resume(tmp_path, undisturbed, ledger, times):
    """A process is killed at steps spread over the run; another one takes up what it left."""
    whole, steps = undisturbed
    wanted = np.linspace(1, steps - 1, times(5, 100)).astype(int)
    for at in np.unique(wanted).tolist():
        store = tmp_path / str(at)
        assert write_and_die(store, at).wait() == -signal.SIGKILL
        seen = check_readable(store, whole)
        Synthetic(store).run(NAMES)
        ledger.record("killed writer", detected=digests(store) == digests(whole))
        assert digests(store) == digests(whole)
        assert set(seen) <= set(NAMES)
        assert check_readable(store, whole) == sorted(NAMES)


class KilledError(BaseException):
    """Stands for a death of the process: nothing that the software catches."""


@pytest.mark.usefixtures("unsynced")
def test_death_before_or_after_a_rename(tmp_path, monkeypatch, undisturbed, ledger, times):
    """The same within this process: before odd ones, after even ones."""
    whole, _ = undisturbed
    replace = Path.replace
    for number in range(1, 1000, times(15, 1)):
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
        same = digests(synthetic.root) == digests(whole)
        ledger.record("killed writer: at a rename", detected=same)
        assert same
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
