"""NaN, infinities and values beyond a form's range: never stored, never trained on, counted."""

import csv
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from pipeline.corpus.tokens.tokens import TokenColumns, TokenSet, token_digest, write_tokens
from pipeline.errors import IntegrityError
from pipeline.store.reader import StoreReader
from pipeline.student.data.stream import StoreDataset
from pipeline.teacher.source.reference import TeacherReference, weights_sha256
from stages.cli import main
from tests.captured import prepared, signal
from tests.faults.forked import Child, decant, start
from tests.faults.small_project import SEGMENTS, STUDENT, SmallProject, small_project

EVERY_FORM = [
    *(signal("hidden", layer, form) for layer in (0, 2) for form in ("float16", "bfloat16")),
    signal("hidden", 1, "int8"),
    signal("attention", 2, "qk"),
    signal("attention", 1, "map"),
    signal("value", 2, "int8"),
    signal("logits", None, "topk", k=8, temperatures=(1.0, 2.0)),
    signal("logits", None, "sampled", n=8),
    signal("logits", None, "head", values="int8"),
    signal("logits", None, "head", values="float16"),
]
CAPTURE: dict[str, Any] = {
    "hidden": {"layers": [1, 2], "form": "int8"},
    "logits": {"form": "topk", "k": 8, "temperatures": [1.0]},
    "blocks": [1],
    **SEGMENTS,
}
ONE_BATCH: dict[str, Any] = {
    **STUDENT,
    "model": {"architecture": {"num_hidden_layers": 1}},
    "loss": {"output": {"weight": 1.0}, "labels": {"weight": 0.5}},
    "train": {"steps": 3, "batch_size": 64, "learning_rate": 0.01, "log_every": 1},
    "pool_segments": 64,
}
pytestmark = pytest.mark.usefixtures("unsynced")


def break_teacher(teacher: Path, token: int, value: float) -> None:
    """Let the teacher embed one token as `value` everywhere."""
    path = teacher / "model" / "model.safetensors"
    weights = load_file(path)
    (name,) = [n for n in weights if n.endswith(("embed_tokens.weight", "word_embeddings.weight"))]
    weights[name][token] = value
    save_file(weights, path, metadata={"format": "pt"})
    reference = TeacherReference.load(teacher)
    replace(reference, weights_sha256=weights_sha256(path.parent)).save(teacher)


def lone_token(
    tokens: Path, *, longest: bool = False, besides: Collection[int] = ()
) -> tuple[int, int]:
    """Return a token of a single row of all, one of training, and that row.

    With `longest` it is a row that the check before the first segment would look at.
    """
    token_set = TokenSet.load(tokens)
    rows = {split: token_set.split(split)["input_ids"] for split in ("train", "validation", "test")}
    others = {token for split in ("validation", "test") for row in rows[split] for token in row}
    size = max(map(len, rows["train"]))
    return next(
        (token, i)
        for i, row in enumerate(rows["train"])
        for token in row
        if (len(row) == size) == longest
        and i not in besides
        and token not in others
        and sum(token in other for other in rows["train"]) == 1
    )


def skipped_rows(store: Path, name: str) -> set[tuple[str, int]]:
    """Return split and source row of what a signal's receipts say was skipped."""
    reader = StoreReader(store)
    table = reader.examples
    return {
        (reader.plan["segments"][number], int(table["source_row"][example]))
        for number, receipt in reader.signal(name).receipts.items()
        for example in reader.examples_in(number)
        if int(table["slot"][example]) in receipt.skipped
    }


