"""One call measures all that the metrics file promises, for every task."""

import math
import shutil

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from pipeline.corpus.tokens.tokenizer import load_tokenizer
from pipeline.corpus.tokens.tokens import TokenColumns, TokenMeta, TokenSet, write_tokens
from pipeline.errors import ConfigError, IncompatibleError, IntegrityError
from pipeline.evaluate.evaluate import evaluate_model, is_constant
from pipeline.evaluate.options import GenerateOptions, IntervalOptions
from pipeline.provenance import canonical_json

CPU = torch.device("cpu")
ROWS = [[1, 5, 2], [3, 4], [4, 4, 6, 7]]
FEW = IntervalOptions(resamples=20)
WORDS = ["a", "b", "c", "d"]


def token_set(path, *, task="causal-lm", classes=("no", "yes"), vocab=11, rows=ROWS, **extra):
    ids = np.concatenate([np.array(row, np.int32) for row in rows])
    columns = TokenColumns(
        offsets=np.cumsum([0] + [len(row) for row in rows]),
        input_ids=ids,
        loss_mask=np.ones(len(ids), bool),
        source_row=np.arange(len(rows)) * 10,
        piece=np.zeros(len(rows), np.int32),
        **extra,
    )
    each = dict.fromkeys(("train", "validation", "test"), len(rows))
    meta = TokenMeta(
        task=task,
        classes=classes if task in {"classification", "multi-label"} else (),
        vocab=vocab,
        max_length=6,
        pad_id=0,
        columns=(),
        rows=each,
        tokens=dict.fromkeys(each, 9),
        targets=dict.fromkeys(each, 6),
        text_bytes=dict.fromkeys(each, 20),
        overlong=dict.fromkeys(each, 0),
        dropped=dict.fromkeys(each, 0),
        digest="d",
        tokenizer_digest="t",
        corpus_digest="c",
    )
    write_tokens(path, dict.fromkeys(each, columns), meta)
    return TokenSet.load(path)


def measured():
    """What tokenize writes beside the ids of a language task."""
    return {
        "target_bytes": np.array([12, 4, 9], np.int32),
        "target_words": np.array([2, 1, 2], np.int32),
    }


def prompts():
    return {
        **measured(),
        "prompt_tokens": np.array([2, 1, 2], np.int32),
        "references": [["a b"], ["c", "d"], ["a"]],
    }


def llama(vocab=11):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    return LlamaForCausalLM(config)


def bert(outputs=2):
    config = BertConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        pad_token_id=0,
        num_labels=outputs,
    )
    model = BertForSequenceClassification(config)
    torch.nn.init.zeros_(model.classifier.weight)
    return model


def evaluate(model, tokens, **options):
    return evaluate_model(model, tokens, batch_tokens=8, device=CPU, timing_repeats=1, **options)


COST = {
    "parameters",
    "parameters_without_embeddings",
    "bytes_on_disk",
    "tokens_per_second",
    "latency_seconds",
    "timing",
}
ALWAYS = {"task", "score", "lower_is_better", "test_score", "test_chance"}


def test_a_causal_model(tmp_path):
    model = llama()
    torch.nn.init.zeros_(model.lm_head.weight)
    model.save_pretrained(tmp_path / "model")
    found = evaluate(model, token_set(tmp_path / "tokens"), directory=tmp_path / "model")
    metrics = found.metrics
    want = {f"{s}_{m}" for s in ("validation", "test") for m in ("perplexity", "nats_per_token")}
    assert set(metrics) == ALWAYS | {"vocab"} | want | COST
    assert metrics["vocab"] == 11
    assert metrics["test_chance"] == pytest.approx(11)
    assert metrics["test_perplexity"] == metrics["test_score"] == pytest.approx(11)
    assert metrics["validation_nats_per_token"] == pytest.approx(math.log(11))
    assert metrics["score"] == "perplexity"
    assert metrics["lower_is_better"] is True
    assert metrics["timing"]["length"] == 6
    assert not model.training
    canonical_json(metrics)  # nothing that JSON cannot say
    assert [row["targets"] for row in found.predictions] == [2, 1, 3]
    assert [row["row"] for row in found.predictions] == [0, 1, 2]
    assert [row["source_row"] for row in found.predictions] == [0, 10, 20]
    assert found.predictions[2]["nats"] == pytest.approx(3 * math.log(11))


