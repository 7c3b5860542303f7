"""select@S: a student depends on the signals it uses, and its evaluation on logits."""

from pathlib import Path

from pipeline.provenance import read_json
from tests.cases import error_line, tiny_params, write_params

SELECTED = Path("data/selected/aligned.json")
AGREEMENT = Path("data/selected/aligned.agreement.json")


def test_it_names_the_signals_of_the_terms_that_are_on(project):
    selected = read_json(SELECTED)
    assert {name.split("-")[0] for name in selected["signals"]} == {
        "hidden/0/bfloat16",
        "hidden/2/bfloat16",
        "attention/2/qk",
        "logits/topk",
    }
    assert selected["maps"] == {"feature": {"0": 0, "1": 2}, "attention": {"1": 2}}


def test_a_map_to_many_layers_is_written_as_lists(decant, project):
    params = tiny_params()
    params["students"]["aligned"]["align"] = {"layers": "emd"}
    write_params(project, params)
    assert decant("select", "aligned").exit_code == 0
    assert read_json(SELECTED)["maps"] == {"feature": {"0": 0, "1": [2]}, "attention": {"1": [2]}}


def test_an_added_layer_changes_neither_file(decant, project):
    before = SELECTED.read_bytes(), AGREEMENT.read_bytes()
    params = tiny_params()
    params["teachers"]["main"]["capture"]["hidden"]["layers"] = [0, 1, 2]
    write_params(project, params)
    assert decant("capture", "main").exit_code == 0
    assert decant("select", "aligned").exit_code == 0
    assert (SELECTED.read_bytes(), AGREEMENT.read_bytes()) == before


def test_other_logits_change_what_evaluation_compares_with_and_not_what_trains(decant, project):
    params = tiny_params()
    student = params["students"]["aligned"]
    student["loss"]["output"]["weight"] = 0.0
    write_params(project, params)
    assert decant("select", "aligned").exit_code == 0
    before, agreement = SELECTED.read_bytes(), read_json(AGREEMENT)
    assert agreement["signal"].startswith("logits/topk-")
    params["teachers"]["main"]["capture"]["logits"] = {"form": "head"}
    write_params(project, params)
    assert decant("capture", "main").exit_code == 0
    assert decant("select", "aligned").exit_code == 0
    assert SELECTED.read_bytes() == before
    assert read_json(AGREEMENT)["signal"].startswith("logits/head-")


def test_without_logits_there_is_no_agreement(decant, project):
    for path in Path("data/manifests/main").glob("logits.*"):
        path.unlink()
    params = tiny_params()
    params["students"]["aligned"]["loss"]["output"]["weight"] = 0.0
    write_params(project, params)
    assert decant("select", "aligned").exit_code == 0
    assert read_json(AGREEMENT) is None
    assert decant("evaluate", "aligned").exit_code == 0
    assert "agreement" not in read_json(Path("data/metrics/students/aligned.json"))


def test_a_signal_that_was_not_captured_is_named(decant, project):
    params = tiny_params()
    params["students"]["aligned"]["align"] = {"layers": {1: 1}}
    write_params(project, params)
    result = decant("select", "aligned")
    assert result.exit_code == 4
    assert "students.aligned: needs hidden/1, which is not in the store (it has" in error_line(
        result
    )