def test_every_form_skips_the_rows_and_nothing_else(tmp_path, ledger):
    """Among them rows that the check before the first segment would look at."""
    store = prepared(tmp_path, "llama", layers=2)
    spoilt = {}
    for value, longest in ((math.nan, True), (math.inf, False), (-math.inf, False)):
        token, row = lone_token(store.tokens, longest=longest, besides=set(spoilt.values()))
        break_teacher(store.teacher, token, value)
        spoilt[token] = row
    store.capture(EVERY_FORM, blocks=[1], nonfinite="skip")
    names = [one.name for one in EVERY_FORM]
    expected = {("train", row) for row in spoilt.values()}
    missed = [name for name in names if skipped_rows(store.store, name) != expected]
    dataset = StoreDataset(store.pinned(EVERY_FORM), names)
    batch = dataset.__getitems__(list(range(len(dataset))))
    parts = [part for parts in batch["features"].values() for part in parts.values()]
    is_finite = all(part.isfinite().all() for part in parts if part.is_floating_point())
    is_there = bool(torch.isin(batch["input_ids"], torch.tensor(list(spoilt))).any())
    for name in names:
        wrong = is_there or not is_finite
        ledger.record("not finite: skip", detected=name not in missed, wrong=wrong)
    assert missed == []
    assert is_finite
    assert not is_there
    assert len(dataset) == len(TokenSet.load(store.tokens).split("train")) - len(spoilt)


def test_class_logits_skip_what_is_not_finite(tmp_path, ledger):
    store = prepared(tmp_path, "bert", layers=1)
    token, row = lone_token(store.tokens)
    break_teacher(store.teacher, token, math.nan)
    dense = signal("logits", None, "dense")
    with pytest.raises(IntegrityError, match=rf"logits/dense.* the first nan, in row {row} of tr"):
        store.capture([dense])
    store.capture([dense], nonfinite="skip")
    found = skipped_rows(store.store, dense.name)
    ledger.record("not finite: class logits, skip", detected=found == {("train", row)})
    assert found == {("train", row)}


def test_a_value_beyond_one_form_is_within_another(tmp_path, ledger):
    """A million is no float16; after the norm it is as good as any other value."""
    store = prepared(tmp_path, "llama", layers=2)
    token, row = lone_token(store.tokens)
    break_teacher(store.teacher, token, 1e6)
    short = EVERY_FORM[0]
    assert short.name.startswith("hidden/0/float16")
    beyond = rf"{short.name}.* the first 1e\+06, beyond the form's range, in row {row} of train"
    with pytest.raises(IntegrityError, match=beyond):
        store.capture([short])
    store.capture(EVERY_FORM, nonfinite="skip")
    found = {one.name: skipped_rows(store.store, one.name) for one in EVERY_FORM}
    expected = {name: set() for name in found} | {
        name: {("train", row)} for name in found if name.rpartition("/")[2].startswith("float16")
    }
    ledger.record("not finite: beyond float16, skip", detected=found == expected)
    assert found == expected


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> SmallProject:
    return small_project(tmp_path_factory.mktemp("bare") / "project")


def run(project: SmallProject, *arguments: str) -> Child:
    child = start(
        decant, *arguments, cwd=project.root, stderr=project.root / f"{arguments[0]}.stderr"
    )
    child.wait()
    return child


def broken(bare: SmallProject, root: Path, value: float) -> tuple[SmallProject, int, int]:
    """A project whose teacher spoils one row; the row's token and number."""
    project = bare.copy(root)
    token, row = lone_token(project.data / "corpus" / "tokens" / "main")
    break_teacher(project.teacher, token, value)
    return project, token, row


@pytest.mark.parametrize(
    ("value", "layer", "words"),
    [(math.nan, 1, "nan"), (1e6, 0, "1e+06, beyond the form's range")],
)
def test_the_stage_stops_with_the_signal_segment_row_and_value(
    value, layer, words, bare, tmp_path, ledger
):
    project, _, row = broken(bare, tmp_path / "project", value)
    hidden = {"layers": [layer], "form": "float16"}
    project.parameters({"hidden": hidden, **SEGMENTS})
    child = run(project, "capture", "main")
    line = child.error_line()
    is_named = f"the first {words}, in row {row} of train" in line
    is_named &= line.startswith(f"error: hidden/{layer}/float16") and " segment " in line
    seen = StoreReader(project.store).signals
    ledger.record("not finite: stop", detected=child.code == 3 and is_named, wrong=bool(seen))
    assert child.code == 3
    assert is_named, line
    assert seen == []
    project.parameters({"hidden": hidden, "nonfinite": "skip", **SEGMENTS})
    assert run(project, "capture", "main").code == 0
    (name,) = StoreReader(project.store).signals
    assert skipped_rows(project.store, name) == {("train", row)}


