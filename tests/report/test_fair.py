"""What does not compare is not compared: other tokens, models at chance, too little to tell."""

import io
import math

import pytest
from rich.console import Console

from pipeline.report.compare import compare, report_metrics
from pipeline.report.flow import flow
from pipeline.report.page import write_report
from pipeline.report.results import ModelMetrics, StudentResult, TeacherResult
from pipeline.report.table import results_table

BYTES = 1000


def language(name, nats, tokens, vocab=None, **changes):
    """Metrics of a model that spends `nats` on the test rows, in so many tokens."""
    values = {
        "name": name,
        "task": "causal-lm",
        "score": "perplexity",
        "lower_is_better": True,
        "test_perplexity": math.exp(nats / tokens),
        "test_score": math.exp(nats / tokens),
        "test_nats_per_token": nats / tokens,
        "test_perplexity_per_byte": math.exp(nats / BYTES),
        "test_bits_per_byte": nats / BYTES / math.log(2),
        "parameters": 1000,
        "vocab": vocab,
    }
    return ModelMetrics(**values | changes)


def of(teacher, *students):
    teachers = [TeacherResult(name=teacher.name, metrics=teacher)]
    return teachers, [
        StudentResult(name=one.name, teacher=teacher.name, metrics=one) for one in students
    ]


def classified(name, accuracy, chance=0.5, spread=0.0, **changes):
    return ModelMetrics(
        name=name,
        task="classification",
        score="accuracy",
        lower_is_better=False,
        test_accuracy=accuracy,
        test_score=accuracy,
        test_chance=chance,
        test_intervals={"accuracy": (accuracy - spread, accuracy + spread)},
        **changes,
    )


def shown(comparison, width=80):
    console = Console(file=io.StringIO(), width=width)
    console.print(results_table(comparison, width=width))
    return console.file.getvalue()


# A student with another vocabulary writes the same bytes in three times as many tokens.
CUT = of(
    language("big", 900.0, 250, 49_152),
    language("same", 1000.0, 250, 49_152),
    language("cut", 1200.0, 750, 690),
)


@pytest.mark.parametrize("said", [True, False])
def test_models_of_other_tokens_are_compared_by_the_byte(said):
    """Its perplexity a token, 4.95, is far below the teacher's 36.6: it is not the better model."""
    changes = {} if said else {"vocab": None}
    everyone = [one.metrics.model_copy(update=changes) for one in (*CUT[0], *CUT[1])]
    comparison = compare(*of(*everyone))
    assert comparison.quality_name == "test perplexity a byte"
    same, cut = comparison.students
    assert same.retention == pytest.approx(math.exp(-100 / BYTES))
    assert cut.retention == pytest.approx(math.exp(-300 / BYTES))
    assert comparison.best_student("big") == same
    report = report_metrics(comparison)
    assert report["compared_by"] == "perplexity_per_byte"
    assert report["students"]["cut"]["retention"] == cut.retention


def test_a_translators_perplexity_is_by_the_byte_too():
    asked = {"task": "prompt-target", "score": "chrf", "lower_is_better": False}
    models = [
        one.metrics.model_copy(update=asked | {"test_score": 50.0, "test_chrf": 50.0})
        for one in (*CUT[0], *CUT[1])
    ]
    text = shown(compare(*of(*models)), 140)
    assert "3.320" in text.split()
    assert not {"36.60", "4.95"} & set(text.split())


def test_text_that_is_left_out_is_said(tmp_path):
    teachers, students = CUT
    metrics = students[1].metrics.model_copy(update={"test_cut_rows": 3})
    cut = students[1].model_copy(update={"metrics": metrics})
    found = write_report(output=tmp_path, teachers=teachers, students=[cut], versions={})
    assert found["students"]["cut"]["test_cut_rows"] == 3
    assert "cut is scored on less text: 3 test rows" in (tmp_path / "index.html").read_text()


def test_speeds_of_other_tokens_are_compared_by_the_byte():
    """It is as fast by the token, and writes the text in three times as many."""
    teachers, students = CUT
    fast = {"tokens_per_second": 600.0}
    models = [one.metrics.model_copy(update=fast) for one in (*teachers, *students)]
    ratios = [row.speed_ratio for row in compare(*of(*models)).rows]
    assert ratios == pytest.approx([1, 1, 1 / 3])


def test_nats_a_token_become_bits_a_byte():
    said = {"score": "nats_per_token", "test_score": 3.0}
    teachers, students = CUT
    models = [m.metrics.model_copy(update=said) for m in (*teachers, *students)]
    assert compare(*of(*models)).headline.key == "bits_per_byte"


def test_models_of_the_same_tokens_are_compared_by_the_token():
    comparison = compare(CUT[0], CUT[1][:1])
    assert comparison.quality_name == "test perplexity"
    assert comparison.students[0].retention == pytest.approx(math.exp(-100 / 250))
    assert "compared_by" not in report_metrics(comparison)


