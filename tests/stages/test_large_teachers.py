"""What parameters and `runtime.yaml` say of large teachers, and what `inspect` shows of it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pipeline.errors import ConfigError
from pipeline.runtime import Runtime
from pipeline.teacher.parameters.capture import CaptureParams
from pipeline.teacher.parameters.model import TeacherModel
from pipeline.teacher.source.placement import Placement
from pipeline.teacher.source.quantization import Quantization
from stages.inspect import inspect
from stages.parameters import validate
from stages.project import runtime
from tests.captured import OPTIONS, prepared, signal

HIDDEN = {"hidden": {"layers": [1], "form": "int8"}}


def test_batches_are_a_number_or_found(tmp_path):
    found = validate({**HIDDEN, "batch_tokens": "auto"}, CaptureParams, file="params.yaml")
    assert found.batch_tokens == "auto"
    for wrong in ("big", 0):
        with pytest.raises(ConfigError, match="batch_tokens"):
            validate({**HIDDEN, "batch_tokens": wrong}, CaptureParams, file="params.yaml")


def test_quantization_is_of_a_pretrained_teacher():
    model = {"path": "somewhere", "quantization": {"bits": 4}}
    found = validate(model, TeacherModel, file="params.yaml")
    assert found.quantization.build() == Quantization("bitsandbytes", 4)
    scratch = {"scratch": {"model_type": "llama"}, "quantization": {"bits": 8}}
    with pytest.raises(ConfigError, match="quantization is for a pretrained path"):
        validate(scratch, TeacherModel, file="params.yaml")
    for wrong in ({"bits": 3}, {"bits": 8, "method": "magic"}, {"bits": 8, "groups": 64}, {}):
        with pytest.raises(ConfigError, match="quantization"):
            validate(model | {"quantization": wrong}, TeacherModel, file="params.yaml")


def machine(values: dict[str, Any]) -> Runtime:
    return validate(values, Runtime, file="runtime.yaml")


def test_a_map_of_devices_is_read_as_accelerate_takes_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("runtime.yaml").write_text(
        "device_map: {model: 0, lm_head: cpu}\nmax_memory: {0: 20GiB, cpu: 1000}\n"
        "offload_directory: big\n"
    )
    expected = Placement({"model": 0, "lm_head": "cpu"}, {0: "20GiB", "cpu": 1000}, Path("big"))
    assert Placement.of(runtime()) == expected
    Path("runtime.yaml").unlink()
    assert Placement.of(runtime()) is None
    monkeypatch.setenv("DECANT_DEVICE_MAP", "auto")
    found = Placement.of(runtime())
    assert found is not None
    assert found.device_map == "auto"
    assert found.offload_directory == tmp_path / "data" / "work" / "offload"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"device_map": "everywhere"}, "device_map"),
        ({"device_map": {"model": [0]}}, "device_map"),
        ({"device_map": "auto", "max_memory": {"0": "much"}}, "max_memory"),
    ],
)
def test_another_map_is_refused(values, said):
    with pytest.raises(ConfigError, match=said):
        machine(values)


def test_memory_without_a_map_says_nothing():
    with pytest.raises(ConfigError, match="runtime max_memory: given without device_map"):
        Placement.of(machine({"max_memory": {"0": "20GiB"}}))


def test_inspect_shows_what_auto_came_to(tmp_path):
    own = prepared(tmp_path, "llama", options=replace(OPTIONS, batch_tokens="auto"), layers=1)
    own.capture([signal("hidden", 1, "float16")])
    found = CliRunner().invoke(inspect, [str(own.store)])
    assert "batches of up to 8,192 tokens, found by auto" in found.stdout
