"""Everything that can happen to a store, in any order, against a model of it in memory.

The model is the bytes of an undisturbed store, which are a function of nothing else, and the set of
signals that readers may see. What must be damaged follows from comparing files with those bytes, in
a few lines that share nothing with `verify_store`.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from pipeline.errors import DecantError, IncompatibleError, IntegrityError
from pipeline.provenance import fingerprint, read_json, unfinished_files
from pipeline.store.lock import writer_lock
from pipeline.store.reader import StoreReader
from pipeline.store.upkeep.copy import copy_store
from pipeline.store.upkeep.findings import ASSETS, INDEX, PLAN
from pipeline.store.upkeep.gc import remove_signal
from pipeline.store.upkeep.repair import repair
from pipeline.store.upkeep.verify import verify_store
from tests.faults.ledger import SESSION
from tests.store.synthetic import Synthetic, name_of

TRAIN = ("train",)
INT8 = name_of("hidden", 2, "int8")
NAMES = [INT8, name_of("hidden", 1, "float16"), name_of("hidden", 1, "bfloat16")]
"""The last two share the statistics of their layer."""
LENGTHS = ("features.zarr/examples/length", "features.zarr/examples/segment")
"""What the sizes of a signal's arrays are derived from."""
OPERATIONS = ("replace", "rename", "unlink", "rmdir")
Values = dict[str, bytes]


class Killed(BaseException):
    """The process ends here; whatever catches it finds that nothing can be changed any more."""


