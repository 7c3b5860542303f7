"""A power cut or a kill at every file operation of a writer: what was said to be whole stays so.

One recorded run gives the disk after each of its operations; see `tests.faults.crash_model`.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import DecantError, IntegrityError
from pipeline.store.layout import Layout
from pipeline.store.reader import StoreReader
from pipeline.store.shards import bytes_digest
from tests.faults.crash_model import Event, Recorder, Tree, adversary
from tests.store.synthetic import Synthetic, name_of, plan

NAMES = (
    name_of("hidden", 2, "int8"),
    name_of("attention", 3, "below"),
    name_of("logits", None, "dense"),
)
STORE = "stores/s"
COMMITTED = "committed "
REWRITTEN = (f"{STORE}/assets/", f"{STORE}/receipts/assets/", f"{STORE}/manifest.json")
"""What the synthetic writer writes whenever it runs."""


def run(base: Path) -> list[Event]:
    """Bring the signals into the store below `base`, whatever is there; return all it did."""
    recorder = Recorder(base)
    with recorder.recording():
        Synthetic(base / STORE, recorder.mark).run(NAMES)
    return recorder.events


def replayed(events: list[Event], tree: Tree | None = None) -> Tree:
    tree = tree or Tree()
    for event in events:
        tree.apply(event)
    return tree


def committed(events: list[Event]) -> set[str]:
    """The signals that the writer has said to be whole."""
    marks = [event.path for event in events if event.kind == "mark"]
    return {mark.removeprefix(COMMITTED) for mark in marks if mark.startswith(COMMITTED)}


def values(store: Path) -> dict[str, bytes]:
    """All that a reader can get of the signals it sees, as bytes, and their digests."""
    reader = StoreReader(store)
    found = {f"digest {name}": reader.signal(name).digest.encode() for name in reader.signals}
    for number in range(plan().segments):
        segment = reader.read_segment(number, reader.signals)
        for name, parts in segment.features.items():
            found |= {f"{name}/{part}/{number}": a.tobytes() for part, a in parts.items()}
        found |= {f"{column}/{number}": a.tobytes() for column, a in segment.tokens.items()}
    for name in reader.signals:
        if (channels := reader.channels(name)) is not None:
            found[f"channels {name}"] = np.concatenate(
                [channels.mean, channels.deviation]
            ).tobytes()
    return found


def stated(disk: dict[str, bytes | None]) -> list[tuple[str, dict[str, int]]]:
    """Size and checksum of each file that a record on a disk states, by name."""
    layout, found = Layout(Path(STORE)), []
    for name, content in disk.items():
        if not content or not name.endswith(".json") or "zarr" in name:
            continue
        record = json.loads(content)
        match name.removeprefix(f"{STORE}/").split("/"):
            case ["manifest.json"]:
                found.append((str(layout.plan), record["plan"]))
                signals, assets = record["signals"].items(), record["assets"].values()
                found += [
                    (str(layout.manifest(name)), entry["manifest"]) for name, entry in signals
                ]
                found += [(str(layout.assets / entry["file"]), entry) for entry in assets]
            case ["manifests", file]:
                parts = [record] if file == "plan.json" else record["receipts"]
                found += [(f"{STORE}/{f}", entry) for p in parts for f, entry in p["files"].items()]
                declared = record.get("declaration", {})
                if declared.get("channels"):
                    place = layout.channels(declared["kind"], declared["layer"])
                    found.append((str(place), declared["channels"]))
            case ["receipts", _, _] if "files" in record:
                found += [(f"{STORE}/{f}", entry) for f, entry in record["files"].items()]
    return found


def broken_promises(disk: dict[str, bytes | None]) -> list[str]:
    """Return the files that records on a disk state, and that are not there as they state."""
    return [
        name
        for name, entry in stated(disk)
        if bytes_digest(disk.get(name) or b"") != {key: entry[key] for key in ("bytes", "xxh3")}
    ]


@dataclass(frozen=True)
class Outcome:
    """What a fault led to: `wrong` values read, something committed `lost`, resumed to equal."""

    wrong: bool
    lost: bool
    equal: bool


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[list[Event], dict[str, bytes]]:
    base = tmp_path_factory.mktemp("undisturbed")
    events = run(base)
    return events, values(base / STORE)


def outcome(store: Path, truth: dict[str, bytes], promised: set[str]) -> Outcome:
    """Read what is there, resume, and read again."""
    wrong, lost = False, False
    try:
        found = values(store)
        lost = not {f"digest {name}" for name in promised} <= found.keys()
        wrong = any(truth[key] != value for key, value in found.items())
    except IntegrityError as error:
        lost = bool(promised) or "no complete store is here" not in str(error)
    run(store.parents[1])
    return Outcome(wrong, lost, values(store) == truth)


def distinct(events: list[Event]) -> list[int]:
    """The operations after which another disk, or another promise, is left than before."""
    tree, before, found = Tree(), None, []
    for number, event in enumerate(events):
        tree.apply(event)
        state = (tree.durable(), len(committed(events[: number + 1])))
        if state != before:
            found.append(number + 1)
        before = state
    return found


def spread(numbers: list[int], count: int) -> list[int]:
    """As many of them, first and last included, evenly."""
    return [
        numbers[i] for i in np.unique(np.linspace(0, len(numbers) - 1, count).round().astype(int))
    ]


def test_the_model_sees_a_writer_that_does_not_sync(tmp_path, undisturbed):
    events, truth = undisturbed
    unsynced = replayed([event for event in events if event.kind != "sync"])
    unsynced.cut_power(tmp_path / "nothing")
    assert list((tmp_path / "nothing").iterdir()) == []
    files_only = [e for e in events if e.kind != "sync" or (e.content or e.path.endswith("lock"))]
    replayed(files_only).cut_power(tmp_path / "names")
    assert list((tmp_path / "names").iterdir()) == []
    unsynced.write(tmp_path / "running")
    assert values(tmp_path / "running" / STORE) == truth


def test_assets_that_others_copied_are_synced_before_the_plan_lists_them(undisturbed):
    events, _ = undisturbed
    copied = f"{STORE}/assets/tokenizer/tokenizer.json"
    synced = [i for i, event in enumerate(events) if (event.kind, event.path) == ("sync", copied)]
    [planned] = [i for i, e in enumerate(events) if e.to == f"{STORE}/manifests/plan.json"]
    assert synced
    assert synced[0] < planned


def test_a_segment_is_synced_no_more_often_than_it_must(undisturbed):
    """Two shards and a receipt, each with its name; and the directory that one shard lies in."""
    events, _ = undisturbed
    marks = [i for i, event in enumerate(events) if event.path.endswith(f" {NAMES[0]}")]
    declared, first, second = marks[:3]
    assert events[first].path.startswith("segment 0")
    # The first also makes both directories of shards durable.
    assert [event.kind for event in events[first:second]].count("sync") == 7
    assert [event.kind for event in events[declared:first]].count("sync") == 9


def test_no_record_is_durable_before_what_it_states(undisturbed, ledger):
    """After every operation, by the records alone."""
    events, _ = undisturbed
    tree = Tree()
    for event in events:
        tree.apply(event)
        broken = broken_promises(dict(tree.durable()))
        ledger.record("power cut: a record's promise", detected=not broken)
        assert not broken, event
    assert len(stated(dict(tree.durable()))) == 50


def test_power_cut_after_any_operation(tmp_path, undisturbed, ledger, times):
    """Every operation is covered: those that are left out leave the disk as it was."""
    events, truth = undisturbed
    stops = [0, *distinct(events)]
    for number in spread(stops, times(12, len(stops))):
        base = tmp_path / str(number)
        replayed(events[:number]).cut_power(base)
        found = outcome(base / STORE, truth, committed(events[:number]))
        ledger.record("power cut: writer", detected=found.equal, wrong=found.wrong, lost=found.lost)
        assert found == Outcome(wrong=False, lost=False, equal=True), (number, events[number - 1])


def test_power_cut_where_any_part_of_the_rest_survives(tmp_path, undisturbed, ledger, times):
    """What was not synced may be there, cut off or not, renamed or not: an adversary chooses."""
    events, truth = undisturbed
    for seed, number in enumerate(spread(list(range(1, len(events))), times(8, 2 * len(events)))):
        base = tmp_path / str(number)
        replayed(events[:number]).cut_power(base, adversary(seed))
        found = outcome(base / STORE, truth, committed(events[:number]))
        ledger.record(
            "power cut: unsynced parts survive",
            detected=found.equal,
            wrong=found.wrong,
            lost=found.lost,
        )
        assert found == Outcome(wrong=False, lost=False, equal=True), (number, events[number - 1])


def test_killed_then_resumed_then_power_cut(tmp_path, undisturbed, ledger, times):
    """A file that a killed process left in place looks whole; it must be made so, too.

    Most of all one that was renamed or made, and whose directory nobody synced.
    """
    events, truth = undisturbed
    after = {
        kind: [number for number, event in enumerate(events, 1) if event.kind == kind]
        for kind in ("rename", "mkdir")
    }
    few = [*spread(after["rename"], 5), *spread(after["mkdir"], 5)]
    for number in times(few, list(range(len(events)))):
        base, left = tmp_path / f"{number}-killed", tmp_path / f"{number}-cut"
        tree = replayed(events[:number])
        tree.write(base)
        for event in run(base):
            tree.apply(event)
            assert not broken_promises(dict(tree.durable())), (number, event)
        tree.cut_power(left)
        try:
            lost = values(left / STORE) != truth
        except DecantError:
            lost = True
        again = {event.to for event in run(left) if event.kind == "rename"}
        # Signals are taken up without one write: receipts and declarations are durable, too.
        kept = all(name.startswith(REWRITTEN) for name in again)
        ledger.record("killed writer, then power cut", detected=kept, lost=lost)
        assert not lost, (number, events[number - 1])
        assert kept, (number, events[number - 1])
