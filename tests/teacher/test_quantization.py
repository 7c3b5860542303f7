"""Weights in eight or four bits are another teacher: named so, tapped and stored as it is."""

from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.corpus.tokens.tokens import TokenSet
from pipeline.errors import ConfigError
from pipeline.taps.weights import plain_weights
from pipeline.teacher.capture.spec import store_fingerprint, store_spec
from pipeline.teacher.source import quantization as module
from pipeline.teacher.source.quantization import (
    Quantization,
    check_quantization,
    check_stored_quantization,
)
from pipeline.teacher.source.reference import TeacherReference
from pipeline.teacher.source.teach import teach
from pipeline.training.options import TrainOptions
from tests.captured import OPTIONS, Captured, prepared, signal

# The package's own import of torch.jit.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
EIGHT, FOUR = Quantization("bitsandbytes", 8), Quantization("bitsandbytes", 4)
SIGNALS = [
    signal("hidden", 0, "float16"),
    signal("hidden", 2, "bfloat16"),
    signal("attention", 2, "qk"),
    signal("logits", None, "head"),
]


@pytest.fixture
def own(tmp_path) -> Captured:
    return prepared(tmp_path, "llama", width=64)


def taught(captured: Captured, quantization: Quantization | None, **options: Any) -> Captured:
    """The teacher of a capture, referenced anew and not trained."""
    keywords: dict[str, Any] = {
        "name": "t",
        "tokens": captured.tokens,
        "output": captured.teacher,
        "work": captured.root / "work",
        "scratch": None,
        "path": str(captured.teacher / "model"),
        "revision": None,
        "trust_remote_code": False,
        "fit": None,
        "device": "cpu",
        "quantization": quantization,
    }
    teach(**keywords | options)
    return captured


@pytest.mark.parametrize(
    ("quantization", "dtype"),
    [(EIGHT, "float32"), (EIGHT, "bfloat16"), (FOUR, "bfloat16")],
    ids=["8 bits, float32", "8 bits", "4 bits"],
)
def test_a_quantised_teacher_is_captured_as_it_is(own, quantization, dtype):
    pytest.importorskip("bitsandbytes")
    options = replace(OPTIONS, dtype=dtype)
    taught(own, quantization)
    own.capture(SIGNALS, blocks=[1], options=options)
    model = own.load_teacher(
        attention="sdpa",
        dtype=getattr(torch, dtype),
        quantization_config=quantization.config(getattr(torch, dtype)),
        device_map={"": "cpu"},
    )
    head = load_file(own.store / "assets" / "lm_head.safetensors")["weight"]
    assert torch.equal(head, model.lm_head.weight)
    blocks = load_file(own.store / "assets" / "blocks.safetensors")
    for name, value in plain_weights(model).items():
        if name in blocks:
            assert value.is_floating_point()
            # A CPU's products of four bits are of scales in bfloat16.
            torch.testing.assert_close(blocks[name].float(), value.float(), rtol=0.01, atol=1e-3)
    plain = load_file(own.teacher / "model" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    found, true = blocks[name].float(), plain[name]
    assert 0 < (found - true).norm() / true.norm() < {8: 0.02, 4: 0.2}[quantization.bits]
    assert own.reader.plan["spec"]["teacher"]["quantization"] == asdict(quantization)


def test_a_quantised_teacher_is_another_one(own):
    meta, reference = TokenSet.load(own.tokens).meta, TeacherReference.load(own.teacher)
    names = {
        store_fingerprint(store_spec(meta, replace(reference, quantization=packed), OPTIONS))
        for packed in (None, asdict(EIGHT), asdict(FOUR))
    }
    assert len(names) == 3
    assert "quantization" not in reference.identity()


@pytest.mark.parametrize("quantization", [EIGHT, FOUR], ids=["8 bits", "4 bits"])
def test_query_and_key_are_rebuilt_with_the_weights_that_made_them(own, quantization):
    """The check before the first segment would refuse other ones."""
    pytest.importorskip("bitsandbytes")
    taught(own, quantization)
    own.capture([SIGNALS[0], signal("attention", 1, "below")])
    stored = load_file(own.store / "assets" / "attention-1.safetensors")
    assert all(value.is_floating_point() for value in stored.values())
    assert stored["self_attn.q_proj.weight"].shape == (64, 64)


def test_a_missing_package_is_named_before_anything_is_loaded(own, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"teachers.t.model.quantization: bitsandbytes is not in"):
        taught(own, EIGHT, path="no such place")


def test_a_teacher_that_is_trained_here_stays_as_it_is(own):
    fit = TrainOptions(epochs=1, batch_size=2, learning_rate=0.1)
    with pytest.raises(ConfigError, match=r"quantization: given together with a fit section"):
        taught(own, EIGHT, fit=fit)
    with pytest.raises(ConfigError, match=r"quantization: given together with model.scratch"):
        check_quantization(EIGHT, key="teachers.t", path=None, is_trained=True)


def test_weights_that_are_packed_in_their_files_stay_so():
    config = {"quantization_config": {"quant_method": "gptq"}}
    check_stored_quantization(config, None, key="teachers.t", is_trained=False)
    with pytest.raises(
        ConfigError, match=r"quantization: given, but .* already quantised \(gptq\)"
    ):
        check_stored_quantization(config, EIGHT, key="teachers.t", is_trained=False)
    with pytest.raises(
        ConfigError, match=r"teachers.t.fit: given, but the weights are already quantised"
    ):
        check_stored_quantization(config, None, key="teachers.t", is_trained=True)


def test_a_quantised_directory_is_a_teacher_too(own):
    pytest.importorskip("bitsandbytes")
    packed = own.load_teacher(
        quantization_config=EIGHT.config(torch.float32), device_map={"": "cpu"}
    )
    packed.save_pretrained(own.root / "packed")
    taught(own, None, path=str(own.root / "packed"))
    reference = TeacherReference.load(own.teacher)
    assert reference.config["quantization_config"]["load_in_8bit"]
    own.capture([SIGNALS[1]])
    assert own.digests()
