"""What a capture needs is told by the configuration as by the loaded teacher."""

import shutil
from collections import namedtuple

import pytest

from pipeline.errors import ResourceError
from pipeline.taps.check import TapRequest, check_taps
from pipeline.teacher.capture.disk_space import (
    DISK_RESERVE_BYTES,
    configured_sizes,
    measured_sizes,
    require_space,
)
from tests.captured import signal
from tests.tiny import tiny_batch, tiny_model

SIGNALS = [
    *(signal("hidden", 1, form) for form in ("float16", "bfloat16", "int8")),
    *(signal("attention", 1, form) for form in ("qk", "map")),
    signal("value", 1, "int8"),
]
LOGITS = [
    signal("logits", None, "topk", k=8),
    signal("logits", None, "sampled", n=4),
    signal("logits", None, "head", values="int8"),
]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "gpt_neox", "bert", "distilbert"])
def test_the_configuration_says_the_sizes_that_the_teacher_has(kind):
    model = tiny_model(kind)
    is_classifier = kind in ("bert", "distilbert")
    signals = SIGNALS + ([signal("logits", None, "dense")] if is_classifier else LOGITS)
    report = check_taps(
        model,
        tiny_batch([5, 3]),
        TapRequest(hidden=[1], attention=[1], values=[1], maps=[1], head=not is_classifier),
    )
    task = "classification" if is_classifier else "causal-lm"
    told = configured_sizes(model.config.to_dict(), signals, task=task)
    found = measured_sizes(model, report)
    for one in signals:
        assert told(one)[0] == found(one)[0] > 0, one.name


@pytest.mark.parametrize(
    "config",
    [{"model_type": "foreign"}, {"model_type": "llama", "auto_map": {"AutoModel": "code.Model"}}],
)
def test_what_a_configuration_does_not_say_counts_as_nothing(config):
    sizes = configured_sizes(config, LOGITS, task="causal-lm")
    assert [sizes(one)[0] for one in LOGITS[:1]] == [0]


def test_a_form_that_does_not_fit_counts_as_nothing_until_the_teacher_says_why():
    large = signal("logits", None, "topk", k=1000)
    sizes = configured_sizes(tiny_model("llama").config.to_dict(), [large], task="causal-lm")
    assert sizes(large) == (0, "causal")


def test_the_reserve_counts_too(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    free = usage(10**12, 0, DISK_RESERVE_BYTES + 7)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    require_space(tmp_path, 7)
    with pytest.raises(ResourceError, match=f"{free.free:,} bytes free.* up to {free.free + 1:,}"):
        require_space(tmp_path, 8)
    with pytest.raises(ResourceError, match="decant plan TEACHER --budget SIZE"):
        require_space(tmp_path, 8)
