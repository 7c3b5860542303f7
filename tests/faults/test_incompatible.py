"""Two good things that do not fit: exit code 4 with both values, before the first step."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from pipeline.corpus.tokens.tokenizer import check_same_tokenizer, train_tokenizer
from pipeline.errors import IncompatibleError, IntegrityError
from pipeline.store.index import index_asset
from pipeline.store.planner import row_digest
from pipeline.store.reader import StoreReader
from pipeline.store.shards import file_digest
from pipeline.student.align.needs import select_signals
from pipeline.student.align.objective import Alignment, Objective
from pipeline.student.data.features import TeacherFeatures
from pipeline.student.model.origin import StudentModel
from pipeline.teacher.source.teach import teach
from pipeline.training.options import TrainOptions
from tests.captured import LENGTHS, Captured, copied, prepared, signal, write_rows
from tests.faults.damage import forge_column, forge_manifest
from tests.store import synthetic
from tests.student.runs import ARCHITECTURE, run
from tests.tiny import tiny_model

HIDDEN, HEAD = signal("hidden", 2, "bfloat16"), signal("logits", None, "head")
SIGNALS = [HIDDEN, signal("attention", 2, "qk"), HEAD]
GOAL = Objective.model_validate({"output": {"weight": 1.0, "form": "head"}})
FEATURES = Objective.model_validate({"feature": {"weight": 1.0}})
ATTENTION = Objective.model_validate({"attention": {"weight": 1.0}})


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Captured:
    captured = prepared(tmp_path_factory.mktemp("incompatible"), "llama")
    captured.capture(SIGNALS, blocks=[1, 2, 3])
    return captured


def selected(
    store: Captured,
    goal: Objective = GOAL,
    blocks: Sequence[int] = (1, 2, 3),
    teacher_layer: int = 2,
) -> dict[str, Any]:
    return select_signals(
        store.manifests(SIGNALS, blocks),
        name="tiny",
        objective=goal,
        align=Alignment.model_validate({"layers": {1: teacher_layer}}),
        model=StudentModel(architecture=ARCHITECTURE),
    )


def refused(store: Captured, root: Path, match: str, ledger: Any, **changes: Any) -> None:
    """Train, and see that it ends before the first step: nothing was written."""
    goal = changes.pop("objective", GOAL)
    if "selected" not in changes:
        changes["selected"] = selected(store, goal)
    with pytest.raises(IncompatibleError) as raised:
        run(store, root, objective=goal, **changes)
    ledger.record("does not fit", detected=raised.value.exit_code == 4)
    raised.match(match)
    assert not (root / "student").exists()
    assert not (root / "curve.csv").exists()
    assert not list(root.glob("work/train/*/checkpoint-*"))


@pytest.mark.parametrize(
    ("goal", "architecture", "match"),
    [
        (ATTENTION, {"num_attention_heads": 2, "head_dim": 8}, "2 .*heads.* 4"),
        (GOAL, {"vocab_size": 99}, "vocab_size is 99, the teacher's 64"),
        (GOAL, {"pad_token_id": 5}, "pad_token_id is 5, the teacher's"),
        (GOAL, {"max_position_embeddings": 8}, "rows may have 32 tokens, LlamaForCausalLM takes 8"),
    ],
    ids=["head count", "vocabulary", "padding", "positions"],
)
def test_an_architecture_that_does_not_fit(store, tmp_path, ledger, goal, architecture, match):
    refused(
        store, tmp_path, match, ledger, objective=goal, architecture=ARCHITECTURE | architecture
    )


@pytest.mark.parametrize("change", ["edited", "reordered", "cut shorter"])
def test_the_store_of_another_corpus(store, tmp_path, ledger, change):
    """What was selected names digests; under another store's name others lie."""
    other = Captured(tmp_path / "other", store.task)
    shutil.copytree(store.teacher, other.teacher)
    lengths = {split: list(rows) for split, rows in LENGTHS.items()}
    lengths["train"] = {
        "edited": lengths["train"],
        "reordered": lengths["train"][::-1],
        "cut shorter": [min(length, 16) for length in lengths["train"]],
    }[change]
    write_rows(other.tokens, lengths=lengths, seed=int(change == "edited"))
    other.capture(SIGNALS)
    assert other.store.name != store.store.name
    name = next(iter(selected(store)["signals"]))
    ours, theirs = (StoreReader(s.store).signal(name).digest for s in (store, other))
    refused(
        other,
        tmp_path / "run",
        f"digest {theirs[:16]}, expected {ours[:16]}",
        ledger,
        selected=selected(store) | {"store": other.store.name},
    )


