"""The teacher, run again, says what the store holds within each form's stated error."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.errors import IncompatibleError
from pipeline.provenance import fingerprint
from pipeline.store.codec import decode_shard, encode_shard
from pipeline.store.commit import content_digest
from pipeline.store.forms.form import ArrayType
from pipeline.store.reader import StoreReader
from pipeline.store.sealed import read_record, write_record
from pipeline.store.shards import bytes_digest
from pipeline.store.upkeep.verify import damage_of, verify_store
from pipeline.teacher.capture.spot_check import spot_check
from pipeline.teacher.source.reference import teacher_at_hand
from tests.captured import Captured, copied, prepared, signal, write_teacher
from tests.tiny import tiny_model

CPU = torch.device("cpu")
HIDDEN = signal("hidden", 1, "bfloat16")
DECODER = [
    HIDDEN,
    signal("hidden", 2, "int8"),
    signal("hidden", 3, "float16"),
    signal("attention", 2, "qk"),
    signal("attention", 1, "map"),
    signal("attention", 3, "below"),
    signal("value", 2, "int8"),
    signal("logits", None, "head"),
    signal("logits", None, "topk", k=8, temperatures=[1.0, 2.0]),
    signal("logits", None, "sampled", n=16),
]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> Captured:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        found = prepared(tmp_path_factory.mktemp("decoder"), "llama")
        found.capture(DECODER)
    return found


def forge(store: Path, name: str, part: str, change) -> None:
    """Write other values, and every record so that all digests agree with them."""
    reader = StoreReader(store)
    layout, stored = reader.layout, reader.signal(name)
    shape = stored.declaration.arrays()[part]
    file = f"features.zarr/{name}/{part}/c/0" + "/0" * len(shape.row_shape)
    rows, chunk = reader.plan["segment_tokens"], reader.plan["chunk_tokens"]
    values = decode_shard(
        (store / file).read_bytes(),
        ArrayType(shape.dtype, shape.row_shape),
        shard_rows=rows,
        chunk_rows=chunk,
        name=file,
    ).copy()
    change(values)
    (store / file).write_bytes(encode_shard(values, chunk))
    manifest = read_record(layout.manifest(name), store)
    receipt = manifest["receipts"][0]
    receipt["files"][file] = bytes_digest((store / file).read_bytes())
    live = int(reader.examples["length"][reader.examples_in(0)].sum())
    parts = reader_parts(reader, name)
    receipt["content"] = content_digest({**parts, part: values}, live)
    rows = [[r["segment"], r["rows"], r["content"], r["skipped"]] for r in manifest["receipts"]]
    manifest["digest"] = fingerprint({"declaration": manifest["declaration"], "segments": rows})
    write_record(layout.manifest(name), manifest)
    write_record(layout.receipt(name, 0), receipt)
    index = read_record(layout.index, store)
    pinned = bytes_digest(layout.manifest(name).read_bytes())
    index["signals"][name] = {"digest": manifest["digest"], "manifest": pinned}
    write_record(layout.index, index)


def reader_parts(reader: StoreReader, name: str) -> dict[str, np.ndarray]:
    found = {}
    for part, shape in reader.signal(name).declaration.arrays().items():
        file = reader.layout.features / name / part / "c" / "0"
        for _ in shape.row_shape:
            file = file / "0"
        rows, chunk = reader.plan["segment_tokens"], reader.plan["chunk_tokens"]
        data = file.read_bytes()
        found[part] = decode_shard(data, shape, shard_rows=rows, chunk_rows=chunk, name=part)
    return found


def test_every_form_is_within_its_stated_error(decoder):
    names = [one.name for one in DECODER]
    checks = {
        one.signal: one for one in spot_check(decoder.reader, decoder.teacher, names, device=CPU)
    }
    assert checks.keys() == {one.name for one in DECODER if one.form.name != "below"}
    for name, check in checks.items():
        assert check.is_within, name
        assert check.examples > 2
    # Lossy forms do lose: a check that compares nothing would say 0.
    assert 0.1 < checks[HIDDEN.name].share < 1


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_class_logits_are_the_teachers(task, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)
    store = prepared(tmp_path, "bert", task=task)
    dense = signal("logits", None, "dense")
    store.capture([dense])
    (check,) = spot_check(store.reader, store.teacher, [dense.name], device=CPU)
    assert check.is_within


def test_values_that_only_the_teacher_knows_to_be_wrong(decoder, tmp_path):
    """All digests agree, every value is finite: two channels have changed places."""
    store = copied(decoder, tmp_path / "copy")

    def swap(values: np.ndarray) -> None:
        values[:, [0, 1]] = values[:, [1, 0]]

    forge(store.store, HIDDEN.name, "values_bits", swap)
    assert not damage_of(verify_store(store.store, deep=True))
    names = [one.name for one in DECODER[:3]]
    checks = {one.signal: one for one in spot_check(store.reader, store.teacher, names, device=CPU)}
    assert [name for name, check in checks.items() if not check.is_within] == [HIDDEN.name]
    assert checks[HIDDEN.name].segment == 0
    assert checks[HIDDEN.name].share > 10


def test_a_teacher_is_found_by_its_weights(decoder, tmp_path):
    teachers = tmp_path / "teachers"
    (teachers / "broken").mkdir(parents=True)
    (teachers / "broken" / "teacher.json").write_text("{")
    write_teacher(teachers / "another", tiny_model("llama", layers=3, seed=1))
    spec = decoder.reader.plan["spec"]
    assert teacher_at_hand(teachers, spec) is None
    shutil.copytree(decoder.teacher, teachers / "right")
    assert teacher_at_hand(teachers, spec) == teachers / "right"
    with pytest.raises(
        IncompatibleError, match=r"another: weights .*, the store is of .*--teacher"
    ):
        spot_check(decoder.reader, teachers / "another", [HIDDEN.name], device=CPU)


def test_skipped_examples_are_left_out(decoder, tmp_path):
    store = copied(decoder, tmp_path / "copy")
    reader = store.reader
    stored = reader.signal(HIDDEN.name)
    length = reader.examples["length"][reader.examples_in(0)]
    slot = int(length.argmax())
    start = int(length[:slot].sum())

    def skip(values: np.ndarray) -> None:
        values[start : start + length[slot]] = 0

    forge(store.store, HIDDEN.name, "values_bits", skip)
    (check,) = spot_check(StoreReader(store.store), store.teacher, [HIDDEN.name], device=CPU)
    assert not check.is_within
    reader = StoreReader(store.store)
    receipts = reader.signal(HIDDEN.name).receipts
    assert not receipts[0].skipped
    assert stored.receipts[0].rows == receipts[0].rows
    object.__setattr__(receipts[0], "skipped", (slot,))
    (check,) = spot_check(reader, store.teacher, [HIDDEN.name], device=CPU)
    assert check.is_within
