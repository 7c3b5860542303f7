"""A teacher: referenced, fine-tuned, or built; and one-line refusals before anything is trained."""

import json
import signal as signals
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from pipeline.corpus.tokens.tokens import TokenSet
from pipeline.errors import ConfigError, IncompatibleError, Interrupted
from pipeline.provenance import read_json
from pipeline.teacher.source.load import load_teacher
from pipeline.teacher.source.reference import TeacherReference
from pipeline.teacher.source.teach import PaddedRows, teach
from pipeline.training.options import TrainOptions
from tests.captured import LENGTHS, VOCAB, prepared, signal, write_rows
from tests.student.runs import after_each_step, send
from tests.tiny import PAD_ID, tiny_model

SCRATCH = {
    "model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 16, "max_position_embeddings": 32,
}  # fmt: skip
FIT = TrainOptions(steps=4, batch_size=4, learning_rate=1e-2, log_every=1, save_every=2)


def run(root: Path, tokens: Path, **changes: Any) -> TeacherReference:
    arguments: dict[str, Any] = {
        "name": "main", "tokens": tokens, "output": root / "teacher", "work": root / "work",
        "scratch": None, "path": None, "revision": None, "trust_remote_code": False,
        "fit": None, "device": "cpu",
    }  # fmt: skip
    return teach(**arguments | changes)


@pytest.fixture
def tokens(tmp_path) -> Path:
    return write_rows(tmp_path / "tokens").path


def test_a_pretrained_teacher_is_referenced_and_never_copied(tokens, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "hub")
    reference = run(tmp_path, tokens, path=str(tmp_path / "hub"))
    assert [path.name for path in (tmp_path / "teacher").iterdir()] == ["teacher.json"]
    assert reference == TeacherReference.load(tmp_path / "teacher")
    assert (reference.layers, reference.trained) == (2, False)
    assert reference.location(tmp_path / "teacher") == str((tmp_path / "hub").resolve())


def test_the_identity_is_that_of_weights_and_not_of_their_place(tokens, tmp_path):
    found = []
    for place, seed in (("a", 0), ("b", 0), ("c", 1)):
        tiny_model("llama", seed=seed).save_pretrained(tmp_path / place)
        found.append(run(tmp_path / place, tokens, path=str(tmp_path / place)).identity())
    assert found[0] == found[1] != found[2]


def test_weights_replaced_after_teach_are_refused(tokens, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "hub")
    reference = run(tmp_path, tokens, path=str(tmp_path / "hub"))
    options: Any = {"task": "causal-lm", "device": torch.device("cpu"), "dtype": torch.float32}
    load_teacher(tmp_path / "teacher", reference, **options)
    tiny_model("llama", seed=1).save_pretrained(tmp_path / "hub")
    with pytest.raises(IncompatibleError, match="as the teach stage found them"):
        load_teacher(tmp_path / "teacher", reference, **options)


def test_weights_that_are_not_there_are_refused(tokens, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "hub")
    file = tmp_path / "hub" / "model.safetensors"
    whole = load_file(file)
    del whole["model.layers.0.mlp.up_proj.weight"]
    save_file(whole, file, metadata={"format": "pt"})
    with pytest.raises(IncompatibleError, match="no weights for model"):
        run(tmp_path, tokens, path=str(tmp_path / "hub"))


def test_a_teacher_from_scratch_is_trained_and_plain(tokens, tmp_path):
    reference = run(tmp_path, tokens, scratch=SCRATCH, fit=FIT)
    assert reference.trained
    directory = tmp_path / "teacher" / reference.model
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert model.config.vocab_size == VOCAB == len(AutoTokenizer.from_pretrained(directory))
    assert read_json(directory / "config.json")["rope_theta"] == 10_000
    assert not list((tmp_path / "work" / "teach").iterdir())
    again = run(tmp_path / "again", tokens, scratch=SCRATCH, fit=FIT)
    assert again.weights_sha256 == reference.weights_sha256


