"""A store that changes under a running training stops it; what was saved before stays of use."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.corpus.tokens.tokens import TokenSet
from pipeline.errors import DecantError, IncompatibleError, IntegrityError
from pipeline.provenance import read_json, write_json
from pipeline.store.commit import SignalWriter
from pipeline.store.index import index_asset, withdraw
from pipeline.store.reader import StoreReader
from pipeline.store.upkeep.gc import remove_store
from pipeline.teacher.capture.spec import SegmentOptions
from pipeline.teacher.capture.token_rows import plan_rows
from pipeline.training.checkpoints import MARKER, last_complete_checkpoint
from tests.captured import Captured, copied, prepared
from tests.faults.ledger import Ledger
from tests.store.fixtures import without_sync
from tests.student.runs import SIGNALS, after_each_step, equal, train

NAME = SIGNALS[1].name
AT = 5
"""The step after which the store changes; checkpoints are of steps 3, 6 and 9."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Captured:
    """Seven segments of training rows, so that a run reads to its end."""
    options = SegmentOptions(segment_tokens=32, chunk_tokens=16, batch_tokens=60)
    with without_sync():
        found = prepared(tmp_path_factory.mktemp("rewritten"), "llama", options=options)
        found.capture(SIGNALS, blocks=[1, 2, 3])
    return found


@pytest.fixture(scope="module")
def undisturbed(
    whole: Captured, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, torch.Tensor]:
    with without_sync():
        return train(whole, tmp_path_factory.mktemp("undisturbed"), pool_segments=1)


def write_again(store: Captured, change: int) -> str:
    """Write the signal's first part anew with `change` added; return its digest."""
    reader = StoreReader(store.store)
    declared = reader.signal(NAME).declaration
    values = {n: reader.read_segment(n, [NAME]) for n in reader.signal(NAME).receipts}
    plan = plan_rows(TokenSet.load(store.tokens), store.options)
    writer = SignalWriter(store.layout, plan, store.options.chunk_tokens, declared)
    rows = {n: receipt.rows for n, receipt in reader.signal(NAME).receipts.items()}
    withdraw(store.layout, NAME)
    for number, segment in values.items():
        buffers = {part: array.copy() for part, array in segment.features[NAME].items()}
        for array in buffers.values():
            array += array.dtype.type(change)
        writer.write_segment(number, buffers, rows=rows[number])
    manifest = writer.commit()
    assert manifest is not None
    return manifest["digest"]


def rewrite(store: Captured) -> None:
    write_again(store, 1)


def restore_values(store: Captured) -> None:
    # Unsigned numbers come back around.
    write_again(store, -1 % 2**16)


def withdraw_it(store: Captured) -> None:
    withdraw(store.layout, NAME)


def capture_again(store: Captured) -> None:
    store.capture(SIGNALS, blocks=[1, 2, 3])


def shards(store: Captured) -> list[Path]:
    return sorted(p for p in (store.layout.features / NAME).rglob("c/**/*") if p.is_file())


def shift_shards(store: Captured) -> None:
    """Put each shard in the place of the one before: equal shapes, every chunk's checksum right."""
    paths = shards(store)
    contents = [path.read_bytes() for path in paths]
    for path, content in zip(paths, [*contents[1:], contents[0]], strict=True):
        path.unlink()
        path.write_bytes(content)


def shift_back(store: Captured) -> None:
    for _ in range(len(shards(store)) - 1):
        shift_shards(store)


def remove_all(store: Captured) -> None:
    remove_store(store.store)


