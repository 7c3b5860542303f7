"""verify STORE: a table, one line of what is wrong, an exit code; repair and capture mend it."""

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from pipeline.corpus.tokens.tokens import TokenSet
from pipeline.provenance import read_json
from pipeline.store.layout import Layout
from pipeline.store.lock import writer_lock
from stages.verify import verify
from tests.captured import DAMAGES
from tests.cases import error_line
from tests.teacher.test_same_rows import columns_of, written

MANIFESTS = Path("data/manifests/main")
TOKENS = Path("data/corpus/tokens/main")
KINDS = {
    "shard": "features.zarr/hidden/0/*/values_bits/c/0/0",
    "tokens": "features.zarr/tokens/input_ids/c/0",
    "plan": "manifests/plan.json",
    "statistics": "assets/channels/hidden.2.safetensors",
}
"""What cannot be told from other records; the corpus or the teacher is needed for it."""


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(verify, [str(a) for a in arguments], catch_exceptions=False)


def store() -> Path:
    return Path("data/stores") / read_json(MANIFESTS / "store.json")["store"]


def one(pattern: str) -> Path:
    return next(store().glob(pattern))


def row(result: Result, signal: str) -> list[str]:
    return next(line.split() for line in result.stdout.splitlines() if line.startswith(signal))


def test_a_whole_store_of_the_teacher_and_the_corpus(project):
    result = run(store().name, "--deep", "--against", TOKENS)
    assert result.exit_code == 0, result.output
    signals = [line for line in result.stdout.splitlines() if "whole" in line]
    assert len(signals) == 3 + 4
    assert sum("agrees: 0." in line for line in signals) == 4
    assert "rows against data/corpus/tokens/main: " in result.stdout
    assert "equal" in result.stdout
    assert row(result, "hidden/0")[-6:-4] == ["whole", "agrees:"]


def test_without_the_teacher_no_claim_is_made(project):
    shutil.rmtree("data/teachers")
    result = run(store(), "--deep")
    assert result.exit_code == 0
    assert result.stdout.count("teacher not at hand") == 4


def test_another_teacher_is_refused_with_both_digests(project):
    path = Path("data/teachers/main/teacher.json")
    path.write_text(path.read_text().replace('"weights_sha256": "', '"weights_sha256": "00'))
    result = run(store(), "--deep", "--teacher", "data/teachers/main")
    assert result.exit_code == 4
    assert "data/teachers/main: weights 00" in error_line(result)


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_named_and_captured_again(kind, decant, project):
    before = {path.name: path.read_bytes() for path in MANIFESTS.iterdir()}
    path = one(KINDS[kind])
    name = path.relative_to(store()).as_posix()
    DAMAGES[list(DAMAGES)[len(kind) % len(DAMAGES)]](path)
    result = run(store())
    assert result.exit_code == 3
    assert error_line(result).startswith(f"error: {store()}: 1 damaged file in ")
    assert name in error_line(result)
    assert "then `decant capture main`" in error_line(result)
    assert any(line.startswith(name) for line in result.stdout.splitlines())
    mended = run(store(), "--repair")
    assert mended.exit_code == 0
    receipts = {p: p.stat().st_mtime_ns for p in store().glob("receipts/*/0*.json")}
    assert decant("capture", "main").exit_code == 0
    assert {p: p.stat().st_mtime_ns for p in receipts} == receipts
    assert run(store(), "--deep").exit_code == 0
    assert {path.name: path.read_bytes() for path in MANIFESTS.iterdir()} == before


def test_many_files_are_counted_and_some_named(project):
    files = sorted(store().glob("features.zarr/examples/**/c/**/*")) + sorted(
        store().glob("receipts/**/*.json")
    )
    for path in files:
        if path.is_file():
            path.unlink()
    result = run(store())
    assert result.exit_code == 3
    assert sum(": missing" in line for line in result.stdout.splitlines()) == 20
    assert any(line.startswith("and ") and "more" in line for line in result.stdout.splitlines())


def test_files_of_no_record_are_a_note(project):
    (store() / "staging").mkdir()
    (store() / "staging" / "left").touch()
    result = run(store())
    assert result.exit_code == 0
    assert "1 file in no record: an unfinished capture" in result.stdout


def test_rows_of_an_edited_corpus(project):
    tokens = TokenSet.load(TOKENS)
    rows = {
        split: [{"label": -1, "token_type_ids": [0] * len(r["input_ids"]), **r} for r in found]
        for split, found in columns_of(tokens).items()
    }
    rows["train"][17]["input_ids"][3] += 1
    written(Path("other"), tokens, rows)
    shutil.copytree(TOKENS / "tokenizer", "other/tokenizer", dirs_exist_ok=True)
    result = run(store(), "--against", "other")
    assert result.exit_code == 4
    assert "train row 17: input_ids from position 3" in error_line(result)
    assert "rows of another corpus than other (" in error_line(result)


def test_repair_waits_for_nobody(project):
    with writer_lock(Layout(store()).lock):
        result = run(store(), "--repair")
    assert result.exit_code == 5
    assert "is writing this store" in error_line(result)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere",), "nowhere: no such store; expected a directory, or the name of one below"),
        (("data",), "data: not a store; expected a directory below data/stores"),
        (("data", "--teacher", "data"), "--teacher: says nothing without --deep"),
    ],
)
def test_wrong_arguments(arguments, message, project):
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in error_line(result)