def test_an_interrupted_teacher_ends_with_the_same_bits(tokens, tmp_path, monkeypatch):
    expected = run(tmp_path / "undisturbed", tokens, scratch=SCRATCH, fit=FIT)

    def act(_: str, step: int) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        after_each_step(patch, act)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, tokens, scratch=SCRATCH, fit=FIT)
    assert not (tmp_path / "teacher").exists()
    assert run(tmp_path, tokens, scratch=SCRATCH, fit=FIT) == expected


def test_a_teacher_that_is_told_to_end_writes_a_checkpoint(tokens, tmp_path, monkeypatch):
    expected = run(tmp_path / "undisturbed", tokens, scratch=SCRATCH, fit=FIT)
    rarely = FIT.model_copy(update={"save_every": 200})
    with monkeypatch.context() as patch:
        send(patch, 3, signals.SIGTERM)
        with pytest.raises(Interrupted, match="from the checkpoint of step 3"):
            run(tmp_path, tokens, scratch=SCRATCH, fit=rarely)
    (marker,) = (tmp_path / "work").glob("teach/*/checkpoint-*/complete.json")
    assert marker.parent.name == "checkpoint-3"
    assert not (tmp_path / "teacher").exists()
    assert run(tmp_path, tokens, scratch=SCRATCH, fit=rarely) == expected


def test_fine_tuning_gives_a_new_head_where_classes_differ(tmp_path):
    tokens = write_rows(tmp_path / "tokens", task="classification", token_types=True).path
    tiny_model("bert", num_labels=3).save_pretrained(tmp_path / "hub")
    with pytest.raises(IncompatibleError, match=r"has 3 classes, the corpus 2 \(no, yes\)"):
        run(tmp_path, tokens, path=str(tmp_path / "hub"))
    run(tmp_path, tokens, path=str(tmp_path / "hub"), fit=FIT)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "teacher" / "model")
    assert list(model.config.id2label.values()) == ["no", "yes"]
    before = load_file(tmp_path / "hub" / "model.safetensors")
    name = "bert.encoder.layer.0.attention.self.query.weight"
    moved = (load_file(tmp_path / "teacher/model/model.safetensors")[name] - before[name]).abs()
    assert 0 < moved.max() < 0.1


def test_a_head_with_the_classes_in_another_order_is_refused(tmp_path):
    tokens = write_rows(tmp_path / "tokens", task="classification", token_types=True).path
    names = {"id2label": {0: "YES", 1: "NO"}, "label2id": {"YES": 0, "NO": 1}}
    tiny_model("bert", **names).save_pretrained(tmp_path / "hub")
    with pytest.raises(IncompatibleError, match=r"YES, NO, .* set corpus\.classes to \[yes, no\]"):
        run(tmp_path, tokens, path=str(tmp_path / "hub"))
    # Names that say nothing are taken by number.
    tiny_model("bert", num_labels=2).save_pretrained(tmp_path / "plain")
    assert not run(tmp_path, tokens, path=str(tmp_path / "plain")).trained


def test_a_decoder_that_classifies_learns_the_padding_of_the_corpus(tmp_path):
    """Without it the model cannot find a row's last token in a batch."""
    tokens = write_rows(tmp_path / "tokens", task="classification").path
    model = tiny_model("llama", task="classification")
    model.config.pad_token_id = None
    model.save_pretrained(tmp_path / "hub")
    reference = run(tmp_path, tokens, path=str(tmp_path / "hub"))
    assert reference.config["pad_token_id"] == PAD_ID
    loaded = load_teacher(
        tmp_path / "teacher", reference, task="classification",
        device=torch.device("cpu"), dtype=torch.float32,
    )  # fmt: skip
    ids = torch.tensor([[5, 6, 7], [8, 9, PAD_ID]])
    alone = loaded(ids[1:, :2]).logits
    torch.testing.assert_close(loaded(ids).logits[1:], alone)