def test_the_store_of_another_teacher(store, tmp_path, ledger):
    """Of fewer layers: the digests are others, and a layer that it has not is named."""
    other = prepared(tmp_path / "other", "llama", layers=2)
    other.capture(SIGNALS)
    refused(
        other,
        tmp_path / "run",
        "has digest [0-9a-f]{16}, expected [0-9a-f]{16}",
        ledger,
        objective=FEATURES,
        selected=selected(store, FEATURES) | {"store": other.store.name},
    )
    with pytest.raises(IncompatibleError, match=r"teacher layer 3 asked for, .* has 0\.\.2"):
        selected(other, FEATURES, blocks=(), teacher_layer=3)


TEXTS = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen jugs"] * 3


def tokenizer(path: Path, change: Any = None) -> Path:
    """A tokenizer on disk, changed in its file."""
    train_tokenizer(TEXTS, vocab=300).save_pretrained(path)
    if change is not None:
        file = path / "tokenizer.json"
        backend = json.loads(file.read_text())
        change(backend)
        file.write_text(json.dumps(backend))
    return path


def one_merge(backend: dict[str, Any]) -> None:
    """The same pieces, two of them made in another order."""
    merges = backend["model"]["merges"]
    merges[3], merges[4] = merges[4], merges[3]


def one_id(backend: dict[str, Any]) -> None:
    vocab = backend["model"]["vocab"]
    one, other = list(vocab)[260:262]
    vocab[one], vocab[other] = vocab[other], vocab[one]


def lower_case(backend: dict[str, Any]) -> None:
    backend["normalizer"] = {"type": "Lowercase"}


def other_space(backend: dict[str, Any]) -> None:
    backend["pre_tokenizer"]["add_prefix_space"] = True


def more_specials(backend: dict[str, Any]) -> None:
    token = {**backend["added_tokens"][0], "id": 300, "content": "<|more|>"}
    backend["added_tokens"].append(token)


def check(own: Path, teacher: Path) -> None:
    check_same_tokenizer(str(own), None, teacher, key="model.checkpoint", remedy="start from")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (one_merge, r"merge 3 of its tokenizer is .*, of the corpus's"),
        (one_id, r"another vocab, where .* is 26[01], the corpus's 26[01]"),
        (lower_case, r"normalizer is .*Lowercase.*, the corpus's None"),
        (other_space, r"pre_tokenizer is .*True.*, the corpus's"),
    ],
)
def test_a_checkpoint_of_another_tokenizer(tmp_path, ledger, change, match):
    teacher = tokenizer(tmp_path / "teacher")
    with pytest.raises(IncompatibleError, match=match) as raised:
        check(tokenizer(tmp_path / "own", change), teacher)
    ledger.record("another tokenizer", detected=raised.value.exit_code == 4)
    raised.match(r"\(tokenizer [0-9a-f]{16}, expected [0-9a-f]{16}\); start from")


@pytest.mark.parametrize("fit", [None, TrainOptions(steps=1)], ids=["as it is", "fine-tuned"])
def test_a_teacher_that_was_replaced_after_tokenizing(store, tmp_path, ledger, fit):
    """Its weights and two merges of its tokenizer are others than those of the token ids."""
    tokens, model = tmp_path / "tokens", tmp_path / "model"
    shutil.copytree(store.tokens, tokens)
    shutil.rmtree(tokens / "tokenizer")
    tokenizer(tokens / "tokenizer")
    tiny_model("llama", vocab=300).save_pretrained(model)
    asked: dict[str, Any] = {
        "name": "main", "tokens": tokens, "output": tmp_path / "teacher", "work": tmp_path / "work",
        "scratch": None, "path": str(model), "revision": None, "trust_remote_code": False,
        "fit": fit, "device": "cpu",
    }  # fmt: skip
    tokenizer(model, one_merge)
    with pytest.raises(IncompatibleError, match=r"merge 3 .* run decant tokenize main") as raised:
        teach(**asked)
    ledger.record("another tokenizer", detected=raised.value.exit_code == 4)
    assert not (tmp_path / "teacher").exists()
    tokenizer(model)
    teach(**asked)


