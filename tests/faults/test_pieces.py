"""A piece of a store is missing, cut, swapped or another's: found, whatever reads Zarr here."""

import os
import shutil
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import zarr

from pipeline.errors import IncompatibleError, IntegrityError
from pipeline.store.codec import decode_shard
from pipeline.store.commit import trusted_receipt
from pipeline.store.forms.form import ArrayType
from pipeline.store.layout import Layout
from pipeline.store.planner import write_plan
from pipeline.store.reader import StoreReader
from tests.faults.damage import (
    HIDDEN,
    INT8,
    QUERY_KEY,
    Damage,
    altered,
    change_index,
    cut,
    lead_out,
    metadata,
    named,
    outcome,
    read_everything,
    shard,
    swap,
    truth,
)
from tests.store import synthetic
from tests.store.synthetic import SEGMENT_TOKENS, Synthetic, plan, rows

PIPELINES = {
    "python": "zarr.core.codec_pipeline.BatchedCodecPipeline",
    "zarrs": "zarrs.ZarrsCodecPipeline",
}


@pytest.fixture(params=PIPELINES)
def pipeline(request):
    """What Zarr reads and writes with in this process: it must not matter to us."""
    if request.param == "zarrs":
        pytest.importorskip("zarrs")
    with zarr.config.set({"codec_pipeline.path": PIPELINES[request.param]}):
        yield request.param


def gone(relative: str) -> Damage:
    @named(f"missing: {relative}")
    def remove(store: Path) -> None:
        path = store / relative
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return remove


def cut_to(relative: str, share: float) -> Damage:
    @named(f"cut to {share:.0%}: {relative}")
    def shorten(store: Path) -> None:
        cut(store / relative, share)

    return shorten


@named("swapped: two segments")
def swap_segments(store: Path) -> None:
    """Both are intact shards: every chunk checksum passes, and their crc32c is the same."""
    one, other = (shard(store, segment=segment).read_bytes() for segment in (0, 1))
    assert google_crc32c.value(one) == google_crc32c.value(other)
    swap(shard(store, segment=0), shard(store, segment=1))


@named("swapped: two layers")
def swap_layers(store: Path) -> None:
    swap(*(shard(store, name, "query") for name in QUERY_KEY))


@named("swapped: two chunks")
def swap_chunks(store: Path) -> None:
    """The index of a shard, forged with its checksum: two of its chunks change places."""
    change_index(shard(store), lambda index: index[[1, 0, 2, 3]])


@named("missing: chunk of a shard")
def lose_chunk(store: Path) -> None:
    """As Zarr marks a chunk that is not there, which its readers take for zeros."""

    def change(index):
        index[1] = 2**64 - 1
        return index

    change_index(shard(store), change)


SHARD = f"features.zarr/{HIDDEN}/values/c/0/0"
TOKENS = "features.zarr/tokens/input_ids/c/0"
PIECES = [
    *(cut_to(SHARD, share) for share in (0.0, 0.5, 0.99)),
    *(cut_to(TOKENS, share) for share in (0.0, 0.5, 0.99)),
    *(cut_to("manifest.json", share) for share in (0.0, 0.5, 0.99)),
    cut_to("manifests/plan.json", 0.5),
    gone(SHARD),
    gone(TOKENS),
    gone("features.zarr/examples/start/c/0"),
    gone(f"features.zarr/{HIDDEN}/values/c/1"),
    gone(f"features.zarr/{HIDDEN}/values/zarr.json"),
    gone(f"features.zarr/{HIDDEN}"),
    gone(f"manifests/{HIDDEN.replace('/', '.')}.json"),
    gone("manifests/plan.json"),
    gone("manifest.json"),
    gone("assets/channels/hidden.2.safetensors"),
    gone("assets/tokenizer/tokenizer.json"),
    gone("assets/lm_head.safetensors"),
    swap_segments,
    swap_layers,
    swap_chunks,
    lose_chunk,
    altered("assets/lm_head.safetensors"),
    altered("assets/teacher/config.json"),
    altered("assets/tokenizer/tokenizer.json"),
]