def killed(at: int, run: Callable[[], Any]) -> bool:
    """Run until just before the `at`-th change of a name; tell whether there were as many."""
    done = 0

    def dying(change: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal done
            done += 1
            if done >= at:
                raise Killed
            return change(*arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in OPERATIONS:
            patch.setattr(os, name, dying(getattr(os, name)))
        try:
            run()
        except Killed:
            return True
    return False


def files_of(root: Path) -> list[str]:
    return sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())


def values_of(reader: StoreReader, name: str) -> Values:
    """All that a reader gets of a signal, rows included."""
    found = {}
    for number in reader.signal(name).receipts:
        segment = reader.read_segment(number, [name])
        arrays = {**segment.tokens, **segment.features[name]}
        found |= {f"{number}/{part}": array.tobytes() for part, array in arrays.items()}
    channels = reader.channels(name)
    return found | ({} if channels is None else {"mean": channels.mean.tobytes()})


def write(root: Path, names: list[str]) -> None:
    """The steps of a capture."""
    store = Synthetic(root)
    with writer_lock(store.layout.lock):
        shutil.rmtree(store.layout.staging, ignore_errors=True)
        for left in unfinished_files(root):
            left.unlink()
        store.plan()
        for name in names:
            store.signal(name, TRAIN)


@cache
def golden() -> Path:
    """An undisturbed store with every signal; a directory of this process."""
    root = Path(tempfile.mkdtemp()) / "store"
    write(root, NAMES)
    return root


@cache
def truth() -> tuple[dict[str, bytes], dict[str, Values]]:
    """Bytes of every file but the index and the lock, and what readers get of every signal."""
    root = golden()
    reader = StoreReader(root)
    names = [name for name in files_of(root) if name not in ("manifest.json", "lock")]
    return {name: (root / name).read_bytes() for name in names}, {
        name: values_of(reader, name) for name in NAMES
    }


class StoreMachine(RuleBasedStateMachine):
    """A store on disk, which signals readers may see, and what is known to be wrong with it."""

    def __init__(self) -> None:
        super().__init__()
        self.home = Path(tempfile.mkdtemp())
        self.root = self.home / "0" / "store"
        self.indexed: set[str] = set()
        self.held: StoreReader | None = None
        self.fault = ""
        self.copies = 0
        self.files, self.values = truth()

    def teardown(self) -> None:
        shutil.rmtree(self.home)

    # The model: what is wrong, from the bytes on disk and those of the undisturbed store.

    def hurt(self) -> set[str]:
        """Files that are not what they were in the undisturbed store; the index is apart."""
        beside = {f"assets/tokenizer/{name}" for name in files_of(self.root / "assets/tokenizer")}
        hurt = {name for name, data in self.files.items() if self._bytes(name) != data}
        return hurt | (beside - self.files.keys())

    def _bytes(self, name: str) -> bytes | None:
        path = self.root / name
        return path.read_bytes() if path.is_file() else None

    def index(self) -> dict[str, Any] | None:
        """The index, if it is one."""
        try:
            found = read_json(self.root / "manifest.json")
            seal = found.pop("seal")
            return found if fingerprint(found) == seal else None
        except (DecantError, KeyError, TypeError, AttributeError):
            return None

    def manifests(self) -> set[str]:
        return {n for n in NAMES if (self.root / f"manifests/{n.replace('/', '.')}.json").exists()}

    def damaged(self) -> set[str]:
        """The parts of the store that must be found damaged."""
        hurt, index, parts = self.hurt(), self.index(), set()
        claimed = self.manifests() if index is None else set(index["signals"])
        if index is None and (claimed or (self.root / "manifest.json").exists()):
            parts.add(INDEX)
        if index is None and not claimed and not (self.root / "manifests/plan.json").exists():
            return parts  # a capture that has not got so far
        sizes_are_known = not any(
            name == "manifests/plan.json" or name.startswith(LENGTHS) for name in hurt
        )
        for file in hurt:
            is_metadata = file.endswith("zarr.json")
            signals = {name for name in claimed if self._is_of(file, name)}
            if sizes_are_known or not is_metadata:
                parts |= signals
            planned = ("features.zarr/tokens", "features.zarr/examples", "assets/t")
            if file.startswith((*planned, "manifests/plan", "features.zarr/zarr.json")):
                parts.add(PLAN)
        return parts

    @staticmethod
    def _is_of(file: str, name: str) -> bool:
        """Tell whether a signal needs a file: its own, a group's above it, or its statistics."""
        folder, dotted = f"features.zarr/{name}", name.replace("/", ".")
        kind, layer, _ = name.split("/")
        return (
            file.startswith((f"{folder}/", f"receipts/{dotted}/"))
            or file == f"manifests/{dotted}.json"
            or file == f"assets/channels/{kind}.{layer}.safetensors"
            or (file.endswith("/zarr.json") and folder.startswith(f"{file[:-10]}/"))
        )

    # What happens.

    @initialize(names=st.sets(st.sampled_from(NAMES)))
    def begin(self, names: set[str]) -> None:
        shutil.copytree(golden(), self.root)
        self.indexed = set(NAMES)
        for name in sorted(names):
            self._remove(name)

    @rule(name=st.sampled_from(NAMES))
    def write(self, name: str) -> None:
        """A capture of one signal; what it leaves is whole."""
        before = self.damaged()
        self._run(lambda: self._write([name]))
        self._settle("write", gained={name, *self.manifests()}, lost=before)
        assert name in self.indexed or PLAN in before, name

    @rule(name=st.sampled_from(NAMES), at=st.integers(1, 40))
    def write_and_die(self, name: str, at: int) -> None:
        before = self.damaged()
        self._run(lambda: killed(at, lambda: self._write([name])))
        self._settle("killed write", gained={name, *self.manifests()}, lost={name, *before})

    @rule(place=st.floats(0, 1), where=st.floats(0, 1), bit=st.integers(0, 7))
    def flip(self, place: float, where: float, bit: int) -> None:
        path = self._some(place)
        data = bytearray(path.read_bytes())
        if data:
            data[min(int(where * len(data)), len(data) - 1)] ^= 1 << bit
            path.write_bytes(bytes(data))
            self.fault = "flipped bit"

    @rule(place=st.floats(0, 1), share=st.sampled_from([0.0, 0.5, 0.99]))
    def cut(self, place: float, share: float) -> None:
        path = self._some(place)
        if size := path.stat().st_size:
            os.truncate(path, min(int(size * share), size - 1))
            self.fault = "cut file"

    @rule(place=st.floats(0, 1))
    def lose(self, place: float) -> None:
        self._some(place).unlink()
        self.fault = "lost file"

    @rule()
    def repair(self) -> None:
        """Verify, repair, capture: all that readers could see they see again."""
        before, damaged = set(self.indexed), self.damaged()
        with writer_lock(self.root / "lock"):
            repair(self.root, verify_store(self.root))
        assert not self.damaged() & set(NAMES)
        self._settle("repair", gained=self.manifests(), lost=damaged)
        self._write(sorted(before))
        self._settle("repair", gained=before | self.manifests(), lost=set())
        assert not self.damaged()
        assert before <= self.indexed

    @rule(at=st.integers(1, 8))
    def repair_and_die(self, at: int) -> None:
        damaged = self.damaged()
        with writer_lock(self.root / "lock"):
            found = verify_store(self.root)
            killed(at, lambda: repair(self.root, found))
        self._settle("killed repair", gained=self.manifests(), lost=damaged)

    @rule(name=st.sampled_from(NAMES))
    def remove(self, name: str) -> None:
        self._remove(name)

    def _remove(self, name: str, at: int = 10**9) -> None:
        self._run(lambda: killed(at, lambda: remove_signal(self.root, name)))
        self._settle("removal", gained=set(), lost={name})

    @rule(name=st.sampled_from(NAMES), at=st.integers(1, 12))
    def remove_and_die(self, name: str, at: int) -> None:
        self._remove(name, at)

    @rule(at=st.integers(1, 80), is_adopted=st.booleans())
    def copy(self, at: int, is_adopted: bool) -> None:
        """Copied, killed and copied again: the other end shows whole signals or nothing."""
        self.copies += 1
        target = self.home / str(self.copies)
        # A store without a complete signal has nothing to copy.
        is_complete = not self.damaged() and self.index() is not None and bool(self.indexed)
        self._run(lambda: killed(at, lambda: copy_store(self.root, target)))
        self._read(target / "store")
        try:
            root = copy_store(self.root, target)
        except DecantError:
            assert not is_complete
            return
        assert {s.state for s in verify_store(root)} == {"whole"}
        assert set(StoreReader(root).signals) == self.indexed
        self.fault = "copy"
        if is_adopted:
            self.root, self.held = root, None

    @rule()
    def open(self) -> None:
        """A reader that stays open whatever happens next."""
        try:
            self.held = StoreReader(self.root)
        except IntegrityError:
            self.held = None

    @precondition(lambda self: self.held is not None)
    @invariant()
    def an_open_reader_reads_right_or_raises(self) -> None:
        assert self.held is not None
        for name in self.held.signals:
            self._read_signal(self.held, name)

    @precondition(lambda self: self.root.exists())
    @invariant()
    def readers_and_verify_agree_with_the_model(self) -> None:
        damaged = self.damaged()
        found = {s.name for s in verify_store(self.root) if s.is_damaged and s.name != ASSETS}
        readable = self._read(self.root)
        there = set() if damaged & {INDEX, PLAN} else self.indexed - damaged
        if self.fault:
            SESSION.record(
                f"state machine: {self.fault}",
                detected=found == damaged,
                lost=not there <= readable,
            )
        assert found == damaged, (found, damaged, self.hurt())
        assert there <= readable
        self.fault = ""

    # What the rules share.

    def _some(self, place: float) -> Path:
        names = [name for name in files_of(self.root) if name != "lock"]
        return self.root / names[min(int(place * len(names)), len(names) - 1)]

    def _write(self, names: list[str]) -> None:
        for name in self.files:
            # A real capture measures again what is not the statistics that were declared.
            if name.startswith("assets/channels/") and self._bytes(name) != self.files[name]:
                (self.root / name).unlink(missing_ok=True)
        write(self.root, names)

    def _run(self, run: Callable[[], Any]) -> None:
        """A step on a damaged store may be refused; an altered file of a pending signal will do."""
        may_refuse = (
            self.index() is None
            or bool(self.damaged())
            or any((self.root / name).exists() for name in self.hurt())
        )
        try:
            run()
        except IntegrityError:
            if not may_refuse:
                raise
        except IncompatibleError as error:
            # Of a signal that is not there.
            assert re.search("no signal|none of its signals", str(error))  # noqa: PT017

    def _settle(self, fault: str, *, gained: set[str], lost: set[str]) -> None:
        """Take over what the index says, if no signal came or went that had no reason to."""
        self.fault = fault
        index = self.index()
        if index is None:
            return
        after = set(index["signals"])
        if not lost & {INDEX, PLAN}:
            assert self.indexed - after <= lost
        assert after - self.indexed <= gained
        self.indexed = after

    def _read(self, root: Path) -> set[str]:
        """Return the signals that can be read; what is read must be right."""
        try:
            reader = StoreReader(root)
        except IntegrityError:
            return set()
        return {name for name in reader.signals if self._read_signal(reader, name)}

    def _read_signal(self, reader: StoreReader, name: str) -> bool:
        try:
            found = values_of(reader, name)
        except (IntegrityError, IncompatibleError):
            return False
        if found != self.values[name]:
            SESSION.record(f"state machine: {self.fault}", detected=False, wrong=True)
        assert found == self.values[name]
        return True


@pytest.mark.usefixtures("unsynced")
def test_nothing_that_happens_shows_a_wrong_value_or_loses_a_right_one(times):
    run_state_machine_as_test(
        StoreMachine,
        settings=settings(
            max_examples=times(6, 120),
            stateful_step_count=times(10, 40),
            deadline=None,
            # Shrinking a list of steps that write files takes longer than reading it.
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )
