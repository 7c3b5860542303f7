"""The page stands alone, names everything, and survives a run of which little is known."""

import json
import warnings
from html.parser import HTMLParser

import pytest

from pipeline.errors import ConfigError
from pipeline.report.page import write_report
from pipeline.report.pairs import PairedTest
from pipeline.report.results import (
    Curve,
    ModelMetrics,
    StudentResult,
    TeacherResult,
    Timing,
    TransferSummary,
)
from pipeline.report.samples import generated_samples
from tests.report.examples import VALUES, classifier, corpus, run_of, student, teacher

VERSIONS = {"torch": "2.13.0"}


class Loads(HTMLParser):
    """Collects what a browser would fetch, and checks that tags nest."""

    VOID = frozenset({"meta", "link", "br", "img", "input"})

    def __init__(self, text):
        super().__init__()
        self.urls, self.tags, self.open, self.text = [], set(), [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.urls += [value for name, value in attrs if name in {"src", "href", "data", "srcset"}]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def write(path, **changes):
    values = {
        "teachers": [teacher()],
        "students": [
            student("labels-only", 180.0),
            student("aligned", 50.0, terms=("loss", "feature", "attention", "output")),
        ],
        "corpus": corpus(),
        "versions": VERSIONS,
    }
    metrics = write_report(output=path, **values | changes)
    assert json.loads((path / "metrics.json").read_text()) == metrics
    return metrics, (path / "index.html").read_text()


def test_the_page_names_all_models_numbers_and_fingerprints(tmp_path):
    metrics, page = write(tmp_path)
    text = " ".join(" ".join(Loads(page).text).split())
    for expected in (
        *("labels-only", "aligned", "big", "50.00", "80.0%", "22.2%"),
        *("777 texts", "2 MB of text", "8.12 K tokens", "4 M parameters", "374 kB in the store"),
        *("5 segments", "2 students", "Two students", "0.250", "62.5%", "12.5 ms"),
        *("hidden/3/bfloat16-1a2b3c4d", "374.0", "f00dface", "corpus1", "tokens1", "2.13.0"),
        *("feature", "attention", "output", "labels"),
    ):
        assert expected in text
    assert set(metrics["students"]) == {"labels-only", "aligned"}
    assert metrics["students"]["aligned"]["retention"] == pytest.approx(0.8)


def test_the_page_loads_nothing_and_runs_nothing(tmp_path):
    _, page = write(tmp_path)
    parsed = Loads(page)
    assert all(url == "data:," or url.startswith("#") for url in parsed.urls)
    assert not parsed.tags & {"script", "iframe", "img", "object", "embed", "a"}
    assert "http://" not in page
    assert "https://" not in page
    assert "@import" not in page


def test_an_unchanged_run_gives_the_same_bytes(tmp_path):
    assert write(tmp_path / "a") == write(tmp_path / "b")


def test_names_are_escaped(tmp_path):
    _, page = write(tmp_path, students=[student("<script>alert(1)</script>")])
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_no_student_no_store_no_corpus(tmp_path):
    bare = TeacherResult(name="t", metrics=classifier("t", 0.9, 0.8, 0.7))
    metrics, page = write(tmp_path, teachers=[bare], students=[], corpus=None)
    Loads(page)
    assert metrics["students"] == {}
    assert "No student has been trained from it yet." in page
    assert "Nothing was captured." in page
    assert "No student, no curve." in page


def test_one_classifier_without_a_curve(tmp_path):
    metrics, page = write(
        tmp_path,
        teachers=[TeacherResult(name="t", metrics=classifier("t", 0.9, 0.8, 0.7))],
        students=[StudentResult(name="s", teacher="t", metrics=classifier("s", 0.45, 0.4, 0.1))],
        corpus=None,
        score="f1",
    )
    assert metrics["students"]["s"]["retention"] == pytest.approx(0.5)
    assert "One student trained from that store alone" in page
    assert "No curve was recorded for s." in page
    assert ">accuracy<" in page
    assert "student's test F1 over" in page


def test_several_teachers_have_a_flow_and_a_store_each(tmp_path):
    metrics, page = write(
        tmp_path, teachers=[teacher(), teacher("wide")], students=[student("a", of="wide")]
    )
    Loads(page)
    assert set(metrics["teachers"]) == {"big", "wide"}
    assert page.count('<ol class="flow">') == 2
    assert page.count("store of ") == 2


def test_nothing_is_written_when_the_results_do_not_fit(tmp_path):
    with pytest.raises(ConfigError, match="teachers: found none"):
        write_report(output=tmp_path / "out", teachers=[], students=[])
    assert not (tmp_path / "out").exists()


def test_splits_are_named_where_they_are_known(tmp_path):
    one = teacher().signals[0]
    two = one.model_copy(update={"signal": "logits/topk-aa", "splits": ("train", "test")})
    _, page = write(tmp_path, teachers=[teacher(signals=(two, one))], students=[])
    assert "train, test" in page
    assert page.index("hidden/3/bfloat16-1a2b3c4d") < page.index("logits/topk-aa")
    assert page.count(f"<dd>{one.store}</dd>") == 1
    _, page = write(tmp_path, students=[])
    assert ">splits<" not in page


def rows_of(*texts):
    return [
        {"row": row, "source_row": row, "prompt": f"<i>p{row}</i>", "references": ["r"], "text": t}
        for row, t in enumerate(texts)
    ]


@pytest.mark.parametrize("task", VALUES)
def test_every_task_has_its_measures_intervals_and_direction(tmp_path, task):
    teachers, students = run_of(task)
    corpus_of = corpus().model_copy(update={"task": task})
    _, page = write(tmp_path, teachers=teachers, students=students, corpus=corpus_of)
    parsed = Loads(page)
    text = " ".join(" ".join(parsed.text).split())
    assert "95% intervals" in text
    assert page.count("<small>[") >= 4 * len(VALUES[task][1])
    lower = VALUES[task][0] == "perplexity"
    assert ("lower" if lower else "higher") + " and further left is better" in text
    assert "against the teacher's own" in text or task not in {"prompt-target", "messages"}
    assert ("BLEU, sacrebleu" in text) == (task in {"prompt-target", "messages"})
    assert "Students against each other" not in text
    assert "Read side by side" not in text


def test_pairs_and_samples_are_shown_escaped(tmp_path):
    teachers, students = run_of("prompt-target")
    pair = PairedTest(
        first="aligned",
        second="<s>",
        metric="bleu",
        a=28.0,
        b=25.0,
        difference=3.0,
        low=-0.5,
        high=6.5,
        p_value=0.0004,
        rows=200,
    )
    samples = generated_samples("big", rows_of("x", "<b>y</b>"), {"aligned": rows_of("z")}, count=8)
    metrics, page = write(
        tmp_path,
        teachers=teachers,
        students=students,
        pairs=[pair],
        samples=samples,
        confidence=0.9,
    )
    parsed = Loads(page)
    assert "s" not in parsed.tags
    assert "<i>p0" not in page
    assert "<b>y" not in page
    text = " ".join(" ".join(parsed.text).split())
    for expected in ("+3.0", "[−0.5, 6.5]", "< 0.001", "90% interval", "<i>p1</i>", "<b>y</b>"):
        assert expected in text
    assert metrics["pairs"][0]["p_value"] == 0.0004
    assert page.count('<dl class="sample">') == 2


def test_an_empty_answer_is_said_to_be_nothing(tmp_path):
    teachers, students = run_of("messages")
    samples = generated_samples("big", rows_of("  "), {}, count=8)
    _, page = write(tmp_path, teachers=teachers, students=students, samples=samples)
    assert '<span class="note">nothing</span>' in page


def test_a_best_student_without_a_share_is_still_named(tmp_path):
    teachers = [TeacherResult(name="t", metrics=classifier("t", 0.9, 0.8, 0.0))]
    students = [StudentResult(name="s", teacher="t", metrics=classifier("s", 0.45, 0.4, 0.1))]
    _, page = write(tmp_path, teachers=teachers, students=students, score="matthews")
    assert "Student s is best: test Matthews 0.100." in page


def test_targets_that_the_teacher_wrote_are_a_stage_of_their_own(tmp_path):
    wrote = TransferSummary(targets="teacher", rows=3912, new_tokens=39908)
    _, page = write(tmp_path / "a", teachers=[teacher(transfer=wrote)])
    text = " ".join(" ".join(Loads(page).text).split())
    assert "generate the teacher's own targets 3,912 targets 39.9 K tokens" in text
    kept = teacher(transfer=TransferSummary(targets="corpus"))
    assert write(tmp_path / "b", teachers=[kept]) == write(tmp_path / "c")


def test_students_are_shown_with_the_digests_of_what_they_used(tmp_path):
    used = [{"store": "f00dface", "signal": "hidden/3/<b>", "digest": "9f" * 32}]
    logits = [{"store": "f00dface", "signal": "logits/topk-1", "digest": "ab" * 32}]
    known = student("aligned").metrics.model_dump()
    told = known | {"trained_from": used, "compared_with": logits}
    metrics, page = write(
        tmp_path,
        students=[
            student("aligned", metrics=ModelMetrics.model_validate(told)),
            student("older"),
        ],
    )
    assert metrics["students"]["aligned"]["trained_from"] == used
    assert metrics["students"]["aligned"]["compared_with"] == logits
    assert not {"trained_from", "compared_with"} & metrics["students"]["older"].keys()
    assert not {"trained_from", "compared_with"} & metrics["teacher"].keys()
    section = page.partition("What each student used of it")[2].partition("</section>")[0]
    assert "older" not in section
    for text in ("aligned", "hidden/3/&lt;b&gt;", "9f9f9f9f9f9f", "logits/topk-1", "agreement"):
        assert text in section
    assert "What each student used of it" not in write(tmp_path)[1]


def test_no_byte_of_a_text_controls_anything(tmp_path):
    """Texts, names and terms, wherever the page shows them."""
    evil = "\x1b[31mred\0\x9b1m\u202e"
    rows = [row | {"prompt": evil, "references": [evil]} for row in rows_of(evil, "plain")]
    teachers, students = run_of("prompt-target", students=(f"s{evil}",))
    curve = Curve(step=(1,), terms={f"loss{evil}": (1.0,)})
    section = {"model": {"architecture": {"num_hidden_layers": evil}}}
    students = [one.model_copy(update={"curve": curve, "section": section}) for one in students]
    samples = generated_samples("big", rows, {students[0].name: rows}, count=2)
    with warnings.catch_warnings():
        # matplotlib has no glyph of an escape to measure; the page's font draws its symbol.
        warnings.simplefilter("ignore", UserWarning)
        _, page = write(
            tmp_path,
            teachers=teachers,
            students=students,
            samples=samples,
            corpus=corpus().model_copy(update={"source": {"kind": evil}}),
        )
    assert "␛[31mred␀" in page
    assert not {character for character in page if not character.isprintable()} - {"\n"}
    Loads(page)


def test_a_speed_has_its_range_and_what_it_was_measured_with(tmp_path):
    timing = {
        "batch": 8,
        "length": 64,
        "repeats": 3,
        "device": "cpu",
        "threads": 1,
        "slowest": 2290.0,
        "fastest": 5920.0,
    }
    top = teacher()
    measured = top.metrics.model_copy(update={"timing": Timing.model_validate(timing)})
    _, text = write(tmp_path, teachers=[top.model_copy(update={"metrics": measured})])
    assert "<small>2.29 K to 5.92 K</small>" in text
    assert "Speed: 8 sequences of 64 tokens, median of 3, on cpu with 1 thread." in text
