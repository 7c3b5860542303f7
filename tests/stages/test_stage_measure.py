"""evaluate-teacher@T, evaluate@S, report, inspect and gc on a project that has run."""

import shutil
from pathlib import Path

import pytest

from pipeline.provenance import read_json, write_json
from tests.cases import error_line, tiny_params, write_params

METRICS = Path("data/metrics")


def store() -> Path:
    return next(Path("data/stores").iterdir())


@pytest.fixture
def one_student(project: Path) -> Path:
    params = tiny_params()
    del params["students"]["soft"]
    write_params(project, params)
    return project


def test_a_student_is_measured_without_its_teacher(decant, project):
    metrics = read_json(METRICS / "students" / "aligned.json")
    shutil.rmtree("data/teachers")
    assert decant("evaluate", "aligned").exit_code == 0
    again = read_json(METRICS / "students" / "aligned.json")
    assert again["test_perplexity"] == metrics["test_perplexity"]
    assert again["agreement"] == metrics["agreement"]
    assert again["teacher"] == "main"


def test_a_teacher_is_measured_in_the_same_words(project):
    teacher = read_json(METRICS / "teachers" / "main.json")
    student = read_json(METRICS / "students" / "aligned.json")
    assert set(teacher) == set(student) - {"agreement", "teacher"}


def test_a_student_that_was_not_trained_is_named(decant, project):
    shutil.rmtree("data/students/aligned")
    result = decant("evaluate", "aligned")
    assert result.exit_code == 3
    assert "data/students/aligned: no whole student" in error_line(result)


def test_the_report_compares_and_says_where_it_is(decant, one_student):
    result = decant("report")
    assert result.exit_code == 0, result.output
    assert str(Path("data/reports/index.html").resolve()) in result.output.replace("\n", "")
    metrics = read_json(Path("data/reports/metrics.json"))
    student = metrics["students"]["aligned"]
    assert student["retention"] == pytest.approx(
        metrics["teacher"]["test_perplexity"] / student["test_perplexity"]
    )
    assert {"test_perplexity", "parameters"} <= set(student)


@pytest.mark.parametrize("columns", [80, 120])
def test_inspect_shows_every_number_whole(decant, project, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    result = decant("inspect", str(store()))
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert store().name in lines[0]
    assert max(map(len, lines)) <= columns
    assert "…" not in result.output
    table = lines[next(i for i, line in enumerate(lines) if line.startswith("signal ")) + 1 :]
    assert [line.split()[0] for line in table] == ["attention/2", "hidden/0", "hidden/2", "logits"]
    for line in table:
        name, form, splits, tokens, size, per_token, skipped, digest = line.split()
        count = int(size.replace(",", ""))
        assert count / int(tokens.replace(",", "")) == pytest.approx(float(per_token), abs=0.05)
        assert splits == ("all" if name == "logits" else "train")
        assert skipped == "0"
        assert any(
            record["digest"].startswith(digest)
            for path in Path("data/manifests/main").iterdir()
            if (record := read_json(path)).get("form") == form
        )
    for word in ("torch 2.", "transformers 5.", "causal-lm", "llama, weights"):
        assert word in result.output


def test_inspect_of_no_store_is_one_line(decant, project):
    result = decant("inspect", "data/corpus")
    assert result.exit_code == 3
    assert "no whole store is here" in error_line(result)


def test_gc_lists_and_on_request_deletes_what_no_manifest_names(decant, project):
    old = store().with_name("0123456789abcdef")
    shutil.copytree(store(), old)
    listed = decant("gc")
    assert listed.exit_code == 0
    assert old.name in listed.output
    assert listed.output.count("bytes") == 2
    assert old.exists()
    assert decant("gc", "--delete").exit_code == 0
    assert not old.exists()
    assert "0 stores" in decant("gc").output
    assert decant("capture", "main").exit_code == 0


def test_gc_does_nothing_where_no_manifest_says_what_is_needed(decant, project):
    shutil.rmtree("data/manifests")
    result = decant("gc", "--delete")
    assert result.exit_code == 2
    assert "found no manifest" in error_line(result)
    assert store().exists()


def test_a_metrics_file_of_another_shape_is_named(decant, one_student):
    write_json(METRICS / "students" / "aligned.json", {"name": "aligned"})
    result = decant("report")
    assert result.exit_code == 3
    assert "data/metrics/students/aligned.json" in error_line(result)
