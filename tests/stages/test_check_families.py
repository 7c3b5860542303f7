"""check says yes or no, in one line, to teachers and students of unlike families."""

import pytest

from tests.cases import CONTEXT, error_line, tiny_params, write_params

ENCODER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
MAMBA = {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
FALCON = {
    "model_type": "falcon",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
BLOOM = {"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 4}
LLAMA = {"model_type": "llama", **ENCODER, "max_position_embeddings": CONTEXT}
ROTARY = {"rope_theta": 5e5, "head_dim": 8}
HIDDEN = {"hidden": {"layers": [0, 1, 2], "form": "bfloat16"}}
LOGITS = {"logits": {"form": "topk", "k": 16, "temperatures": [1.0]}}
ATTENTION = {"attention": {"layers": [2], "form": "qk"}}
OUTPUT = {"output": {"weight": 1.0}}
FEATURE = {"feature": {"weight": 1.0}}


def checked(decant, folder, scratch, capture, architecture, loss, task="causal-lm"):
    params = tiny_params()
    teacher = params["teachers"]["main"]
    teacher["model"] = {"scratch": scratch}
    teacher["capture"] = {**capture, "segment_tokens": 2048}
    student = params["students"]["aligned"]
    student["model"] = {"architecture": architecture}
    student["loss"] = loss
    params["students"] = {"aligned": student}
    if task == "classification":
        (folder / "rows.tsv").write_text("text\tlabel\none\ta\ntwo\tb\n")
        source = {"kind": "table", "files": "rows.tsv", "label": "label"}
        params["corpus"] = {"source": source, "task": task}
        teacher["capture"]["logits"] = {"form": "dense"}
    write_params(folder, params)
    return decant("check")


@pytest.mark.parametrize(
    ("scratch", "capture", "architecture", "loss", "task"),
    [
        (MAMBA, HIDDEN | LOGITS, {"num_hidden_layers": 1}, OUTPUT | FEATURE, "causal-lm"),
        (FALCON, HIDDEN | LOGITS, {"num_hidden_layers": 1}, OUTPUT | FEATURE, "causal-lm"),
        (
            LLAMA | {"rope_theta": 5e5, "head_dim": 8},
            LOGITS,
            {"rope_theta": 1e4},
            OUTPUT,
            "causal-lm",
        ),
        (
            {"model_type": "roberta", **ENCODER, "max_position_embeddings": CONTEXT + 2},
            HIDDEN,
            {"model_type": "albert", **ENCODER},
            OUTPUT,
            "classification",
        ),
        (
            {"model_type": "bert", **ENCODER, "max_position_embeddings": CONTEXT},
            HIDDEN,
            {"model_type": "roberta", **ENCODER},
            OUTPUT | FEATURE,
            "classification",
        ),
    ],
    ids=["mamba", "falcon", "rotary keys", "albert student", "roberta student"],
)
def test_what_works_passes(decant, empty, scratch, capture, architecture, loss, task):
    result = checked(decant, empty, scratch, capture, architecture, loss, task)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("scratch", "capture", "architecture", "loss", "task", "message"),
    [
        (
            MAMBA,
            ATTENTION | LOGITS,
            {},
            OUTPUT,
            "causal-lm",
            "teachers.main: MambaForCausalLM has no attention heads",
        ),
        (
            {"model_type": "roberta", **ENCODER, "max_position_embeddings": CONTEXT},
            HIDDEN,
            {},
            OUTPUT,
            "classification",
            f"rows may have {CONTEXT} tokens, RobertaForSequenceClassification takes {CONTEXT - 2}",
        ),
        (
            {"model_type": "bert", **ENCODER},
            HIDDEN,
            {"model_type": "albert", **ENCODER},
            OUTPUT | FEATURE,
            "classification",
            "students.aligned.model: AlbertForSequenceClassification: expected one list of 2",
        ),
        (
            BLOOM,
            {"attention": {"layers": [1, 2], "form": "map"}} | LOGITS,
            {},
            OUTPUT | {"attention": {"weight": 1.0}},
            "causal-lm",
            "students.aligned.model: BloomForCausalLM computes attention outside transformers'",
        ),
        (
            LLAMA | {"torch_dtype": "bfloat16"},
            LOGITS,
            {},
            OUTPUT,
            "causal-lm",
            "scratch.torch_dtype: no key of an architecture in LlamaConfig",
        ),
        (
            {"model_type": "fnet", "hidden_size": 32, "num_hidden_layers": 2},
            HIDDEN,
            {},
            OUTPUT,
            "classification",
            "FNetForSequenceClassification: states of a row differ by",
        ),
    ],
    ids=["mamba", "roberta", "albert", "bloom", "dtype", "fnet"],
)
def test_what_does_not_is_one_line(
    decant, empty, scratch, capture, architecture, loss, task, message
):
    result = checked(decant, empty, scratch, capture, architecture, loss, task)
    assert result.exit_code in (2, 4), result.output
    assert message in error_line(result)