def test_where_no_bytes_are_known_nothing_compares():
    bare = {"test_perplexity_per_byte": None, "test_bits_per_byte": None}
    teachers, students = CUT
    models = [
        ModelMetrics.model_validate(m.metrics.model_dump(exclude_none=True) | bare)
        for m in (*teachers, *students)
    ]
    comparison = compare(*of(*models))
    assert [row.retention for row in comparison.rows] == [None] * 3
    assert comparison.best_student("big") is None
    assert "★ " not in shown(comparison).splitlines()[3]


@pytest.mark.parametrize("width", [80, 140])
def test_no_measure_a_token_leads_table_page_or_plot(tmp_path, width):
    text = shown(compare(*CUT), width)
    assert "ppl a" in text
    assert not {"36.60", "54.60", "4.95"} & set(text.split())
    write_report(output=tmp_path, teachers=CUT[0], students=CUT[1], versions={})
    page = (tmp_path / "index.html").read_text()
    assert "keeps most: 90.5% of the teacher&#39;s quality (test perplexity a byte 2.718)" in page
    assert "Models have different vocabularies" in page
    assert ">test perplexity a byte</text>" in page
    # Their perplexities a token are in the table of measures, and none of them is the best.
    assert "<td>4.95</td>" in page
    assert '<td class="best">4.95' not in page


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"accuracy": 0.5, "is_constant": True}, "answers one class"),
        ({"accuracy": 0.45}, "at chance"),
        ({"accuracy": 0.5}, "at chance"),
        ({"accuracy": 0.53, "spread": 0.05}, "at chance"),
    ],
)
def test_a_student_at_chance_keeps_nothing_and_is_not_the_best(tmp_path, changes, words):
    teachers, students = of(classified("big", 0.973), classified("blind", **changes))
    comparison = compare(teachers, students)
    (blind,) = comparison.students
    assert (blind.retention, blind.no_retention) == (None, words)
    assert comparison.best_student("big") is None
    report = report_metrics(comparison)["students"]["blind"]
    assert report["no_retention"] == words
    assert "retention" not in report
    text = shown(comparison)
    assert words.split(maxsplit=1)[1 if words.startswith("answers") else 0] in text
    assert "blind ★" not in text
    write_report(output=tmp_path, teachers=teachers, students=students, versions={})
    page = (tmp_path / "index.html").read_text()
    assert f"–<small>{words}</small>" in page
    assert "No student is above chance on the test split." in page
    assert flow(comparison, teachers[0], corpus=None)[-1].facts == ()


def test_of_too_few_rows_nothing_is_kept():
    """Fewer than five have no interval, and two correlate by 1 or -1 whatever is said."""
    values = {"score": "pearson", "lower_is_better": False, "test_chance": 0.0}
    models = [
        ModelMetrics(name=name, task="regression", test_pearson=1.0, test_score=1.0, **values)  # pyright: ignore[reportArgumentType]
        for name in ("big", "small")
    ]
    row = compare(*of(*models)).students[0]
    assert (row.retention, row.no_retention) == (None, "too few rows")
    # A row of language has many tokens.
    one = of(language("big", 6.0, 3, 16, test_chance=16.0), language("s", 6.5, 3, 16))
    assert compare(*one).students[0].retention is not None


def test_nothing_can_be_kept_of_a_teacher_at_chance(tmp_path):
    teachers, students = of(
        classified("big", 0.52, spread=0.05), classified("lucky", 0.7), classified("poor", 0.4)
    )
    comparison = compare(teachers, students)
    big, lucky, poor = comparison.rows
    assert (big.retention, big.no_retention) == (None, "at chance")
    assert (lucky.retention, lucky.no_retention) == (None, "teacher at chance")
    assert (poor.retention, poor.no_retention) == (None, "at chance")
    assert comparison.best_student("big") == lucky
    write_report(output=tmp_path, teachers=teachers, students=students, versions={})
    page = (tmp_path / "index.html").read_text()
    assert "The teacher is not above chance on the test split" in page
    assert "Student lucky is best: test accuracy 70.0%" in page
    assert "70.0%" in shown(comparison)
    assert ("70.0%", "test accuracy") in flow(comparison, teachers[0], corpus=None)[-1].facts


def test_a_language_model_worse_than_equally_likely_ids_is_at_chance():
    teachers, students = of(
        language("big", 900.0, 250, 49_152, test_chance=49_152.0),
        language("cut", 5000.0, 750, 690, test_chance=690.0),
    )
    (cut,) = compare(teachers, students).students
    assert (cut.retention, cut.no_retention) == (None, "at chance")


def test_a_language_model_that_writes_one_text_is_judged_by_its_likelihood():
    teachers, students = of(
        language("big", 900.0, 250), language("small", 950.0, 250, is_constant=True)
    )
    assert compare(teachers, students).students[0].retention == pytest.approx(math.exp(-50 / 250))