def test_words_and_bytes_of_the_text_and_intervals_of_every_score(tmp_path):
    twice = {name: np.tile(column, 2) for name, column in measured().items()}
    tokens = token_set(tmp_path, rows=ROWS * 2, **twice)
    found = evaluate(llama(), tokens, score="bits_per_byte", intervals=FEW)
    metrics = found.metrics
    nats = sum(row["nats"] for row in found.predictions)
    assert metrics["test_score"] == pytest.approx(nats / 50 / math.log(2))
    assert metrics["test_perplexity_per_word"] == pytest.approx(math.exp(nats / 10))
    assert metrics["validation_perplexity_per_byte"] == pytest.approx(math.exp(nats / 50))
    # Every id as likely, at each of the 12 targets.
    assert metrics["test_chance"] == pytest.approx(12 * math.log2(11) / 50)
    scores = {"perplexity", "nats_per_token", "perplexity_per_word", "perplexity_per_byte"}
    assert set(metrics["test_intervals"]) == scores | {"bits_per_byte"}
    low, high = metrics["test_intervals"]["bits_per_byte"]
    assert low <= metrics["test_score"] <= high
    assert evaluate(llama(), tokens, intervals=FEW).predictions == found.predictions


def test_three_rows_have_no_interval(tmp_path):
    metrics = evaluate(llama(), token_set(tmp_path), intervals=FEW).metrics
    assert metrics["test_intervals"] == {}