FAULTS: dict[str, tuple[Callable[[Captured], Any], Callable[[Captured], Any], type, str]] = {
    "rewritten signal": (
        rewrite,
        restore_values,
        IncompatibleError,
        rf"{NAME} has digest [0-9a-f]{{16}} now, expected [0-9a-f]{{16}}: it was rewritten while "
        r"it was read; run the select stage \(`decant select STUDENT`\), then the same command",
    ),
    "withdrawn signal": (
        withdraw_it,
        capture_again,
        IncompatibleError,
        rf"{NAME} was withdrawn, expected [0-9a-f]{{16}}: .*; run the capture stage",
    ),
    "swapped shards": (
        shift_shards,
        shift_back,
        IntegrityError,
        rf"features\.zarr/{NAME}/.*: found ",
    ),
    "removed store": (
        remove_all,
        capture_again,
        IntegrityError,
        "the store was removed while it was read; capture it again",
    ),
}


def changing(monkeypatch: pytest.MonkeyPatch, change: Callable[[], Any]) -> None:
    """Call `change` when step `AT` is done."""
    after_each_step(monkeypatch, lambda _, step: change() if step == AT else None)


@pytest.mark.usefixtures("unsynced")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_store_that_changes_under_a_training_stops_it(
    fault, whole, undisturbed, tmp_path, monkeypatch, ledger: Ledger
):
    change, mend, kind, message = FAULTS[fault]
    store = copied(whole, tmp_path / "copy")
    with monkeypatch.context() as patch:
        changing(patch, lambda: change(store))
        with pytest.raises(DecantError) as caught:
            train(store, tmp_path, pool_segments=1)
    (directory,) = (path for path in (tmp_path / "work/train").iterdir() if path.is_dir())
    saved = Path(str(last_complete_checkpoint(directory)))
    is_exported = (tmp_path / "student").exists()
    # Of shards that change, those in memory already were right, and steps are made of them; that
    # they were shows below. A signal is asked for at every step.
    right = {"checkpoint-3", "checkpoint-6"} if fault == "swapped shards" else {"checkpoint-3"}
    ledger.record(
        f"training: {fault}",
        detected=isinstance(caught.value, kind),
        wrong=is_exported or saved.name not in right,
    )
    assert type(caught.value) is kind
    assert caught.match(message)
    assert not is_exported
    assert saved.name in right
    mend(store)
    # The same digests: the same command goes on from the checkpoint, to the same bits.
    features = read_json(saved / MARKER)["features"]
    assert features.items() <= store.digests().items()
    assert equal(train(store, tmp_path, pool_segments=1), undisturbed)


@pytest.mark.usefixtures("unsynced")
def test_a_store_that_only_grows_stops_nothing(whole, undisturbed, tmp_path, monkeypatch):
    store = copied(whole, tmp_path / "copy")
    entry = {"file": "blocks.safetensors", "bytes": 1, "xxh3": 1}
    with monkeypatch.context() as patch:
        changing(patch, lambda: index_asset(store.layout, "other", entry))
        assert equal(train(store, tmp_path, pool_segments=1), undisturbed)


@pytest.mark.usefixtures("unsynced")
def test_a_checkpoint_of_other_digests_is_not_gone_on_from(
    whole, undisturbed, tmp_path, monkeypatch, caplog, ledger: Ledger
):
    """The directory's name tells runs apart; the marker does when one was moved into another."""
    store = copied(whole, tmp_path / "copy")
    with monkeypatch.context() as patch:
        changing(patch, lambda: withdraw(store.layout, NAME))
        with pytest.raises(IncompatibleError):
            train(store, tmp_path, pool_segments=1)
    store.capture(SIGNALS, blocks=[1, 2, 3])
    (path,) = (tmp_path / "work/train").glob(f"*/checkpoint-3/{MARKER}")
    record = read_json(path)
    record["features"][NAME] = "0" * 64
    write_json(path, record)
    caplog.clear()
    weights = train(store, tmp_path, pool_segments=1)
    is_passed = f"checkpoint-3 is not gone on from: it was trained from {NAME} 0000" in caplog.text
    ledger.record(
        "training: checkpoint of other digests",
        detected=is_passed,
        wrong=not equal(weights, undisturbed),
    )
    assert is_passed
    assert equal(weights, undisturbed)
