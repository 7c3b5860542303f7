"""Of a teacher that reads images too, the language model is the teacher."""

import torch
from transformers import AutoModelForCausalLM, Gemma3Config

from pipeline.provenance import read_json
from pipeline.teacher.source.teach import teach
from tests.captured import VOCAB, Captured, signal, write_rows
from tests.trained import trained

SIGNALS = [
    *(signal("hidden", layer, "float16") for layer in (0, 1, 2)),
    signal("attention", 2, "qk"),
    signal("logits", None, "head"),
]
OBJECTIVE = {"feature": {"weight": 1.0}, "output": {"weight": 1.0}}


def gemma3() -> Gemma3Config:
    text = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 48,
        "pad_token_id": 0,
    }
    vision = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "image_size": 28,
        "patch_size": 14,
    }
    return Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)


def test_it_is_taught_captured_and_its_blocks_start_a_student(tmp_path):
    store = Captured(tmp_path, "causal-lm")
    write_rows(store.tokens)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(gemma3())
    assert any("vision" in name for name, _ in model.named_parameters())
    model.save_pretrained(tmp_path / "hub")
    reference = teach(
        name="main",
        tokens=store.tokens,
        output=store.teacher,
        work=tmp_path / "work",
        scratch=None,
        path=str(tmp_path / "hub"),
        revision=None,
        trust_remote_code=False,
        fit=None,
        device="cpu",
    )
    assert (reference.config["model_type"], reference.layers) == ("gemma3_text", 2)
    store.capture(SIGNALS, blocks=[1, 2])
    student = trained(
        store,
        tmp_path,
        SIGNALS,
        objective=OBJECTIVE,
        architecture={},
        init="teacher-layers",
        options={"steps": 1, "learning_rate": 1e-9},
        blocks=[1, 2],
    )
    assert read_json(student / "config.json")["model_type"] == "gemma3_text"
    alone = AutoModelForCausalLM.from_pretrained(student).eval()
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        ours, theirs = alone(input_ids=ids).logits, model.eval()(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