@pytest.mark.parametrize("damage", PIECES, ids=lambda damage: damage.__name__)
def test_a_piece_that_is_not_what_it_was_is_never_read(
    store, whole_store, ledger, pipeline, damage
):
    damage(store)
    found = outcome(store, whole_store)
    ledger.record(
        damage.__name__.split(":")[0], detected=found == "refused", wrong=found == "wrong"
    )
    assert found == "refused"


def test_whole_is_read(store, whole_store):
    assert read_everything(store) == truth(whole_store)


def test_swapped_segments_are_named(store):
    swap_segments(store)
    with pytest.raises(IntegrityError, match=r"c/0/0: found (checksum|[0-9]+ bytes)"):
        read_everything(store)


def missing(store: Path, name: str = HIDDEN) -> list[int]:
    """The segments that a capture would compute again."""
    return Synthetic(store).writer(name).missing()


def mended(store: Path) -> None:
    """Capture again what is asked for, as the stage does."""
    Synthetic(store).run()


@pytest.mark.usefixtures("unsynced")
def test_a_lost_receipt_costs_its_segment_alone(store, whole_store, ledger):
    Layout(store).receipt(HIDDEN, 1).unlink()
    before = {path: path.stat().st_mtime_ns for path in (shard(store), shard(store, segment=2))}
    assert outcome(store, whole_store) == "same"
    assert missing(store) == [1]
    mended(store)
    is_same = read_everything(store) == truth(whole_store)
    ledger.record("missing", detected=is_same, wrong=not is_same)
    assert is_same
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.usefixtures("unsynced")
@pytest.mark.parametrize("damage", [*PIECES[:3], gone(SHARD), swap_segments, lose_chunk])
def test_capture_finds_and_redoes_a_damaged_shard(store, whole_store, ledger, damage):
    damage(store)
    lost = [0, 1] if damage is swap_segments else [0]
    assert missing(store) == lost
    assert HIDDEN not in StoreReader(store).signals
    mended(store)
    is_same = read_everything(store) == truth(whole_store)
    ledger.record("resumed after damage", detected=is_same, wrong=not is_same)
    assert is_same


@pytest.mark.usefixtures("unsynced")
@pytest.mark.parametrize("of", ["other rows", "other values"])
def test_a_segment_of_another_run_is_neither_read_nor_trusted(
    store, whole_store, tmp_path, monkeypatch, ledger, of
):
    """Shard and receipt, both whole, of a store that was captured from something else."""
    name = f"receipts/{HIDDEN.replace('/', '.')}/000000.json"
    if of == "other rows":
        monkeypatch.setattr(synthetic, "identity", lambda segment: f"{segment:032x}")
    values = synthetic.values
    monkeypatch.setattr(
        synthetic, "values", lambda *a: {key: value + 1 for key, value in values(*a).items()}
    )
    foreign = Synthetic(tmp_path / "foreign").run((HIDDEN,))
    monkeypatch.undo()
    monkeypatch.setattr(os, "fsync", lambda _: None)
    for relative in (SHARD, name):
        shutil.copyfile(foreign / relative, store / relative)
    found = outcome(store, whole_store)
    ledger.record("segment of another run", detected=found == "refused", wrong=found == "wrong")
    assert found == "refused"
    digest = StoreReader(store).signal(HIDDEN).digest
    mended(store)
    if of == "other rows":
        assert outcome(store, whole_store) == "same"
    else:
        # Of the same rows, under the same declaration: another run of the same capture. What it
        # computed has another digest, so nobody who was pinned to the first reads it.
        with pytest.raises(IncompatibleError, match="the store was captured anew"):
            StoreReader(store, {HIDDEN: digest})


