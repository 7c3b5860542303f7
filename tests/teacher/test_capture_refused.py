"""Teachers and requests that a capture refuses before anything is written."""

from dataclasses import replace

import pytest

from pipeline.errors import ConfigError, IncompatibleError
from tests.captured import OPTIONS, prepared, signal

HIDDEN = signal("hidden", 2, "int8")


@pytest.mark.parametrize(
    ("kind", "options", "match"),
    [
        ("gpt_oss", {}, "GptOss.* attention sinks"),
        ("gemma2", {}, "Gemma2.* a soft cap.*`form: map`"),
        ("deberta_v2", {}, "DebertaV2.* outside transformers' AttentionInterface.*`form: map`"),
        ("mistral", {"sliding_window": 8}, "Mistral.*window"),
    ],
)
def test_teachers_that_cannot_be_tapped_are_refused_before_anything_is_written(
    kind, options, match, tmp_path
):
    store = prepared(tmp_path, kind, layers=2, **options)
    with pytest.raises(IncompatibleError, match=match):
        store.capture([signal("attention", 1, "qk")])
    assert [path.name for path in store.store.iterdir()] == ["lock"]


def test_windows_that_no_row_reaches_are_no_obstacle(tmp_path):
    store = prepared(tmp_path, "mistral", layers=1, sliding_window=33)
    store.capture([signal("attention", 1, "qk")])
    assert store.digests()


@pytest.mark.parametrize(
    ("wanted", "options", "error", "match"),
    [
        (signal("hidden", 4, "int8"), OPTIONS, IncompatibleError, r"hidden layer 4 .* has 0\.\.3"),
        (signal("logits", None, "topk", k=64), OPTIONS, IncompatibleError, "k is 64"),
        (
            signal("hidden", 2, "int8"),
            replace(OPTIONS, segment_tokens=16),
            ConfigError,
            "an example of train has 20",
        ),
    ],
)
def test_what_the_teacher_does_not_have_is_refused_before_anything_is_written(
    wanted, options, error, match, tmp_path
):
    store = prepared(tmp_path, "llama")
    with pytest.raises(error, match=match):
        store.capture([wanted], options=options)
    assert not list(store.stores.glob("*/features.zarr"))
