"""A teacher in half precision is captured as it is: what it says, its head, its own rounding."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from pipeline.student.data.features import TeacherFeatures
from pipeline.teacher.capture import assets
from pipeline.teacher.capture.spot_check import spot_check
from pipeline.teacher.source.load import load_teacher
from pipeline.teacher.source.reference import TeacherReference
from tests.captured import OPTIONS, prepared, signal, write_teacher
from tests.tiny import tiny_model

CPU = torch.device("cpu")
SIGNALS = [
    signal("hidden", 0, "int8"),
    signal("hidden", 2, "bfloat16"),
    signal("attention", 1, "below"),
    signal("attention", 2, "qk"),
    signal("attention", 3, "map"),
    signal("logits", None, "head"),
    signal("logits", None, "topk", k=8),
]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_teacher_in_half_precision_says_what_it_says_by_itself(tmp_path, dtype):
    own = prepared(tmp_path, "llama", options=replace(OPTIONS, dtype=dtype))
    own.capture(SIGNALS, blocks=[1])
    half = getattr(torch, dtype)
    for name in ("lm_head", "blocks"):
        stored = load_file(own.store / "assets" / f"{name}.safetensors")
        weights = {key: value for key, value in stored.items() if not key.startswith("input_rms")}
        assert {value.dtype for value in weights.values()} == {half}
    (hidden,) = (s.name for s in SIGNALS if s.kind == "hidden" and s.form.name == "bfloat16")
    teacher = own.load_teacher(attention="sdpa", dtype=half)
    segment = own.reader.read_segment(0, [hidden])
    for first, count in zip(segment.offset, segment.length, strict=True):
        ids = torch.from_numpy(segment.tokens["input_ids"][first : first + count]).long()
        expected = teacher(input_ids=ids[None], output_hidden_states=True).hidden_states[2][0]
        (stored,) = segment.features[hidden].values()
        found = torch.from_numpy(stored[first : first + count]).view(torch.bfloat16).float()
        # Alone and in a batch, half precision rounds differently by its own last bit or two.
        torch.testing.assert_close(found, expected.float(), rtol=0.02, atol=0.05)
    for found in spot_check(own.reader, own.teacher, sorted(own.digests()), device=CPU):
        assert found.is_within, found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_head_that_runs_wider_than_it_was_saved_is_stored_as_it_was_saved(tmp_path, dtype):
    own = prepared(tmp_path, "llama")
    saved = getattr(torch, dtype)
    write_teacher(tmp_path / "teacher", tiny_model("llama", layers=3).to(saved))
    head = signal("logits", None, "head")
    own.capture([head])
    stored = load_file(own.store / "assets" / "lm_head.safetensors")["weight"]
    assert stored.dtype == saved
    model = own.load_teacher(attention="sdpa", dtype=torch.float32)
    assert torch.equal(stored.float(), model.get_output_embeddings().weight)
    features = TeacherFeatures(own.reader, [head.name])
    rows = torch.randn(5, model.config.hidden_size)
    assert torch.equal(features.logits(rows).full, rows @ model.get_output_embeddings().weight.T)


def test_a_store_with_a_wide_head_keeps_it_for_the_signals_that_name_it(tmp_path, monkeypatch):
    own = prepared(tmp_path, "llama")
    write_teacher(tmp_path / "teacher", tiny_model("llama", layers=3).bfloat16())
    first, second = signal("logits", None, "head"), signal("logits", None, "head", values="int8")
    with monkeypatch.context() as patch:
        patch.setattr(assets, "_narrowed", lambda value: value)
        own.capture([first])
    digests = own.digests()
    own.capture([first, second])
    assert digests.items() <= own.digests().items()
    for one in (first, second):
        TeacherFeatures(own.reader, [one.name])


def test_weights_are_loaded_once_and_in_their_dtype(tmp_path, monkeypatch):
    """In its life no parameter is float32: a teacher of 7 B would need twice its memory."""
    own = prepared(tmp_path, "llama", layers=1)
    seen: set[torch.dtype] = set()
    register = torch.nn.Module.register_parameter

    def watch(self: torch.nn.Module, name: str, value: torch.nn.Parameter | None) -> None:
        if value is not None and not value.is_meta:
            seen.add(value.dtype)
        register(self, name, value)

    monkeypatch.setattr(torch.nn.Module, "register_parameter", watch)
    reference = TeacherReference.load(own.teacher)
    model = load_teacher(own.teacher, reference, task="causal-lm", device=CPU, dtype=torch.bfloat16)
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}
    assert seen <= {torch.bfloat16}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blocks_that_run_wider_than_they_were_saved_are_stored_as_they_were_saved(tmp_path, dtype):
    own = prepared(tmp_path, "llama")
    saved = getattr(torch, dtype)
    model = tiny_model("llama", layers=3).to(saved)
    write_teacher(tmp_path / "teacher", model)
    own.capture([], blocks=[1, 3])
    stored = load_file(own.store / "assets" / "blocks.safetensors")
    for name, value in model.state_dict().items():
        if name in stored:
            assert stored[name].dtype == saved
            assert torch.equal(stored[name], value)


def test_a_store_with_wide_blocks_is_whole_and_keeps_them(tmp_path, monkeypatch):
    own = prepared(tmp_path, "llama")
    write_teacher(tmp_path / "teacher", tiny_model("llama", layers=3).bfloat16())
    with monkeypatch.context() as patch:
        patch.setattr(assets, "_narrowed", lambda value: value)
        own.capture([], blocks=[1])
    before = own.index["assets"]["blocks"]
    own.capture([], blocks=[1])
    assert own.index["assets"]["blocks"] == before
    (own.store / "assets" / "blocks.safetensors").unlink()
    own.capture([], blocks=[1])
    assert own.index["assets"]["blocks"] == before


def test_a_single_number_is_narrowed_as_a_matrix_is():
    assert assets._narrowed(torch.tensor(0.5)).dtype == torch.bfloat16
    assert assets._narrowed(torch.tensor(1 / 3)).dtype == torch.float32