def train_watched(token: int, report: Path) -> None:
    """Train, and report whether a batch ever held the token, and in how many batches it could."""
    found = {"batches": 0, "with_token": 0}
    plain = StoreDataset.__getitems__

    def watched(self: StoreDataset, indices: list[int]) -> dict[str, Any]:
        batch = plain(self, indices)
        found["batches"] += 1
        found["with_token"] += bool((batch["input_ids"] == token).any())
        return batch

    StoreDataset.__getitems__ = watched
    try:
        decant("train", "small")
    finally:
        report.write_text(json.dumps(found))


def train_student(project: SmallProject, token: int) -> tuple[dict[str, int], list[float]]:
    """Select and train; return what was watched, and the losses."""
    assert run(project, "select", "small").code == 0
    report = project.root / "watched.json"
    child = start(
        train_watched, token, report, cwd=project.root, stderr=project.root / "train.stderr"
    )
    assert child.wait() == 0, child.errors()
    with project.curve.open() as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    return json.loads(report.read_text()), losses


def write_without(tokens: Path, row: int) -> None:
    """Write a token set anew, without one training row."""
    token_set = TokenSet.load(tokens)
    splits: dict[Any, TokenColumns] = {}
    for split in ("train", "validation", "test"):
        table: Mapping[str, Any] = token_set.split(split).to_dict()  # pyright: ignore[reportAssignmentType]
        keep = [i for i in range(len(table["piece"])) if split != "train" or i != row]
        rows = [table["input_ids"][i] for i in keep]
        masks = [table["loss_mask"][i] for i in keep]
        splits[split] = TokenColumns(
            offsets=np.cumsum([0, *map(len, rows)]).astype(np.int64),
            input_ids=np.concatenate(rows).astype(np.int32),
            loss_mask=np.concatenate(masks).astype(bool),
            source_row=np.array(table["source_row"])[keep].astype(np.int64),
            piece=np.array(table["piece"])[keep].astype(np.int32),
            target_bytes=np.array(table["target_bytes"])[keep].astype(np.int32),
            target_words=np.array(table["target_words"])[keep].astype(np.int32),
        )
    rows_of = {split: len(columns.piece) for split, columns in splits.items()}
    changed = {"rows": rows_of, "digest": token_digest(splits)}
    write_tokens(tokens, splits, token_set.meta.model_copy(update=changed))


def test_a_skipped_row_is_counted_and_never_trained_on(bare, tmp_path, ledger):
    """The student is the one of a corpus without that row, but for the order of its sums."""
    project, token, row = broken(bare, tmp_path / "skipping", math.nan)
    project.parameters({**CAPTURE, "nonfinite": "skip"}, ONE_BATCH)
    assert run(project, "capture", "main").code == 0
    shown = CliRunner().invoke(main, ["inspect", str(project.store)], env={"COLUMNS": "200"})
    lines = [line.split() for line in shown.output.splitlines()]
    counts = {line[0]: line[-2] for line in lines if line and line[0] in ("hidden/1", "logits")}
    watched, losses = train_student(project, token)
    weights = load_file(project.student / "model.safetensors")
    is_finite = all(value.isfinite().all() for value in weights.values())

    without = bare.copy(tmp_path / "without")
    write_without(without.data / "corpus" / "tokens" / "main", row)
    without.parameters(CAPTURE, ONE_BATCH)
    assert run(without, "capture", "main").code == 0
    plain, expected = train_student(without, token)
    others = load_file(without.student / "model.safetensors")
    same = all(torch.allclose(weights[name], others[name], atol=1e-3) for name in others)
    wrong = watched["with_token"] > 0 or not is_finite or not same
    ledger.record("not finite: skipped row in training", detected=not wrong, wrong=wrong)
    assert counts == {"hidden/1": "1", "logits": "1"}, shown.output
    assert watched["batches"] == plain["batches"] == 3
    assert watched["with_token"] == 0
    assert is_finite
    assert losses == pytest.approx(expected, rel=1e-4)
    assert same
