"""transformers 4.57 reads what is saved here as transformers 5 does: ids, logits, configuration."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Gemma3TextConfig,
    ModernBertConfig,
    PreTrainedModel,
)

from pipeline.corpus.tokens.tokenizer import train_tokenizer
from pipeline.provenance import read_json
from pipeline.training.both_versions import write_for_both
from tests.captured import prepared, signal
from tests.tiny import tiny_model
from tests.trained import BLOCKS, trained

OLDEST = "4.57.6"
NEEDED = ("tokenizers<0.23", "huggingface_hub<1.0")
TEXTS = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen jugs"] * 3
SIZES = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "layer_types": ["sliding_attention", "full_attention"],
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 5e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    },
}  # fmt: skip
SCALED = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
PLAIN = {"rope_type": "default", "rope_theta": 1e6}
PARTIAL = {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.5}
MODELS: dict[str, Any] = {
    "llama": lambda: tiny_model("llama", vocab=300, rope_parameters=dict(SCALED)),
    "qwen3": lambda: tiny_model("qwen3", vocab=300, rope_parameters=dict(PLAIN)),
    "gpt_neox": lambda: tiny_model("gpt_neox", vocab=300, rope_parameters=dict(PARTIAL)),
    "gpt2": lambda: tiny_model("gpt2", vocab=300),
    "bert": lambda: tiny_model("bert", vocab=300),
    "gemma3_text": lambda: AutoModelForCausalLM.from_config(
        Gemma3TextConfig(**SIZES, num_key_value_heads=2, head_dim=8, sliding_window=4)
    ),
    "modernbert": lambda: AutoModelForSequenceClassification.from_config(
        ModernBertConfig(**SIZES, cls_token_id=1, sep_token_id=2)
    ),
}
NAMES = {
    "llama": {
        "rope_theta": 5e5,
        "rope_scaling": {key: value for key, value in SCALED.items() if key != "rope_theta"},
    },
    "qwen3": {"rope_theta": 1e6},
    "gpt_neox": {"rotary_emb_base": 5e5, "rotary_pct": 0.5},
    "gpt2": {},
    "bert": {},
    "gemma3_text": {"rope_theta": 5e5, "rope_local_base_freq": 2e4},
    "modernbert": {"global_rope_theta": 5e5, "local_rope_theta": 2e4},
}
"""What version 4 calls what version 5 has in `rope_parameters`."""
COMPARE = """
import json, sys
from pathlib import Path
import torch, transformers
from transformers import AutoConfig, AutoTokenizer
found = {"version": transformers.__version__}
for path in sorted(Path(sys.argv[1]).iterdir()):
    name = AutoConfig.from_pretrained(path).architectures[0]
    model = getattr(transformers, name).from_pretrained(path).eval()
    ids = AutoTokenizer.from_pretrained(path)(sys.argv[2])["input_ids"]
    with torch.no_grad():
        found[path.name] = [ids, model(torch.tensor([ids])).logits.tolist()]
print(json.dumps(found))
"""


def save(model: PreTrainedModel, directory: Path) -> None:
    model.save_pretrained(directory)
    tokenizer = train_tokenizer(TEXTS, vocab=300)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|user|>"]})  # pyright: ignore
    tokenizer.save_pretrained(directory)


@pytest.mark.parametrize("kind", MODELS)
def test_version_5_reads_what_it_read_before(kind, tmp_path):
    save(MODELS[kind](), tmp_path)
    before = AutoConfig.from_pretrained(tmp_path).to_dict()
    ids = AutoTokenizer.from_pretrained(tmp_path)(TEXTS[0] + "<|user|>")["input_ids"]
    write_for_both(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == before
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer(TEXTS[0] + "<|user|>")["input_ids"] == ids
    assert tokenizer.extra_special_tokens == ["<|user|>"]
    config = read_json(tmp_path / "config.json")
    assert {key: config[key] for key in NAMES[kind]} == NAMES[kind]
    assert config["torch_dtype"] == config["dtype"] == "float32"


def test_a_student_is_saved_so(tmp_path):
    store = prepared(tmp_path, "llama")
    head = signal("logits", None, "head")
    store.capture([head], blocks=list(BLOCKS))
    student = trained(
        store, tmp_path / "run", [head], objective={"output": {"weight": 1.0}},
        architecture={"num_hidden_layers": 1, "rope_parameters": dict(PLAIN)},
    )  # fmt: skip
    assert read_json(student / "config.json")["rope_theta"] == 1e6
    assert read_json(student / "tokenizer_config.json")["tokenizer_class"] == (
        "PreTrainedTokenizerFast"
    )


@pytest.mark.slow
def test_version_4_reads_the_same(tmp_path):
    """In a process of its own, with the older packages before those of this one."""
    packages, models = tmp_path / "packages", tmp_path / "models"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", packages]
    done = subprocess.run(
        [*command, f"transformers=={OLDEST}", *NEEDED], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"transformers {OLDEST} is not to be had: {done.stderr.strip()[-200:]}")
    expected = {}
    for kind, make in MODELS.items():
        model = make().eval()
        save(model, models / kind)
        write_for_both(models / kind)
        ids = AutoTokenizer.from_pretrained(models / kind)(TEXTS[0])["input_ids"]
        with torch.no_grad():
            expected[kind] = [ids, model(torch.tensor([ids])).logits]
    done = subprocess.run(
        [sys.executable, "-c", COMPARE, models, TEXTS[0]],
        env=os.environ | {"PYTHONPATH": str(packages)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("version") == OLDEST
    for kind, (ids, logits) in expected.items():
        assert found[kind][0] == ids, kind
        torch.testing.assert_close(torch.tensor(found[kind][1]), logits, rtol=1e-4, atol=1e-4)
