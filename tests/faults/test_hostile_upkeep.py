"""Verifying, mending, copying and removing a store made to harm: an error of ours, or it is done.

Whatever it says, nothing outside is touched, nobody waits for a pipe, and memory stays bounded.
"""

import itertools
import json
import os
import resource
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from pipeline.errors import DecantError
from pipeline.store.layout import Layout
from pipeline.store.lock import writer_lock
from pipeline.store.upkeep.copy import copy_store
from pipeline.store.upkeep.gc import remove_signal, remove_store
from pipeline.store.upkeep.repair import repair
from pipeline.store.upkeep.unneeded import unneeded
from pipeline.store.upkeep.verify import unrecorded_files, verify_store
from stages.inspect import inspect
from tests.faults.damage import (
    HIDDEN,
    Damage,
    forge_column,
    forge_index,
    forge_manifest,
    forge_plan,
    lead_out,
    named,
)
from tests.faults.forked import start
from tests.faults.hostile import CHANNELS, FILES, HUGE, MOST_MEMORY, SECRET, canary, special

DOTTED = HIDDEN.replace("/", ".")


def file_for(relative: str) -> Damage:
    """Put a file in the place of a directory."""

    @named(f"file for: {relative.replace(HIDDEN, 'SIGNAL')}")
    def put(store: Path) -> None:
        shutil.rmtree(store / relative, ignore_errors=True)
        (store / relative).write_text("no directory")

    return put


@named("link out: staging")
def link_staging(store: Path) -> None:
    (store / "staging").mkdir(exist_ok=True)
    (store / "staging" / "mine").write_text("mine")
    lead_out("staging")(store)


@named("nested: fifty directories")
def nested(store: Path) -> None:
    store.joinpath("assets", "tokenizer", *["d"] * 60).mkdir(parents=True)


DAMAGES = [
    *map(lead_out, ("manifests", "receipts", "assets", "features.zarr", f"receipts/{DOTTED}")),
    *map(lead_out, (f"features.zarr/{HIDDEN}", "assets/tokenizer", "receipts/assets", CHANNELS)),
    *map(file_for, ("manifests", "receipts", "assets", "features.zarr", "staging")),
    *map(file_for, ("receipts/assets", f"features.zarr/{HIDDEN}", "features.zarr/tokens")),
    *(special(name, kind) for name in FILES[1:6] for kind in ("pipe", "sparse", "directory")),
    *(special(name, "json") for name in FILES[1:6]),
    *(special("lock", kind) for kind in ("pipe", "sparse", "directory")),
    *(special(f"receipts/{DOTTED}/declaration.json", kind) for kind in ("pipe", "json")),
    *(special("receipts/assets/lm_head.json", kind) for kind in ("pipe", "sparse")),
    link_staging,
    nested,
    named("record: asset ..")(lambda s: forge_index(s, lambda i: i["assets"].update(a=SECRET))),
    named("record: long name")(
        lambda s: forge_index(s, lambda i: i["assets"]["lm_head"].update(file="a" * 300))
    ),
    named("record: file ..")(
        lambda s: forge_plan(s, lambda plan: plan["files"].update({"../../secret": SECRET}))
    ),
    named("record: shard ..")(
        lambda s: forge_manifest(s, lambda m: m["receipts"][0]["files"].update({"../s": SECRET}))
    ),
    named("record: segments a list")(
        lambda s: forge_plan(s, lambda plan: plan["spec"].update(segments=[1]))
    ),
    named("table: segment of 2^30")(
        lambda s: forge_column(s, "segment", lambda c: c + (c == c.max()) * 2**30)
    ),
]


def verified(store: Path, whole: Path) -> None:
    unrecorded_files(store, verify_store(store))


def mended(store: Path, whole: Path) -> None:
    with writer_lock(Layout(store).lock, wait=False):
        repair(store, verify_store(store))


def copied_from(store: Path, whole: Path) -> None:
    copy_store(store, store.parent / "disk")


def copied_onto(store: Path, whole: Path) -> None:
    (store.parent / "disk").mkdir()
    store.rename(store.parent / "disk" / whole.name)
    copy_store(whole, store.parent / "disk")


def listed(store: Path, whole: Path) -> None:
    unneeded(store.parent, {store.name: set()})


def signal_removed(store: Path, whole: Path) -> None:
    remove_signal(store, HIDDEN)


def removed(store: Path, whole: Path) -> None:
    remove_store(store)
    assert not store.exists()


def inspected(store: Path, whole: Path) -> None:
    result = CliRunner().invoke(inspect, [str(store)])
    assert result.exit_code in (0, 3, 4), result.output


TOOLS = (verified, mended, copied_from, copied_onto, listed, signal_removed, removed, inspected)


def use(tool: int, store: Path, whole: Path, result: Path) -> None:
    """Use one tool, and note how far memory grew; any exception but ours ends this process."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    error = ""
    try:
        TOOLS[tool](store, whole)
    except DecantError as refusal:
        error = str(refusal)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    result.write_text(json.dumps({"error": error, "grown_bytes": grown * 1024}))


def outside(home: Path) -> dict[str, bytes]:
    """Every file beside the store, one of a terabyte by its name alone."""
    ours = {home / "store", home / "disk", home / "result", home / "stderr"}
    return {
        str(path): path.read_bytes() if path.is_file() and path.stat().st_size < HUGE else b""
        for path in home.rglob("*")
        if ours.isdisjoint((path, *path.parents))
    }


@pytest.mark.usefixtures("unsynced")
def test_no_tool_is_led_astray(whole_store, tmp_path, ledger, times):
    few = list(zip(DAMAGES, itertools.cycle(range(len(TOOLS))), strict=False))[::3]
    many = list(itertools.product(DAMAGES, range(len(TOOLS))))
    for number, (damage, tool) in enumerate(times(few, many)):
        home = tmp_path / str(number)
        home.mkdir()
        store = shutil.copytree(whole_store, home / "store")
        canary(store)
        damage(store)
        before = outside(home)
        child = start(use, tool, store, whole_store, home / "result", stderr=home / "stderr")
        code = child.wait(60)
        found = json.loads((home / "result").read_text()) if code == 0 else {}
        is_bounded = found.get("grown_bytes", HUGE) < MOST_MEMORY and "\n" not in found["error"]
        is_same = outside(home) == before
        what = damage.__name__.split(":")[0]
        ledger.record(f"hostile: {what}, kept up", detected=is_bounded, wrong=not is_same)
        said = f"{TOOLS[tool].__name__} {damage.__name__}: {found}"
        assert code == 0, f"{said} {child.errors()[-900:]}"
        assert is_bounded, said
        assert is_same, said
        if os.path.lexists(home / "store"):
            shutil.rmtree(home)
