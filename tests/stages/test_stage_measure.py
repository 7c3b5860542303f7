"""evaluate-teacher@T, evaluate@S and report on a project that has run."""

import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.evaluate import vocabulary
from pipeline.evaluate.predictions import read_predictions
from pipeline.provenance import read_json, write_json
from tests.cases import error_line, tiny_params, write_params

METRICS = Path("data/metrics")
PREDICTIONS = Path("data/predictions")


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


def test_a_students_metrics_say_which_signals_it_is_made_of(decant, project):
    metrics = read_json(METRICS / "students" / "aligned.json")
    selected = read_json(Path("data/selected/aligned.json"))
    used = metrics["trained_from"]
    assert {one["signal"]: one["digest"] for one in used} == selected["signals"]
    assert {one["store"] for one in used} == {selected["store"]}
    assert metrics["compared_with"] == [read_json(Path("data/selected/aligned.agreement.json"))]
    assert read_json(Path("data/students/aligned/distillation.json"))["store"] == selected["store"]
    # A student of an earlier version says nothing of it.
    Path("data/students/aligned/distillation.json").unlink()
    assert decant("evaluate", "aligned").exit_code == 0
    assert read_json(METRICS / "students" / "aligned.json")["trained_from"] == []


def other_digest(path: Path, key: str) -> str:
    """Let the token set say that it is of another tokenizer, or has other rows."""
    meta = read_json(path)
    old, meta[key] = meta[key], "0" * 64
    write_json(path, meta)
    return old[:16]


@pytest.mark.parametrize(
    ("key", "word"), [("tokenizer_digest", "tokenizer"), ("digest", "tokens")], ids=str
)
def test_rows_of_another_tokenizer_or_corpus_are_refused_before_a_model_is_loaded(
    decant, project, key, word
):
    old = other_digest(Path("data/corpus/tokens/main/tokens.json"), key)
    Path("data/students/aligned/model.safetensors").unlink()
    shutil.rmtree("data/teachers/main/model")
    for command, what in (("evaluate", "students"), ("evaluate-teacher", "teachers")):
        name = "aligned" if what == "students" else "main"
        result = decant(command, name)
        assert result.exit_code == 4, result.output
        assert error_line(result).startswith(
            f"error: data/{what}/{name}: made of {word} {old}, expected {'0' * 16} as the corpus"
        )


def test_agreement_is_over_the_rows_that_are_scored(decant, project):
    """A student that does not say what it is of, and a store of other rows."""
    Path("data/students/aligned/distillation.json").unlink()
    old = other_digest(Path("data/corpus/tokens/main/tokens.json"), "digest")
    result = decant("evaluate", "aligned")
    assert result.exit_code == 4
    assert f": made of tokens {old}, expected {'0' * 16} as the" in error_line(result)
    assert "/data/stores/" in error_line(result)
    # The teacher went on from these rows, and the store is of what it wrote.
    meta = read_json(Path("data/corpus/tokens/main/tokens.json"))
    store = read_json(Path("data/selected/aligned.agreement.json"))["store"]
    plan = read_json(Path("data/stores") / store / "manifests/plan.json")
    transfer = Path("data/corpus/transfer/main")
    write_json(transfer / "tokens.json", meta | {"digest": plan["spec"]["tokens"]})
    assert decant("evaluate", "aligned").exit_code == 4
    write_json(transfer / "transfer.json", {"targets": "teacher", "tokens": meta["digest"]})
    assert decant("evaluate", "aligned").exit_code == 0


def test_a_teacher_is_measured_in_the_same_words(project):
    teacher = read_json(METRICS / "teachers" / "main.json")
    student = read_json(METRICS / "students" / "aligned.json")
    assert set(teacher) == set(student) - {"agreement", "teacher", "trained_from", "compared_with"}


def test_predictions_are_the_rows_that_the_scores_are_of(decant, project):
    path = PREDICTIONS / "students" / "aligned.jsonl"
    written = path.read_bytes()
    rows = read_predictions(path)
    metrics = read_json(METRICS / "students" / "aligned.json")
    assert [row["row"] for row in rows] == list(range(len(rows)))
    nats, targets, size = (sum(row[key] for row in rows) for key in ("nats", "targets", "bytes"))
    assert metrics["test_nats_per_token"] == pytest.approx(nats / targets)
    assert metrics["test_perplexity_per_byte"] == pytest.approx(math.exp(nats / size))
    low, high = metrics["test_intervals"]["perplexity"]
    assert low < metrics["test_score"] == metrics["test_perplexity"] < high
    assert decant("evaluate", "aligned").exit_code == 0
    assert path.read_bytes() == written


def test_models_are_judged_by_the_score_that_is_asked_for(decant, project):
    params = tiny_params()
    params["evaluate"] = {"score": "bits_per_byte", "intervals": {"resamples": 10}}
    write_params(project, params)
    assert decant("evaluate-teacher", "main").exit_code == 0
    metrics = read_json(METRICS / "teachers" / "main.json")
    assert metrics["score"] == "bits_per_byte"
    assert metrics["test_score"] == metrics["test_bits_per_byte"]
    params["evaluate"] = {"score": "accuracy"}
    write_params(project, params)
    result = decant("evaluate-teacher", "main")
    assert result.exit_code == 2
    assert "found 'accuracy', the task causal-lm has perplexity" in error_line(result)


