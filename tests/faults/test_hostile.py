"""A store made to harm: refused, in bounded memory, with nothing outside it read or changed."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from pipeline.errors import DecantError, IncompatibleError, IntegrityError
from pipeline.store.layout import Layout
from pipeline.store.links import refuse_links
from pipeline.store.lock import writer_lock
from pipeline.store.reader import StoreReader
from pipeline.store.shards import bytes_digest
from stages.inspect import inspect
from tests.faults.damage import (
    HIDDEN,
    Damage,
    forge_attachment,
    forge_column,
    forge_index,
    forge_manifest,
    forge_plan,
    forge_shard,
    lead_out,
    metadata,
    named,
    outcome,
    read_everything,
    shard,
)
from tests.faults.hostile import (
    CHANNELS,
    FILES,
    HUGE,
    MANIFEST,
    MARKER,
    SECRET,
    SHARD,
    canary,
    declared,
    special,
)
from tests.store.synthetic import VOCAB, WIDTH


def of_index(name: str, change: Any) -> Damage:
    return named(f"index: {name}")(lambda store: forge_index(store, change))


def of_plan(name: str, change: Any) -> Damage:
    return named(f"plan: {name}")(lambda store: forge_plan(store, change))


def of_manifest(name: str, change: Any) -> Damage:
    return named(f"manifest: {name}")(lambda store: forge_manifest(store, change))


def of_column(name: str, change: Any) -> Damage:
    return named(f"table: {name}")(lambda store: forge_column(store, name.split()[0], change))


def rename_signal(new: str) -> Any:
    def change(index: dict[str, Any]) -> None:
        index["signals"][new] = index["signals"].pop(HIDDEN)

    return change


def rename_file(record: dict[str, Any], old: str, new: str) -> None:
    record[new] = record.pop(old)


def rename_in_receipt(new: str) -> Any:
    return lambda manifest: rename_file(manifest["receipts"][0]["files"], SHARD, new)


def first(value: int) -> Any:
    def change(column: Any) -> Any:
        column[0] = value
        return column

    return change


FORGED = [
    of_index("signal ..", rename_signal("../../secret")),
    of_index("signal absolute", rename_signal("/etc/float16-00000000")),
    of_index("asset ..", lambda index: index["assets"].update(lm_head=SECRET)),
    of_index("asset /", lambda i: i["assets"].update(lm_head={**SECRET, "file": "/etc/passwd"})),
    of_index("no plan", lambda index: index.pop("plan")),
    of_index("signals a list", lambda index: index.update(signals=[HIDDEN])),
    of_index("plan of 2^40 bytes", lambda index: index["plan"].update(bytes=HUGE)),
    of_index("digest a list", lambda index: index["signals"][HIDDEN].update(digest=[])),
    of_plan("file ..", lambda plan: plan["files"].update({"assets/tokenizer/../../../secret": {}})),
    of_plan("file /", lambda plan: plan["files"].update({"/etc/passwd": SECRET})),
    of_plan("segment of 2^40", lambda p: p.update(segment_tokens=HUGE, chunk_tokens=HUGE)),
    of_plan("segment of 2^30", lambda p: p.update(segment_tokens=2**30, chunk_tokens=2**30)),
    of_plan("segment of 2^80", lambda plan: plan.update(segment_tokens=2**80)),
    of_plan("chunk of 0", lambda plan: plan.update(chunk_tokens=0)),
    of_plan("chunk of 3", lambda plan: plan.update(chunk_tokens=3)),
    of_plan("2^40 examples", lambda plan: plan.update(examples=HUGE)),
    of_plan("2^29 examples", lambda plan: plan.update(examples=2**29)),
    of_plan("column of objects", lambda plan: plan.update(columns=["input_ids", "__class__"])),
    of_plan("no column", lambda plan: plan.update(columns=[])),
    of_plan("task", lambda plan: plan.update(task="execute")),
    of_plan("segments", lambda plan: plan.update(segments="train")),
    of_plan("vocabulary", lambda plan: plan.update(vocab=-1)),
    of_plan("vocabulary too small", lambda plan: plan.update(vocab=3)),
    of_plan("outputs", lambda plan: plan.update(outputs=HUGE)),
    of_plan("tokenizer with weights", lambda plan: plan["files"].update(
        {"assets/tokenizer/model.safetensors": bytes_digest(b"")})),
    of_manifest("shard ..", rename_in_receipt("features.zarr/../../secret")),
    of_manifest("shard /", rename_in_receipt("/etc/passwd")),
    of_manifest("another layer", declared(layer=2)),
    of_manifest("another kind", declared(kind="logits", layer=None)),
    of_manifest("kind ..", declared(kind="../../secret")),
    of_manifest("width of 2^40", declared(geometry={"width": HUGE})),
    of_manifest("width of 2^30", declared(geometry={"width": 2**30})),
    of_manifest("width a text", declared(geometry={"width": "6"})),
    of_manifest("negative width", declared(geometry={"width": -6})),
    of_manifest("form of objects", declared(form="pickle")),
    of_manifest("unknown option", declared(options={"__class__": 1})),
    of_manifest("split", declared(splits=["../x"])),
    of_manifest("info", declared(info=[1])),
    of_manifest("statistics of 2^40 bytes", declared(channels={"bytes": HUGE, "xxh3": 1})),
    of_manifest("skipped", lambda m: m["receipts"][0].update(skipped=["0"])),
    of_manifest("receipt of no rows", lambda m: m["receipts"][0].update(rows={})),
    of_manifest("shard of 2^40 bytes", lambda m: m["receipts"][0]["files"][SHARD].update(
        bytes=HUGE)),
    of_column("start shifted", lambda column: column + 1),
    of_column("start negative", first(-1)),
    of_column("segment out of range", lambda c: np.where(c == c.max(), 2**30, c)),
    of_column("segment negative", first(-(2**31))),
    of_column("length of 0", first(0)),
    of_column("length of 2^31", first(2**31 - 1)),
    of_column("slot of 2^31", first(2**31 - 1)),
    of_column("split of none", first(9)),
    of_column("label of another", lambda column: np.roll(column, 1)),
    of_column("source_row of another", lambda column: np.roll(column, 1)),
]  # fmt: skip


@pytest.mark.parametrize("damage", FORGED, ids=lambda damage: damage.__name__)
def test_a_forged_record_is_refused(store, whole_store, ledger, damage):
    """All seals and checksums are right; what the records say is not."""
    secret = canary(store)
    damage(store)
    found = outcome(store, whole_store)
    ledger.record("hostile: record", detected=found == "refused", wrong=found == "wrong")
    assert found == "refused"
    assert secret.read_bytes() == MARKER


METADATA = [
    metadata("shape", [HUGE, WIDTH]),
    metadata("data_type", "object"),
    metadata("data_type", {"name": "null_terminated_bytes", "configuration": {"length_bytes": 9}}),
    metadata("codecs", [{"name": "numcodecs.pickle", "configuration": {"protocol": 5}}]),
    metadata("codecs", [{"name": "bytes"}]),
    metadata("fill_value", 1.0),
    metadata("zarr_format", 2),
    metadata("chunk_key_encoding", {"name": "default", "configuration": {"separator": "../"}}),
]


@named("zarr.json: version 2")
def version_2(store: Path) -> None:
    """The array as Zarr 2 has it, with objects that a reader would unpickle."""
    array = store / f"features.zarr/{HIDDEN}/values"
    (array / "zarr.json").unlink()
    description = {
        "zarr_format": 2, "shape": [64, 6], "chunks": [4, 6], "dtype": "|O", "order": "C",
        "compressor": None, "fill_value": None, "filters": [{"id": "pickle", "protocol": 5}],
    }  # fmt: skip
    (array / ".zarray").write_text(json.dumps(description))
    (array / "0.0").write_bytes(b"cos\nsystem\n(S'touch executed'\ntR.")


LINKS = [
    lead_out(relative)
    for relative in (
        SHARD,
        f"features.zarr/{HIDDEN}/values/c/0",
        f"features.zarr/{HIDDEN}/values",
        f"features.zarr/{HIDDEN}/values/zarr.json",
        f"features.zarr/{HIDDEN}",
        "features.zarr",
        "manifest.json",
        "manifests",
        MANIFEST,
        "manifests/plan.json",
        "assets",
        "assets/lm_head.safetensors",
        "assets/teacher",
        "assets/teacher/config.json",
        "assets/tokenizer",
        "assets/tokenizer/tokenizer.json",
        CHANNELS,
    )
]


@named("link in: unlisted file of the tokenizer")
def unlisted_link(store: Path) -> None:
    """Whoever copies the directory copies what it leads to."""
    (store / "assets/tokenizer/special_tokens_map.json").symlink_to(canary(store))


@named("unlisted file of the tokenizer")
def unlisted_file(store: Path) -> None:
    (store / "assets/tokenizer/tokenizer_config.json").write_text('{"auto_map": {}}')


NO_FILES = [special(name, kind) for name in FILES for kind in ("pipe", "sparse")]
NO_FILES += [
    special(name, kind) for name in FILES[:4] for kind in ("socket", "directory", "device")
]


@pytest.mark.parametrize(
    "damage",
    [*METADATA, version_2, *LINKS, unlisted_link, unlisted_file, *NO_FILES],
    ids=lambda damage: damage.__name__,
)
def test_what_is_no_file_of_a_store_is_refused(store, whole_store, ledger, damage, tmp_path):
    """Nobody waits for a pipe, follows a link or asks Zarr what the metadata mean."""
    damage(store)
    found = outcome(store, whole_store)
    what = damage.__name__.split(":")[0]
    ledger.record(f"hostile: {what}", detected=found == "refused", wrong=found == "wrong")
    assert found == "refused"
    assert not list(tmp_path.rglob("executed"))


def test_nothing_outside_is_looked_at(store, ledger):
    """A file that is read has a new time of access; first we see that this machine notes it."""
    secret = canary(store)
    os.utime(secret, ns=(0, 10**18))
    secret.read_bytes()
    if secret.stat().st_atime_ns == 0:
        pytest.skip("this file system notes no time of access")
    for damage in (FORGED[2], lead_out("assets/lm_head.safetensors"), unlisted_link):
        os.utime(secret, ns=(0, 10**18))
        shutil.copytree(store, copy := store.with_name("copy"), symlinks=True)
        damage(copy)
        if (copy / "assets/lm_head.safetensors").is_symlink():
            (copy / "assets/lm_head.safetensors").unlink()
            (copy / "assets/lm_head.safetensors").symlink_to(secret)
        with pytest.raises(DecantError):
            read_everything(copy)
        untouched = secret.stat().st_atime_ns == 0 and secret.read_bytes() == MARKER
        ledger.record("hostile: canary", detected=untouched)
        assert untouched
        shutil.rmtree(copy)


def test_a_tokenizer_is_copied_file_by_file(store, tmp_path):
    """What is handed on is what was checked, over nothing that is there."""
    StoreReader(store).copy_tokenizer(tmp_path / "student")
    assert [p.name for p in (tmp_path / "student").iterdir()] == ["tokenizer.json"]
    with pytest.raises(IntegrityError, match=r"would replace the student's tokenizer\.json"):
        StoreReader(store).copy_tokenizer(tmp_path / "student")
    unlisted_link(store)
    with pytest.raises(IntegrityError, match=r"special_tokens_map\.json: not a file of the token"):
        StoreReader(store).tokenizer()
    StoreReader(store).copy_tokenizer(tmp_path / "another")
    assert [p.name for p in (tmp_path / "another").iterdir()] == ["tokenizer.json"]


@pytest.mark.parametrize("relative", ["features.zarr", "assets/tokenizer", "receipts", "staging"])
def test_nobody_writes_through_a_link(store, relative):
    (store / relative).mkdir(exist_ok=True)
    refuse_links(store)
    lead_out(relative)(store)
    with pytest.raises(IntegrityError, match=rf"{relative}: a link to .*, expected none inside"):
        refuse_links(store)


@pytest.mark.parametrize("kind", ["link", "pipe", "directory"])
def test_a_lock_is_a_plain_file(store, ledger, kind):
    """Else taking it would empty the file that it leads to, or wait for ever."""
    secret, lock = canary(store), Layout(store).lock
    lock.unlink()
    if kind == "link":
        lock.symlink_to(secret)
    else:
        os.mkfifo(lock) if kind == "pipe" else lock.mkdir()
    with pytest.raises(IntegrityError, match="lock: is no plain file"), writer_lock(lock):
        pass
    ledger.record(f"hostile: {kind}", detected=secret.read_bytes() == MARKER)
    assert secret.read_bytes() == MARKER


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (FORGED[0], 3),
        (special("manifest.json", "pipe"), 3),
        (special("manifest.json", "json"), 3),
        (special(MANIFEST, "sparse"), 3),
        (of_manifest("software a number", lambda manifest: manifest.update(software=5)), 3),
        (of_plan("spec of a list", lambda plan: plan["spec"].update(segments=[1])), 3),
        (lead_out("manifests"), 3),
        (of_index("format", lambda index: index.update(format=99)), 4),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_inspect_says_it_in_one_line(store, ledger, damage, code):
    """What can be believed is shown; what cannot is named, and the exit code is not that of 0."""
    damage(store)
    result = CliRunner().invoke(inspect, [str(store)])
    lines = [line for line in result.output.splitlines() if line.startswith("error: ")]
    is_right = result.exit_code == code and len(lines) == 1 and "Traceback" not in result.output
    ledger.record("hostile: inspect", detected=is_right)
    assert is_right, result.output


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (FORGED[0], "signals.../../secret.*should match pattern"),
        (of_plan("vocabulary", lambda plan: plan.update(vocab=3)), "has id [0-9]+, the teacher 3"),
        (of_column("start", lambda column: column + 1), "start: 1 for example 0"),
        (special(SHARD, "sparse"), "found 1099511627776 bytes, expected"),
        (special(SHARD, "pipe"), "expected a regular file"),
        (lead_out("features.zarr"), "expected a regular file inside the store"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_error_says_what_is_wrong(store, damage, match):
    damage(store)
    with pytest.raises((IntegrityError, IncompatibleError), match=match):
        read_everything(store)


def test_ids_are_those_of_the_vocabulary(whole_store):
    reader = StoreReader(whole_store)
    assert max(reader.read_segment(0).tokens["input_ids"]) < VOCAB == reader.plan["vocab"]


def test_the_shard_that_is_forged_is_read_where_it_is_whole(store, whole_store):
    """The forger's tools work: else nothing above would mean anything."""
    forge_shard(store, shard(whole_store).read_bytes())
    assert outcome(store, whole_store) == "same"
    forge_manifest(store, lambda manifest: None)
    forge_plan(store, lambda plan: plan.update(spec={}))
    forge_column(store, "start", lambda column: column)
    forge_attachment(
        store, "teacher/config.json", (whole_store / "assets/teacher/config.json").read_bytes()
    )
    assert outcome(store, whole_store) == "same"
