"""A student of fewer ids: rows of its tables, its targets and its export are the teacher's kept."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from pipeline.corpus.tokens.tokens import TokenSet
from pipeline.errors import IncompatibleError
from pipeline.store.reader import StoreReader
from pipeline.student.data.stream import StoreDataset
from pipeline.student.vocabulary.vocabulary import (
    VocabularyDataset,
    corpus_vocabulary,
    keep_vocabulary,
)
from tests.captured import Captured, prepared, signal
from tests.tiny import PAD_ID, Kind, tiny_batch, tiny_model
from tests.trained import trained

FEW = {"train": (6, 9, 4, 7), "validation": (6, 12), "test": (10, 4)}
HEAD = signal("logits", None, "head", values="float16")
HIDDEN = [signal("hidden", layer, "bfloat16") for layer in (0, 3)]


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> Captured:
    """So few training rows that not every id is in them."""
    found = prepared(tmp_path_factory.mktemp("few"), "llama", rows={"lengths": FEW})
    found.capture([HEAD, *HIDDEN, signal("logits", None, "topk", k=8)], blocks=[1, 2, 3])
    return found


def training_ids(store: Captured) -> set[int]:
    return {i for row in TokenSet.load(store.tokens).split("train")["input_ids"] for i in row}


def test_the_ids_are_those_of_the_training_rows_and_the_special_ones(few):
    found = corpus_vocabulary(few.reader)
    expected = training_ids(few) | {PAD_ID, 1, 2}
    assert found.ids.tolist() == sorted(expected)
    assert len(expected) < 64


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "distilbert"])
@pytest.mark.parametrize("tied", [False, True])
def test_kept_rows_give_the_kept_logits(kind: Kind, tied, tmp_path):
    options = {"tie_word_embeddings": tied} if kind in ("llama", "gpt2") else {}
    whole, student = tiny_model(kind, **options), tiny_model(kind, **options)
    ids = torch.tensor([0, 1, 2, *range(5, 64, 3)])
    keep_vocabulary(student, ids)
    assert student.config.vocab_size == len(ids)
    batch = tiny_batch([6, 4], vocab=len(ids))
    ours = student(**batch).logits
    theirs = whole(**batch | {"input_ids": ids[batch["input_ids"]]}).logits
    if ours.shape[-1] == len(ids):
        theirs = theirs[..., ids]
    torch.testing.assert_close(ours, theirs)
    student.save_pretrained(tmp_path)
    again = type(student).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(**batch).logits, ours)


def test_special_ids_are_renumbered_everywhere():
    model = tiny_model("llama", pad_token_id=9, eos_token_id=[7, 30], bos_token_id=50)
    keep_vocabulary(model, torch.tensor([3, 7, 9, 20, 30]))
    config = model.config
    assert (config.pad_token_id, config.eos_token_id, config.bos_token_id) == (2, [1, 4], None)
    assert model.generation_config is not None
    assert model.generation_config.eos_token_id == [1, 4]
    embedding = model.get_input_embeddings()
    assert (embedding.num_embeddings, embedding.padding_idx) == (5, 2)


def test_batches_are_in_the_students_ids(few):
    ids = corpus_vocabulary(few.reader).ids
    ours = VocabularyDataset(few.reader, [HEAD.name], ids=ids).__getitems__([2, 0, 3])
    theirs = StoreDataset(few.reader, [HEAD.name]).__getitems__([2, 0, 3])
    assert ours["input_ids"].min() >= 0
    assert torch.equal(ids[ours["input_ids"]], theirs["input_ids"])
    assert torch.equal(ours["attention_mask"], theirs["attention_mask"])


def test_training_over_the_kept_ids_follows_the_conditioned_teacher(few, tmp_path):
    """A student of all the teacher's blocks is the teacher: over kept ids nothing is to learn."""
    output = trained(
        few, tmp_path, [HEAD],
        objective={"output": {"weight": 1.0}}, architecture={},
        vocabulary="corpus", init="teacher-layers",
        options={"steps": 1, "learning_rate": 1e-12},
    )  # fmt: skip
    loss = (tmp_path / "curve.csv").read_text().splitlines()[1].split(",")[2]
    assert abs(float(loss)) < 1e-4
    teacher = load_file(few.teacher / "model" / "model.safetensors")
    ids = corpus_vocabulary(few.reader).ids
    ours = load_file(output / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        torch.testing.assert_close(ours[name], teacher[name][ids])
    model = AutoModelForCausalLM.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert len(tokenizer) == len(ids) == model.config.vocab_size
    assert tokenizer.pad_token_id == model.config.pad_token_id
    used = [f"w{number}" for number in sorted(training_ids(few))[:5]]
    assert tokenizer.convert_ids_to_tokens(tokenizer(" ".join(used))["input_ids"]) == used


def test_every_term_trains_a_small_student(few, tmp_path):
    output = trained(
        few, tmp_path, [HEAD, *HIDDEN],
        objective={
            "feature": {"weight": 0.5}, "output": {"weight": 1.0}, "labels": {"weight": 0.5},
        },
        architecture={"hidden_size": 16, "num_hidden_layers": 1, "head_dim": 4},
        vocabulary="corpus",
    )  # fmt: skip
    assert AutoModelForCausalLM.from_pretrained(output).config.vocab_size < 64


def test_a_form_of_the_teachers_ids_is_refused_by_name(few, tmp_path):
    with pytest.raises(IncompatibleError, match=r"logits/topk.*keeps \d+ of"):
        trained(
            few, tmp_path, [signal("logits", None, "topk", k=8)],
            objective={"output": {"weight": 1.0}}, architecture={}, vocabulary="corpus",
        )  # fmt: skip


def test_a_classifier_learns_from_whole_logits(tmp_path):
    store = prepared(tmp_path / "store", "bert", rows={"lengths": FEW})
    dense = signal("logits", None, "dense")
    store.capture([dense], blocks=[1, 2, 3])
    output = trained(
        store, tmp_path, [dense],
        objective={"output": {"weight": 1.0}}, architecture={}, vocabulary="corpus",
    )  # fmt: skip
    model = AutoModelForSequenceClassification.from_pretrained(output)
    reader = StoreReader(store.store)
    assert model.config.vocab_size == len(corpus_vocabulary(reader).ids) < 64
    assert np.isfinite(model(torch.tensor([[0, 3, 4]])).logits.detach().numpy()).all()