def test_what_does_not_change_a_text_is_no_other_tokenizer(tmp_path):
    """An added special token, no tokenizer at all, and merges written as files of old have them."""
    teacher = tokenizer(tmp_path / "teacher")
    check(tokenizer(tmp_path / "same"), teacher)
    check(tokenizer(tmp_path / "more", more_specials), teacher)

    def as_text(backend: dict[str, Any]) -> None:
        backend["model"]["merges"] = [" ".join(pair) for pair in backend["model"]["merges"]]

    check(tokenizer(tmp_path / "old", as_text), teacher)
    (tmp_path / "none").mkdir()
    check(tmp_path / "none", teacher)


def test_a_checkpoint_is_compared_before_its_weights_are_read(store, tmp_path, ledger):
    """A student of the same sizes, whose words have changed places; its weights are not there."""
    checkpoint = tmp_path / "checkpoint"
    tiny_model("llama", layers=1).save_pretrained(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    shutil.copytree(StoreReader(store.store).tokenizer(), checkpoint, dirs_exist_ok=True)
    file = checkpoint / "tokenizer.json"
    backend = json.loads(file.read_text())
    vocab = backend["model"]["vocab"]
    one, other = list(vocab)[10:12]
    vocab[one], vocab[other] = vocab[other], vocab[one]
    file.write_text(json.dumps(backend))
    refused(
        store,
        tmp_path / "run",
        "model.checkpoint .*: its tokenizer has another vocab",
        ledger,
        architecture=None,
        checkpoint=str(checkpoint),
        selected=selected(store),
    )


@pytest.mark.parametrize(
    "tensors",
    [{"weight": np.zeros((3, 3), "f4")}, {"bias": np.zeros(3, "f4")}],
    ids=["other width", "no weight"],
)
def test_a_head_of_other_sizes(store, tmp_path, ledger, tensors):
    """A store put together of two: every record is right, the head belongs to another teacher."""
    copy = copied(store, tmp_path / "copy")
    path = copy.layout.assets / "lm_head.safetensors"
    path.write_bytes(save(tensors))
    entry = {"file": path.name, **file_digest(path, copy.store)}
    index_asset(copy.layout, "lm_head", entry)
    forge_manifest(copy.store, lambda m: m["declaration"]["info"].update(lm_head=entry), HEAD.name)
    reader = StoreReader(copy.store)
    with pytest.raises(IncompatibleError, match=r"lm_head is .*, the signal needs \(64, 32\)") as e:
        TeacherFeatures(reader, [HEAD.name])
    ledger.record("does not fit", detected=e.value.exit_code == 4)


def test_equal_text_with_another_label_is_another_row(whole_store):
    ids = {"input_ids": np.arange(4), "loss_mask": np.ones(4)}
    digests = {
        row_digest(ids, label, source_row, piece)
        for label in (0, 1)
        for source_row in (0, 1)
        for piece in (0, 1)
    }
    assert len(digests) == 8


@pytest.mark.usefixtures("unsynced")
def test_labels_of_two_rows_of_equal_text_never_change_places(tmp_path, monkeypatch, ledger):
    """Which label a row has is part of who it is: exchanged, both are rows that nobody planned."""
    plain = synthetic.rows()
    plan = synthetic.plan()
    one, other = np.flatnonzero((plan.length == 6) & (plan.split < 2))[:2]
    for values in plain.tokens.values():
        values[other] = values[one]
    plain.label[[one, other]] = 0, 1
    monkeypatch.setattr(synthetic, "rows", lambda: plain)
    store = synthetic.Synthetic(tmp_path / "s").run(())
    table = StoreReader(store).examples
    assert table["label"][[one, other]].tolist() == [0, 1]
    assert table["digest"][one].tobytes() != table["digest"][other].tobytes()

    def exchange(column: Any) -> Any:
        column[[one, other]] = column[[other, one]]
        return column

    forge_column(store, "label", exchange)
    segment = int(table["segment"][one])
    with pytest.raises(IntegrityError, match="is not the row that was planned"):
        StoreReader(store).read_segment(segment)
    ledger.record("labels exchanged")