@pytest.mark.parametrize(
    ("model", "rows", "match"),
    [
        ({"vocab": 60}, {}, r"has 60 embeddings, the tokenizer 64 ids; use the tokenizer"),
        ({}, {"max_length": 65}, r"rows may have 65 tokens, LlamaForCausalLM takes 64; lower"),
    ],
)
def test_models_that_do_not_fit_the_rows_are_refused(model, rows, match, tmp_path):
    tokens = write_rows(tmp_path / "tokens", **rows).path
    tiny_model("llama", **model).save_pretrained(tmp_path / "hub")
    for fit in (None, FIT):
        with pytest.raises(IncompatibleError, match=match):
            run(tmp_path, tokens, path=str(tmp_path / "hub"), fit=fit)
    assert not (tmp_path / "teacher").exists()
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model_type": "nonsense"}, r"teachers\.main\.model\.scratch: model_type is 'nonsense'"),
        ({"model_type": None}, r"teachers\.main\.model\.scratch: model_type is None"),
        (
            {"hiden_size": 16},
            r"scratch\.hiden_size: no key of an architecture in LlamaConfig; did you mean",
        ),
        ({"hidden_size": "wide"}, r"teachers\.main\.model\.scratch: LlamaConfig refuses it"),
    ],
)
def test_a_configuration_that_is_none_is_one_line(change, match, tokens, tmp_path):
    with pytest.raises(ConfigError, match=match) as error:
        run(tmp_path, tokens, scratch=SCRATCH | change, fit=FIT)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_scratch_without_training_is_refused(tokens, tmp_path):
    with pytest.raises(ConfigError, match=r"teachers\.main\.fit: missing"):
        run(tmp_path, tokens, scratch=SCRATCH)


@pytest.mark.parametrize("fit", [None, FIT])
@pytest.mark.parametrize("fault", ["nothing there", "pickled weights", "remote code", "no weights"])
def test_what_cannot_be_loaded_safely_is_one_line(fault, fit, tokens, tmp_path):
    hub = tmp_path / "hub"
    tiny_model("llama").save_pretrained(hub)
    weights = hub / "model.safetensors"
    match fault:
        case "nothing there":
            hub = tmp_path / "elsewhere"
            hub.mkdir()
        case "pickled weights":
            torch.save(load_file(weights), hub / "pytorch_model.bin")
            weights.unlink()
        case "no weights":
            weights.unlink()
        case "remote code":
            config = json.loads((hub / "config.json").read_text())
            config["auto_map"] = {
                "AutoConfig": "custom.Config", "AutoModelForCausalLM": "custom.Model"
            }  # fmt: skip
            config["model_type"] = "custom"
            (hub / "config.json").write_text(json.dumps(config))
            (hub / "custom.py").write_text("raise SystemExit('executed')")
    with pytest.raises(ConfigError, match=f"teacher {hub}: ") as error:
        run(tmp_path, tokens, path=str(hub), fit=fit)
    assert "\n" not in str(error.value)
    if fault == "remote code":
        assert "set model.trust_remote_code: true and pin model.revision" in str(error.value)
    assert not (tmp_path / "teacher").exists()


def test_padded_rows_ignore_padding_and_what_is_not_in_the_loss_mask(tokens):
    store = write_rows(tokens)
    rows = [store.split("train")[i] for i in (0, 2)]
    collate = PaddedRows(store.meta, tiny_model("llama"))
    batch = collate(rows)
    assert collate.tokens == sum(len(row["input_ids"]) for row in rows)
    assert sorted(batch) == ["attention_mask", "input_ids", "labels"]
    for i, row in enumerate(rows):
        n = len(row["input_ids"])
        expected = [
            token if counts else -100
            for token, counts in zip(row["input_ids"], row["loss_mask"], strict=True)
        ]
        assert batch["labels"][i].tolist() == expected + [-100] * (9 - n)
        assert batch["attention_mask"][i].tolist() == [1] * n + [0] * (9 - n)
        assert batch["input_ids"][i, n:].tolist() == [PAD_ID] * (9 - n)


