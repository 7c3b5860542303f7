"""Students whose embedding is narrower than they are, by families that have that: electra and opt.

Without it a small student of a large vocabulary is mostly embedding.
"""

import csv
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    PreTrainedModel,
)

from pipeline.student.loop.train import export
from pipeline.student.model.build import build_student
from pipeline.student.model.origin import StudentModel
from pipeline.taps.anatomy import find_anatomy
from pipeline.taps.head import apply_head, head_parameters, read_head_spec
from pipeline.taps.inputs import run_base
from pipeline.taps.tap import tap
from tests.captured import signal
from tests.tiny import tiny_batch, tiny_config
from tests.trained import trained

ELECTRA = {
    "model_type": "electra", "embedding_size": 8, "hidden_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 4, "intermediate_size": 24,
}  # fmt: skip
OPT = {
    "model_type": "opt", "word_embed_proj_dim": 8, "hidden_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 4, "ffn_dim": 24,
}  # fmt: skip
SIGNALS = [signal("hidden", 0, "bfloat16"), signal("hidden", 3, "bfloat16")]
SIGNALS += [signal("attention", 3, "qk")]
LOGITS = {
    "bert": signal("logits", None, "dense"),
    "llama": signal("logits", None, "topk", k=8, temperatures=(1.0, 2.0)),
}
GOAL = {
    "feature": {"weight": 0.5, "form": "bfloat16"},
    "attention": {"weight": 0.5},
    "output": {"weight": 1.0},
}


def built(teacher: str, architecture: dict[str, Any], **changes: Any) -> PreTrainedModel:
    is_causal = teacher == "llama"
    arguments: dict[str, Any] = {
        "teacher_config": tiny_config(teacher).to_dict(),
        "vocab": 64,
        "classes": () if is_causal else ("no", "yes"),
        "task": "causal-lm" if is_causal else "classification",
        "seed": 0,
    }
    return build_student(StudentModel(architecture=architecture), **arguments | changes).eval()


def test_a_student_of_a_bert_vocabulary_has_three_million_parameters():
    student = built(
        "bert",
        {
            "model_type": "electra", "embedding_size": 64, "hidden_size": 192,
            "num_hidden_layers": 2, "num_attention_heads": 12,
        },
        teacher_config=BertConfig().to_dict(),
        vocab=30522,
    )  # fmt: skip
    total = sum(value.numel() for value in student.parameters())
    assert student.config.vocab_size == 30522
    assert total == 3_123_202
    assert total < 3.5e6


@pytest.mark.parametrize(("teacher", "architecture"), [("bert", ELECTRA), ("llama", OPT)])
def test_what_the_tokenizer_fixes_is_inherited(teacher, architecture):
    config, expected = built(teacher, architecture).config, tiny_config(teacher)
    for key in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id"):
        assert getattr(config, key) == getattr(expected, key)
    assert config.max_position_embeddings == expected.max_position_embeddings


def test_the_state_before_the_first_block_is_the_widened_embedding():
    batch = tiny_batch([6, 4])
    electra = built("bert", ELECTRA)
    with tap(electra, hidden=[0]) as record, torch.no_grad():
        electra(**batch)
        narrow = electra.electra.embeddings(batch["input_ids"])
        expected = electra.electra.embeddings_project(narrow)
    assert narrow.shape[-1] == 8
    torch.testing.assert_close(record.hidden[0], expected)
    opt = built("llama", OPT)
    with tap(opt, hidden=[0, 1]) as record, torch.no_grad():
        run_base(opt, batch)  # the whole model would call the decoder past its base
        states = opt(**batch, output_hidden_states=True).hidden_states
        decoder = opt.model.decoder
        wide = decoder.project_in(decoder.embed_tokens(batch["input_ids"]))
        places = decoder.embed_positions.weight[2:8]  # the first two rows are no positions
    torch.testing.assert_close(record.hidden[0], states[0])
    torch.testing.assert_close(record.hidden[0][0], (wide + places)[0])


@pytest.mark.parametrize("before", [True, False])
def test_the_head_of_a_narrow_embedding_is_read_right(before):
    opt = built("llama", OPT | {"do_layer_norm_before": before})
    assert find_anatomy(opt).is_causal
    batch = tiny_batch([6, 6])
    weight, bias = head_parameters(opt)
    assert weight.shape == (64, 8)
    found = apply_head(run_base(opt, batch), weight, bias, read_head_spec(opt))
    torch.testing.assert_close(found, opt(**batch).logits)


@pytest.mark.parametrize(("teacher", "architecture"), [("bert", ELECTRA), ("llama", OPT)])
def test_all_terms_train_it_and_the_export_loads(teacher, architecture, captured, tmp_path):
    store = captured(teacher)
    output = trained(
        store, tmp_path, [*SIGNALS, LOGITS[teacher]],
        objective=GOAL, architecture=architecture, options={"steps": 3},
    )  # fmt: skip
    with (tmp_path / "curve.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3
    assert all(float(row[term]) > 0 for row in rows for term in ("feature", "attention", "output"))
    factory = AutoModelForCausalLM if teacher == "llama" else AutoModelForSequenceClassification
    model = factory.from_pretrained(output).eval()
    assert model.config.model_type == architecture["model_type"]
    assert model.get_input_embeddings().weight.shape == (64, 8)
    student = built(teacher, architecture)
    export(student, store.reader, tmp_path / "untrained", {})
    again = factory.from_pretrained(tmp_path / "untrained").eval()
    batch = tiny_batch([7, 4])
    torch.testing.assert_close(again(**batch).logits, student(**batch).logits)


def test_it_may_have_fewer_ids_too(captured, tmp_path):
    output = trained(
        captured("bert"), tmp_path, [LOGITS["bert"]],
        objective={"output": {"weight": 1.0}}, architecture=ELECTRA, vocabulary="corpus",
    )  # fmt: skip
    model = AutoModelForSequenceClassification.from_pretrained(output)
    ids, width = model.get_input_embeddings().weight.shape
    assert ids == model.config.vocab_size
    assert width == 8