@pytest.mark.usefixtures("unsynced")
@pytest.mark.parametrize(
    "damage",
    [altered("manifests/plan.json"), cut_to("manifest.json", 0.5), gone("manifest.json")],
)
def test_capture_mends_records_without_losing_a_shard(store, whole_store, damage):
    """Index and plan are rebuilt from manifests and rows; no feature is computed again."""
    digest = StoreReader(store).signal(HIDDEN).digest
    damage(store)
    Synthetic(store).plan()
    assert StoreReader(store).signal(HIDDEN).digest == digest
    assert read_everything(store) == truth(whole_store)


@pytest.mark.usefixtures("unsynced")
def test_capture_mends_a_plan_that_was_cut(store, whole_store):
    os.truncate(Layout(store).plan, 100)
    Synthetic(store).plan()
    assert read_everything(store) == truth(whole_store)


@pytest.mark.usefixtures("unsynced")
def test_capture_mends_tokens_and_metadata(store, whole_store):
    (store / TOKENS).unlink()
    os.truncate(store / "features.zarr/examples/label/c/0", 3)
    metadata("shape", [1, 6])(store)
    Synthetic(store).plan()
    assert missing(store) == []
    assert read_everything(store) == truth(whole_store)


@pytest.mark.usefixtures("unsynced")
def test_a_damaged_tokenizer_is_named(store):
    path = store / "assets/tokenizer/tokenizer.json"
    path.write_text("{ }")
    plan_record = StoreReader(store).plan
    keys = ("spec", "chunk_tokens", "task", "classes", "vocab", "pad_id", "max_length")
    with pytest.raises(IntegrityError, match=r"tokenizer\.json: missing or altered"):
        write_plan(Layout(store), plan(), rows(), {key: plan_record[key] for key in keys})


def test_no_receipt_is_trusted_whose_files_lead_out(store):
    lead_out(f"features.zarr/{HIDDEN}/values/c/0")(store)
    assert trusted_receipt(Layout(store), HIDDEN, 0, verify=False) is None


def test_what_zarr_writes_in_our_place_is_decoded_or_refused(store, whole_store, pipeline):
    """Another writer with our metadata: its bytes are no capture's, so no receipt fits them.

    Our decoder takes them all the same, as it would those of a zarrs of tomorrow; but not the
    chunks of zeros that Zarr leaves out.
    """
    array = zarr.open_group(store / "features.zarr")[f"{INT8}/levels"]
    assert isinstance(array, zarr.Array)
    values = np.asarray(array[:SEGMENT_TOKENS])
    array[:SEGMENT_TOKENS] = values[::-1]
    data = shard(store, INT8, "levels").read_bytes()
    shape = {"shard_rows": SEGMENT_TOKENS, "chunk_rows": 4, "name": "shard"}
    part = ArrayType("int8", values.shape[1:])
    is_complete = (values.reshape(4, -1) != 0).any(axis=1).all()
    if is_complete:
        np.testing.assert_array_equal(decode_shard(data, part, **shape), values[::-1], strict=True)
    assert outcome(store, whole_store, (INT8,)) == "refused"
    values[:] = 1
    values[:4] = 0
    array[:SEGMENT_TOKENS] = values
    with pytest.raises(IntegrityError, match="chunk 0 of 4 is missing"):
        decode_shard(shard(store, INT8, "levels").read_bytes(), part, **shape)


def test_every_zarr_reader_reads_what_we_wrote(whole_store, pipeline):
    group = zarr.open_group(whole_store / "features.zarr", mode="r")
    reader = StoreReader(whole_store)
    for name in (HIDDEN, INT8):
        for number in range(len(reader.plan["segments"])):
            for part, values in reader.read_segment(number, [name]).features[name].items():
                rows_of = slice(number * len(values), (number + 1) * len(values))
                theirs = group[f"{name}/{part}"]
                assert isinstance(theirs, zarr.Array)
                np.testing.assert_array_equal(np.asarray(theirs[rows_of]), values, strict=True)