def test_a_student_with_ids_of_its_own_has_no_agreement(decant, project, monkeypatch):
    # A copy: the same rows, but not the teacher's token set itself.
    monkeypatch.setattr(vocabulary, "student_token_set", lambda tokens, *_: replace(tokens))
    assert decant("evaluate", "aligned").exit_code == 0
    metrics = read_json(METRICS / "students" / "aligned.json")
    assert "agreement" not in metrics
    assert metrics["test_perplexity_per_byte"] > 1


def test_a_student_and_its_teacher_compare(decant, project):
    result = decant("compare", "main", "aligned", "--metric", "perplexity_per_byte")
    assert result.exit_code == 0, result.output
    assert "perplexity_per_byte" in result.output


def test_a_score_that_does_not_exist_is_refused(decant, project):
    params = tiny_params()
    params["evaluate"] = {"score": "blue"}
    write_params(project, params)
    result = decant("evaluate", "aligned")
    assert result.exit_code == 2
    assert "evaluate.score: found 'blue', expected a score or a GLUE task" in error_line(result)


@pytest.mark.slow
def test_text_of_a_student_is_compared_with_references_and_teacher(decant, empty):
    """A copy of the teacher stands for a student: it must write just what its teacher wrote."""
    lines = Path("corpus.txt").read_text(encoding="utf-8").splitlines()
    rows = ["text\ttarget", *(f"{line}\t{line.split()[0]} {line.split()[-1]}" for line in lines)]
    Path("corpus.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    params = tiny_params()
    params["corpus"] = {
        "source": {"kind": "table", "files": "corpus.tsv", "target": "target"},
        "task": "prompt-target",
    }
    context = 96
    teacher = params["teachers"]["main"]
    teacher["tokens"] = {"vocab": 300, "max_length": context, "template": "{text}\n{target}"}
    teacher["model"]["scratch"]["max_position_embeddings"] = context + 8
    params["evaluate"] = {
        "score": "chrf",
        "generate": {"rows": 5, "max_new_tokens": 6, "batch_size": 2},
        "intervals": {"resamples": 20},
    }
    write_params(empty, params)
    for arguments in (("prepare",), ("tokenize", "main"), ("teach", "main")):
        assert decant(*arguments).exit_code == 0
    result = decant("evaluate-teacher", "main")
    assert result.exit_code == 0, result.output
    shutil.copytree("data/teachers/main/model", "data/students/aligned")
    shutil.copytree(
        "data/corpus/tokens/main/tokenizer", "data/students/aligned", dirs_exist_ok=True
    )
    write_json(Path("data/selected/aligned.agreement.json"), None)
    result = decant("evaluate", "aligned")
    assert result.exit_code == 0, result.output
    teacher_metrics = read_json(METRICS / "teachers" / "main.json")
    student_metrics = read_json(METRICS / "students" / "aligned.json")
    assert teacher_metrics["score"] == "chrf"
    assert teacher_metrics["generated_rows"] == student_metrics["generated_rows"] == 5
    assert student_metrics["test_score"] == teacher_metrics["test_score"]
    assert set(student_metrics["test_intervals"]) > {"bleu", "cer", "perplexity_per_word"}
    assert student_metrics["signatures"]["bleu"].startswith("nrefs:1|")
    assert student_metrics["against_teacher"]["exact_match"] == 1
    assert "against_teacher" not in teacher_metrics
    rows = read_predictions(PREDICTIONS / "students" / "aligned.jsonl")
    written = [row for row in rows if "text" in row]
    assert len(written) == 5 < len(rows)
    for row in written:
        assert row["references"][0].split()[0] == row["prompt"].split()[0]
    assert decant("compare", "aligned", "main").exit_code == 0


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
    selected = read_json(Path("data/selected/aligned.json"))
    used = {one["signal"]: one["digest"] for one in student["trained_from"]}
    assert used == selected["signals"]
    page = Path("data/reports/index.html").read_text(encoding="utf-8")
    assert all(f"<code>{digest[:12]}</code>" in page for digest in used.values())


def test_a_metrics_file_of_another_shape_is_named(decant, one_student):
    write_json(METRICS / "students" / "aligned.json", {"name": "aligned"})
    result = decant("report")
    assert result.exit_code == 3
    assert "data/metrics/students/aligned.json" in error_line(result)


def test_timing_can_be_left_out(decant, project):
    params = tiny_params()
    params["evaluate"]["timing"] = False
    write_params(project, params)
    assert decant("evaluate", "aligned").exit_code == 0
    metrics = read_json(METRICS / "students" / "aligned.json")
    assert {"tokens_per_second", "timing"} & metrics.keys() == set()
