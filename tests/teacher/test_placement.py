"""A teacher spread over CPU and disk says what the same teacher says on one device, bit for bit."""

import gc
import shutil
from typing import Any

import pytest
import torch

from pipeline.errors import ConfigError, ResourceError
from pipeline.taps.head import head_parameters
from pipeline.taps.weights import plain_weights
from pipeline.teacher.capture.spot_check import spot_check
from pipeline.teacher.source import load as module
from pipeline.teacher.source.load import load_teacher
from pipeline.teacher.source.placement import Placement, input_device, is_spread
from pipeline.teacher.source.reference import TeacherReference
from tests.captured import Captured, copied, prepared, signal
from tests.tiny import tiny_batch

CPU = torch.device("cpu")
SPREAD = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "disk",
    "model.layers.1": "cpu",
    "model.layers.2": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}
SIGNALS = [
    signal("hidden", 0, "float16"),
    signal("hidden", 1, "int8"),
    signal("hidden", 3, "bfloat16"),
    signal("attention", 1, "qk"),
    signal("attention", 2, "below"),
    signal("attention", 3, "map"),
    signal("logits", None, "head"),
    signal("logits", None, "topk", k=8),
]


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Captured:
    found = prepared(tmp_path_factory.mktemp("plain"), "llama")
    found.capture(SIGNALS, blocks=[2])
    return found


def loaded(captured: Captured, places: Any, dtype: torch.dtype = torch.float32, **options: Any):
    return load_teacher(
        captured.teacher,
        TeacherReference.load(captured.teacher),
        task="causal-lm",
        device=CPU,
        dtype=dtype,
        placement=Placement(places, **options),
    )


def test_a_spread_teacher_captures_the_same_bits(plain, tmp_path):
    spread = copied(plain, tmp_path / "spread")
    shutil.rmtree(spread.stores)
    spread.capture(SIGNALS, blocks=[2], device_map=SPREAD)
    assert spread.store.name == plain.store.name
    assert spread.digests() == plain.digests()
    assert spread.index["assets"] == plain.index["assets"]


def test_a_spread_teacher_is_asked_again_by_a_deep_check(plain):
    names = sorted(plain.digests())
    found = spot_check(plain.reader, plain.teacher, names, device=CPU, placement=Placement(SPREAD))
    assert {one.signal for one in found} == {n for n in names if not n.startswith("attention/2")}
    assert all(one.is_within for one in found)


def test_weights_that_are_elsewhere_are_read_and_stay_elsewhere(plain):
    model, own = loaded(plain, SPREAD), plain.load_teacher().state_dict()
    assert is_spread(model)
    offloaded = {name for name, value in model.named_parameters() if value.is_meta}
    assert any("layers.0" in name for name in offloaded)
    for _ in range(2):
        found = plain_weights(model)
        assert list(found) == list(own)
        assert all(torch.equal(found[name], own[name]) for name in own)
    assert torch.equal(head_parameters(model)[0], own["lm_head.weight"])
    assert {name for name, value in model.named_parameters() if value.is_meta} == offloaded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offloaded_weights_are_of_the_dtype_asked_for(plain, tmp_path, dtype):
    model = loaded(plain, SPREAD, dtype, offload_directory=tmp_path / "offload")
    assert {value.dtype for value in plain_weights(model).values()} == {dtype}
    batch = tiny_batch([5, 9])
    expected = plain.load_teacher(attention="sdpa", dtype=dtype)(**batch).logits
    assert torch.equal(model(**batch).logits, expected)


def test_what_disk_takes_goes_with_the_model(plain, tmp_path):
    model = loaded(plain, SPREAD, offload_directory=tmp_path / "offload")
    assert len(list((tmp_path / "offload").iterdir())) == 1
    del model
    gc.collect()  # hooks and modules refer to each other
    assert not list((tmp_path / "offload").iterdir())


def test_a_limit_of_memory_sends_the_rest_to_disk(plain):
    model = loaded(plain, "auto", max_memory={"cpu": 40_000})
    assert "disk" in model.hf_device_map.values()  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ({"model": 1, "lm_head": 0}, "cuda:1"),
        ({"model.embed_tokens": "cpu", "model.layers": "cuda:1", "lm_head": 0}, "cuda:1"),
        ({"": "disk"}, "cpu"),
        ({"model": "cpu", "lm_head": "disk"}, "cpu"),
    ],
)
def test_inputs_go_where_the_embedding_runs(plain, places, expected):
    model = plain.load_teacher()
    assert input_device(model, torch.device("meta")) == torch.device("meta")
    model.hf_device_map = places  # pyright: ignore[reportAttributeAccessIssue]
    assert input_device(model, CPU) == torch.device(expected)


@pytest.mark.parametrize(
    "places",
    [{"model": "disk"}, {"model": "cpu", "lm_head": "nowhere"}, {"model": 7, "lm_head": "cpu"}],
    ids=["a module without", "no device", "no such device"],
)
def test_a_map_that_does_not_fit_is_named(plain, places):
    with pytest.raises(ConfigError, match=r"runtime device_map \{'model'.*expected a device"):
        loaded(plain, places)


def test_weights_that_do_not_fit_are_a_matter_of_resources(plain, monkeypatch):
    class Full:
        @staticmethod
        def from_pretrained(*_: Any, **__: Any) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(module, "auto_class", lambda _: Full)
    with pytest.raises(ResourceError, match=r"do not fit into memory.*device_map: auto"):
        loaded(plain, None)
