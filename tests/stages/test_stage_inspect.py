"""`decant inspect`: what is there, where it came from, what was skipped, pending and damaged."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from pipeline.provenance import read_json
from pipeline.store.index import index_signal, read_index, withdraw
from pipeline.store.layout import Layout
from pipeline.store.reader import StoreReader
from pipeline.store.records import manifest_json
from pipeline.store.sealed import read_record, write_record
from pipeline.store.shards import file_digest
from pipeline.store.upkeep.occupancy import bytes_by_part
from tests.cases import error_line


def store() -> Path:
    return next(Path("data/stores").iterdir())


def signal_of(place: str) -> str:
    return next(name for name in read_index(Layout(store()))["signals"] if name.startswith(place))


@pytest.mark.parametrize("columns", [80, 120])
def test_every_number_is_shown_whole(decant, project, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    result = decant("inspect", str(store()))
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert store().name in lines[0]
    assert max(map(len, lines)) <= columns
    assert "…" not in result.output
    table = lines[next(i for i, line in enumerate(lines) if line.startswith("signal ")) + 1 :]
    assert [line.split()[0] for line in table] == ["attention/2", "hidden/0", "hidden/2", "logits"]
    for line in table:
        name, form, splits, tokens, size, per_token, skipped, digest = line.split()
        count = int(size.replace(",", ""))
        assert count / int(tokens.replace(",", "")) == pytest.approx(float(per_token), abs=0.05)
        assert splits == ("all" if name == "logits" else "train")
        assert skipped == "0"
        assert any(
            record["digest"].startswith(digest)
            for path in Path("data/manifests/main").iterdir()
            if (record := read_json(path)).get("form") == form
        )
    for word in ("torch 2.", "transformers 5.", "causal-lm"):
        assert word in result.output


def test_provenance_says_whose_weights_and_which_rows(decant, project, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    spec = StoreReader(store()).plan["spec"]
    weights = spec["teacher"]["weights_sha256"][:8]
    output = decant("inspect", str(store())).output
    assert f"llama (trained as main), weights {weights}, configuration" in output
    assert f"tokens {spec['tokens'][:8]}, tokenizer {spec['tokenizer'][:8]}" in output
    assert "all training rows, seed 0" in output
    shutil.rmtree("data/teachers")
    assert f"llama, weights {weights}" in decant("inspect", str(store())).output


def test_what_is_pending_or_damaged_is_a_line(decant, project):
    name, other = signal_of("hidden/0"), signal_of("hidden/2")
    layout = Layout(store())
    withdraw(layout, name)
    layout.receipt(name, 0).unlink()
    layout.manifest(other).write_bytes(b"{")
    result = decant("inspect", str(store()))
    assert result.exit_code == 3
    assert f"{store()}: damaged: {other}; run `decant verify" in error_line(result)
    segments = len(StoreReader(store()).segments("train"))
    pending = f"pending: {name}, {segments - 1} of {segments} segments have a receipt"
    assert pending in result.output
    assert f"damaged: {other}: {layout.manifest(other)}" in result.output
    assert "logits" in result.output


def test_a_damaged_example_table_or_configuration_is_a_line(decant, project):
    (store() / "assets/teacher/config.json").unlink()
    shard = next(p for p in store().glob("features.zarr/examples/length/c/**/*") if p.is_file())
    shard.write_bytes(b"")
    result = decant("inspect", str(store()))
    assert result.exit_code == 3
    assert "damaged: examples: " in result.output
    assert "damaged: the teacher's config: " in result.output
    assert "hidden/2" in result.output


def test_what_a_record_says_is_text_and_steers_no_terminal(decant, project):
    """A store may come from anywhere, and so may its teacher's configuration."""
    layout = Layout(store())
    path = layout.assets / "teacher/config.json"
    path.write_text(json.dumps({"model_type": "[/red]\x1b[2J[bold]llama"}))
    plan = read_record(layout.plan, store())
    plan["files"]["assets/teacher/config.json"] = file_digest(path, store())
    write_record(layout.plan, plan)
    index = read_index(layout)
    write_record(layout.index, index | {"plan": file_digest(layout.plan, store())})
    result = decant("inspect", str(store()))
    assert result.exit_code == 0, result.output
    assert "[/red]?[2J[bold]llama" in result.output


def test_skipped_examples_are_counted_and_listed(decant, project):
    """Slots of a receipt, as capture leaves them with `nonfinite: skip`."""
    reader, name = StoreReader(store()), signal_of("hidden/2")
    stored = reader.signal(name)
    number = min(stored.receipts)
    slots = tuple(range(23))
    receipts = stored.receipts | {number: replace(stored.receipts[number], skipped=slots)}
    write_record(reader.layout.receipt(name, number), asdict(receipts[number]))
    manifest = manifest_json(stored.declaration, list(receipts.values()), {})
    write_record(reader.layout.manifest(name), manifest)
    index_signal(reader.layout, name, manifest["digest"])
    result = decant("inspect", str(store()))
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("not trained on"))
    table = lines[first + 1 : first + 22]
    members = reader.examples_in(number)
    for line, example in zip(table[:20], members.tolist(), strict=False):
        split, row, source, signal = line.split()
        assert (split, signal) == ("train", "hidden/2/bfloat16")
        assert int(row.replace(",", "")) == reader.examples["row"][example]
        assert int(source.replace(",", "")) == reader.examples["source_row"][example]
    assert table[20].startswith("and 3 more")
    assert "skipped 23 training examples" in result.output


def test_of_no_store_is_one_line(decant, project):
    result = decant("inspect", "data/corpus")
    assert result.exit_code == 3
    assert "no complete store is here" in error_line(result)


def test_all_bytes_of_the_directory_are_told_by_what_they_are(decant, project):
    files = [path for path in store().rglob("*") if path.is_file()]
    result = decant("inspect", str(store()))
    assert f"{sum(path.stat().st_size for path in files):,} bytes in all" in result.output
    for part in ("features", "text", "tokenizer", "teacher", "channels", "records"):
        assert part in result.output
    assert sum(bytes_by_part(store()).values()) == sum(path.stat().st_size for path in files)


def test_a_file_in_the_place_of_the_assets_is_a_record(tmp_path):
    (tmp_path / "assets").write_text("no directory")
    assert bytes_by_part(tmp_path) == {"records": 12}