@pytest.fixture
def writer(tmp_path):
    """Return a token set of prompts, with a tokenizer, and a model that writes `a` for ever."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{word: 3 + n for n, word in enumerate(WORDS)}}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens = token_set(tmp_path / "tokens", task="prompt-target", vocab=7, **prompts())
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(tokens.tokenizer_path)
    assert load_tokenizer(tokens.tokenizer_path).eos_token_id == 1
    model = llama(11)
    model.generation_config.eos_token_id = None
    torch.nn.init.zeros_(model.lm_head.weight)
    return tokens, model


def test_text_is_generated_for_some_rows_and_scored(writer):
    tokens, model = writer
    # All ids are equally likely: greedily the first one, padding, which is no text.
    found = evaluate(model, tokens, generate=GenerateOptions(rows=2, max_new_tokens=3), score="cer")
    metrics = found.metrics
    assert metrics["generated_rows"] == 2
    assert metrics["test_score"] == metrics["test_cer"] == 1
    assert metrics["test_exact_match"] == 0
    assert "validation_cer" not in metrics
    assert set(metrics["signatures"]) == {"bleu", "chrf", "rouge"}
    assert "against_teacher" not in metrics
    written = [row for row in found.predictions if "text" in row]
    assert len(found.predictions) == 3
    assert [row["text"] for row in written] == ["", ""]
    references = {0: ["a b"], 1: ["c", "d"]}
    assert all(
        row["references"] == references.get(row["row"], row["references"]) for row in written
    )


def test_text_is_compared_with_what_the_teacher_wrote(writer):
    tokens, model = writer
    wrote = {(0, 0): "", (1, 10): "b b", (2, 21): "not this row"}
    found = evaluate(model, tokens, generate=GenerateOptions(max_new_tokens=2), teacher_texts=wrote)
    against = found.metrics["against_teacher"]
    assert against["exact_match"] == 0.5
    assert against["wer"] == 1
    assert set(against) == {
        "bleu", "chrf", "rouge1", "rouge2", "rougeL", "cer", "wer", "exact_match",
    }  # fmt: skip


def test_a_score_of_text_needs_text(writer):
    tokens, model = writer
    model.forward = None  # what is asked for is looked at before anything is run
    with pytest.raises(ConfigError, match=r"found bleu, of text that is .*generate\.rows"):
        evaluate(model, tokens, score="bleu", generate=GenerateOptions(rows=0))


def test_rows_without_prompts_are_named(tmp_path):
    tokens = token_set(tmp_path, task="prompt-target", **measured())
    with pytest.raises(IntegrityError, match="no column prompt_tokens, references, expected"):
        evaluate(llama(), tokens, generate=GenerateOptions())


def test_what_is_missing_is_named_before_anything_is_run(tmp_path):
    """Not after the validation split was worked through."""
    model = llama()
    model.forward = None  # would end in another error
    tokens = token_set(tmp_path, task="prompt-target", **prompts())
    with pytest.raises(IntegrityError, match=r"tokenizer: no whole tokenizer \(it is missing\)"):
        evaluate(model, tokens, generate=GenerateOptions())
    shutil.rmtree(tmp_path / "test")
    with pytest.raises(IntegrityError, match="test: not a readable dataset"):
        evaluate(model, tokens)


def test_a_classifier_that_always_says_yes(tmp_path):
    model = bert()
    model.classifier.bias.data = torch.tensor([0.0, 1.0])
    tokens = token_set(tmp_path, task="classification", label=np.array([1, 1, 0]))
    found = evaluate(model, tokens, splits=("test",))
    metrics = found.metrics
    want = {"test_accuracy", "test_f1", "test_matthews", "test_ece"}
    assert set(metrics) == ALWAYS | {"classes", "is_constant"} | want | COST - {"bytes_on_disk"}
    assert metrics["test_accuracy"] == pytest.approx(2 / 3)
    assert metrics["test_f1"] == pytest.approx(4 / 5)
    assert metrics["test_matthews"] == 0
    assert metrics["test_chance"] == metrics["test_accuracy"]
    sure = math.e / (1 + math.e)
    assert metrics["test_ece"] == pytest.approx(sure - 2 / 3)
    assert found.predictions[2]["label"] == 0
    assert found.predictions[2]["predicted"] == 1
    assert found.predictions[2]["probability"] == pytest.approx(sure)


def test_a_glue_task_is_judged_by_glues_score(tmp_path):
    model = bert()
    model.classifier.bias.data = torch.tensor([0.0, 1.0])
    tokens = token_set(tmp_path, task="classification", label=np.array([1, 1, 0]))
    metrics = evaluate(model, tokens, score="mrpc").metrics
    assert metrics["score"] == "accuracy_f1"
    assert metrics["test_score"] == metrics["test_chance"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert metrics["validation_accuracy_f1"] == metrics["test_score"]
    with pytest.raises(ConfigError, match="found 'stsb', the task classification has"):
        evaluate(model, tokens, score="stsb")


def test_a_label_outside_the_classes_is_refused(tmp_path):
    tokens = token_set(tmp_path, task="classification", label=np.array([1, 2, 0]))
    with pytest.raises(ConfigError, match="found label 2, expected 0 to 1"):
        evaluate(bert(), tokens)


def test_any_number_of_classes(tmp_path):
    model = bert()
    model.classifier.bias.data = torch.tensor([2.0, -2.0])
    targets = np.array([[1, 0], [1, 1], [0, 0]], np.float32)
    found = evaluate(model, token_set(tmp_path, task="multi-label", targets=targets))
    metrics = found.metrics
    assert metrics["score"] == "f1"
    assert metrics["test_score"] == pytest.approx(2 * 2 / (3 + 3))
    assert metrics["test_accuracy"] == pytest.approx(1 / 3)
    assert metrics["test_f1_macro"] == pytest.approx((4 / 5 + 0) / 2)
    assert found.predictions[1]["targets"] == [1, 1]
    yes = 1 / (1 + math.exp(-2))
    assert found.predictions[1]["probabilities"] == pytest.approx([yes, 1 - yes])


def test_a_number(tmp_path, caplog):
    model = bert(1)
    model.classifier.bias.data = torch.tensor([2.0])
    targets = np.array([[1.0], [2.0], [3.5]], np.float32)
    found = evaluate(model, token_set(tmp_path, task="regression", targets=targets), score="stsb")
    metrics = found.metrics
    assert metrics["score"] == "pearson_spearman"
    assert metrics["test_score"] == metrics["test_pearson"] == metrics["test_spearman"] == 0
    assert metrics["test_mse"] == pytest.approx((1 + 0 + 2.25) / 3)
    assert "every prediction is 2: correlations are 0" in caplog.text
    assert found.predictions[2] == {
        "row": 2, "source_row": 20, "target": 3.5, "predicted": pytest.approx(2.0),
    }  # fmt: skip


def test_a_vocabulary_smaller_than_the_tokens_is_refused(tmp_path):
    with pytest.raises(IncompatibleError, match="found a vocabulary of 10, expected at least"):
        evaluate(llama(10), token_set(tmp_path))


@pytest.mark.parametrize(
    ("rows", "constant"),
    [
        ([{"predicted": 1}, {"predicted": 1}], True),
        ([{"predicted": 1}, {"predicted": 0}], False),
        ([{"text": ""}, {"nats": 3.0}, {"text": ""}], True),
        ([{"probabilities": [0.2, 0.9]}, {"probabilities": [0.4, 0.6]}], True),
        ([{"probabilities": [0.2, 0.9]}, {"probabilities": [0.4, 0.4]}], False),
        ([{"nats": 1.0}, {"nats": 1.0}], False),
        ([{"predicted": 1}], False),
    ],
)
def test_a_model_that_always_says_the_same_is_known(rows, constant):
    assert is_constant(rows) is constant
