"""The logits a student is compared with are the most faithful there are, whatever its own."""

import pytest

from pipeline.errors import ConfigError, IntegrityError
from pipeline.evaluate.reference import reference_logits
from pipeline.provenance import write_json


def record(signal: str) -> dict:
    form = signal.removeprefix("logits/").split("-")[0]
    stated = {"kind": "logits", "layer": None, "form": form, "digest": f"d-{signal}"}
    return {"store": "s", "signal": signal, **stated}


@pytest.mark.parametrize(
    ("there", "best"),
    [
        (["logits/topk-1"], "logits/topk-1"),
        (["logits/topk-1", "logits/head-2"], "logits/head-2"),
        (["logits/dense-9", "logits/head-2"], "logits/dense-9"),
        (["logits/topk-2", "logits/topk-1"], "logits/topk-1"),
        (["logits/sampled-0", "logits/topk-1"], "logits/topk-1"),
    ],
)
def test_the_most_faithful_form_is_chosen(tmp_path, there, best):
    for signal in [*there, "hidden/2/int8-1"]:
        write_json(tmp_path / f"{signal.replace('/', '.')}.json", record(signal))
    assert reference_logits(tmp_path) == {"store": "s", "signal": best, "digest": f"d-{best}"}


def test_a_form_of_a_package_that_is_not_installed_is_an_error(tmp_path):
    origin = {"package": "decant-new", "version": "1.2"}
    write_json(tmp_path / "logits.new-0.json", record("logits/new-0") | {"origin": origin})
    with pytest.raises(ConfigError, match=r"the package decant-new is not installed, .* 1\.2; pip"):
        reference_logits(tmp_path)


def test_no_logits_is_no_reference(tmp_path):
    write_json(tmp_path / "hidden.2.int8-1.json", record("hidden/2/int8-1"))
    assert reference_logits(tmp_path) is None


def test_samples_and_numbers_are_no_reference(tmp_path):
    write_json(tmp_path / "logits.sampled-1.json", record("logits/sampled-1"))
    assert reference_logits(tmp_path) is None
    write_json(tmp_path / "logits.dense-1.json", record("logits/dense-1"))
    write_json(tmp_path / "store.json", {"task": "multi-label"})
    assert reference_logits(tmp_path) is not None
    write_json(tmp_path / "store.json", {"task": "regression"})
    assert reference_logits(tmp_path) is None


def test_a_damaged_manifest_is_an_error(tmp_path):
    (tmp_path / "logits.topk-1.json").write_text("{")
    with pytest.raises(IntegrityError, match=r"logits\.topk-1\.json: not readable"):
        reference_logits(tmp_path)