def test_a_capture_of_a_referenced_teacher_leaves_it_alone(tmp_path):
    store = prepared(tmp_path, "llama", layers=1)
    before = {p: p.read_bytes() for p in store.teacher.rglob("*") if p.is_file()}
    store.capture([signal("hidden", 1, "int8")])
    assert before == {p: p.read_bytes() for p in store.teacher.rglob("*") if p.is_file()}


SEQUENCE = {"regression": (1, "regression"), "multi-label": (3, "multi_label_classification")}


@pytest.mark.parametrize("task", SEQUENCE)
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_head_for_a_number_or_several_classes_is_trained(task, kind, tmp_path):
    outputs, problem = SEQUENCE[task]
    tokens = write_rows(tmp_path / "tokens", task=task, token_types=kind == "bert").path
    # A checkpoint of another task, which brings its own loss and number of classes.
    tiny_model(
        kind, task="classification", problem_type="single_label_classification"
    ).save_pretrained(tmp_path / "hub")
    with pytest.raises(IncompatibleError, match=f"has 2 classes, the corpus {outputs} "):
        run(tmp_path, tokens, path=str(tmp_path / "hub"))
    fit = FIT.model_copy(update={"steps": 30, "learning_rate": 3e-3})
    reference = run(tmp_path, tokens, path=str(tmp_path / "hub"), fit=fit)
    assert (reference.config["problem_type"], reference.config["pad_token_id"]) == (problem, PAD_ID)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "teacher" / "model")
    assert model.config.num_labels == outputs
    store = TokenSet.load(tokens)
    rows = [store.split("train")[i] for i in range(len(LENGTHS["train"]))]
    batch = PaddedRows(store.meta, model)(rows)
    assert batch["labels"].dtype == torch.float32
    assert batch["labels"].tolist() == [row["targets"] for row in rows]
    mean = batch["labels"].mean(dim=0, keepdim=True).expand_as(batch["labels"])
    with torch.no_grad():
        found = model(**batch)
    logits = found.logits
    if task == "regression":
        torch.testing.assert_close(
            found.loss, torch.nn.functional.mse_loss(logits, batch["labels"])
        )
        constant = torch.nn.functional.mse_loss(torch.zeros_like(mean), batch["labels"])
    else:
        entropy = torch.nn.functional.binary_cross_entropy_with_logits
        torch.testing.assert_close(found.loss, entropy(logits, batch["labels"]))
        constant = torch.nn.functional.binary_cross_entropy(
            torch.full_like(mean, 0.5), batch["labels"]
        )
    # Better than knowing nothing: the targets are what is learnt.
    assert found.loss < constant


def test_a_scratch_regression_has_one_output(tmp_path):
    tokens = write_rows(tmp_path / "tokens", task="regression").path
    reference = run(tmp_path, tokens, scratch=SCRATCH, fit=FIT)
    assert reference.config["problem_type"] == "regression"
    assert list(reference.config["id2label"].values()) == ["score"]


def test_a_fitted_regression_is_referenced_without_training(tmp_path):
    tokens = write_rows(tmp_path / "tokens", task="regression", token_types=True).path
    tiny_model("bert", num_labels=1).save_pretrained(tmp_path / "hub")
    assert not run(tmp_path, tokens, path=str(tmp_path / "hub")).trained


@pytest.mark.parametrize("task", ["prompt-target", "messages"])
def test_of_a_prompt_nothing_is_learnt(task, tmp_path):
    store = write_rows(tmp_path / "tokens", task=task)
    rows = [store.split("train")[i] for i in (0, 1)]
    batch = PaddedRows(store.meta, tiny_model("llama"))(rows)
    for i, row in enumerate(rows):
        prompt, length = row["prompt_tokens"], len(row["input_ids"])
        expected = [-100] * prompt + row["input_ids"][prompt:]
        assert batch["labels"][i, :length].tolist() == expected
    reference = run(tmp_path, store.path, scratch=SCRATCH, fit=FIT)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "teacher" / reference.model)
