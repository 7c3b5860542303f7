"""One self-contained page of a run: text, tables and pictures in a single file.

It loads nothing, runs no script, and is the same bytes for the same results.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipeline.provenance import software, write_bytes_atomically, write_json
from pipeline.report import plots, words
from pipeline.report.compare import Comparison, compare, report_metrics
from pipeline.report.figures import mark
from pipeline.report.flow import flow
from pipeline.report.grids import grids, signatures
from pipeline.report.pairs import PairedTest
from pipeline.report.recipes import recipe
from pipeline.report.results import CorpusSummary, StudentResult, TeacherResult, in_order
from pipeline.report.samples import Sample
from pipeline.visible import visible

logger = logging.getLogger(__name__)

SOURCE_WORDS = {
    "python-docs": "Python's own documentation",
    "text": "text files",
    "table": "a table",
    "parallel": "parallel text",
    "hub": "a data set of the hub",
}
TASK_WORDS = {
    "causal-lm": "language modelling",
    "prompt-target": "writing a target after a prompt",
    "messages": "answering in a chat",
    "classification": "classification",
    "multi-label": "classification with any number of labels",
    "regression": "regression",
}


def write_report(
    *,
    output: Path,
    teachers: Sequence[TeacherResult],
    students: Sequence[StudentResult],
    corpus: CorpusSummary | None = None,
    versions: Mapping[str, str] | None = None,
    score: str | None = None,
    pairs: Sequence[PairedTest] = (),
    samples: Sequence[Sample] = (),
    confidence: float = 0.95,
    title: str = "decant report",
) -> dict[str, Any]:
    """Write `index.html` and `metrics.json`.

    Args:
        output: The folder to write to; made where it is missing.
        teachers: At least one.
        students: Any number, in the order they shall appear.
        corpus: What prepare made, for the flow.
        versions: Software to name in the footer; by default what is installed.
        score: Which test metric is the quality; by default what the metrics files say.
        pairs: Paired tests between students on that metric.
        samples: Test rows to read side by side.
        confidence: Level of the intervals in the metrics files and of the pairs.
        title: The page's heading.

    Returns:
        What `metrics.json` holds; see `report_metrics`.

    Raises:
        ConfigError: If there is no teacher, or two models of one name.
        IncompatibleError: If a student's teacher, task or score does not fit.
        ResourceError: If the files cannot be written.
    """
    comparison = compare(teachers, students, score=score)
    teachers = [
        teacher.model_copy(update={"signals": in_order(teacher.signals)}) for teacher in teachers
    ]
    page = render_page(
        comparison,
        teachers=teachers,
        students=students,
        corpus=corpus,
        versions=software() if versions is None else versions,
        pairs=pairs,
        samples=samples,
        confidence=confidence,
        title=title,
    )
    metrics = report_metrics(comparison)
    if pairs:
        metrics["pairs"] = [pair.model_dump(mode="json") for pair in pairs]
    write_bytes_atomically(output / "index.html", page.encode())
    write_json(output / "metrics.json", metrics)
    logger.info("wrote %s and metrics.json", output / "index.html")
    return metrics


def render_page(
    comparison: Comparison,
    *,
    teachers: Sequence[TeacherResult],
    students: Sequence[StudentResult],
    corpus: CorpusSummary | None,
    versions: Mapping[str, str],
    title: str,
    pairs: Sequence[PairedTest] = (),
    samples: Sequence[Sample] = (),
    confidence: float = 0.95,
) -> str:
    """Render the page.

    Args:
        comparison: The models side by side.
        teachers: Their tokens and signals.
        students: Their curves.
        corpus: What prepare made, where known.
        versions: Software to name in the footer.
        title: The page's heading.
        pairs: Paired tests between students.
        samples: Test rows to read side by side.
        confidence: Level of all intervals.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=_shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    order = [row.name for row in comparison.students]
    curves = {student.name: student.curve for student in students if student.curve is not None}
    quality = plots.plot_quality(comparison, order)
    stores = []
    for index, teacher in enumerate(teachers):
        picture = plots.plot_bytes(f"teacher-{index}", teacher.signals)
        if picture is not None:
            stores.append((teacher, Markup(picture)))  # our own SVG, nothing of a user unescaped
    return environment.get_template("template.html.j2").render(
        title=title,
        words=words,
        comparison=comparison,
        summary=summary(comparison, teachers, corpus),
        flows=[(teacher.name, flow(comparison, teacher, corpus=corpus)) for teacher in teachers],
        legend=[(name, *mark(order.index(name))) for name in order if name in curves],
        recipes=[
            (student.name, recipe(student.section)) for student in students if student.section
        ],
        curves=[
            Markup(plots.plot_term(term, curves, order))  # our own SVG, nothing of a user unescaped
            for term in plots.terms_of(curves)
        ],
        without_curve=[name for name in order if name not in curves],
        quality=None
        if quality is None
        else Markup(quality),  # our own SVG, nothing of a user unescaped
        stores=stores,
        teachers=teachers,
        corpus=corpus,
        versions=dict(versions),
        grids=grids(comparison),
        pairs=pairs,
        samples=samples,
        confidence=f"{100 * confidence:g}%",
        signatures=signatures(comparison),
    )


def _shown(value: Any) -> Any:
    """Make control characters in texts of users visible; our own markup has none."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def summary(
    comparison: Comparison, teachers: Sequence[TeacherResult], corpus: CorpusSummary | None
) -> str:
    """Return one paragraph on what the run did and its results."""
    sentences = []
    if corpus is not None and corpus.source.get("kind"):
        task = TASK_WORDS[comparison.task]
        kind = corpus.source["kind"]
        sentences.append(f"The corpus is {SOURCE_WORDS.get(kind, kind)}, the task {task}.")
    for teacher in teachers:
        size = words.count(teacher.metrics.parameters)
        sentence = f"Teacher {teacher.name}" + (
            f" ({size} parameters)" if teacher.metrics.parameters else ""
        )
        if teacher.signals:
            tokens = max(signal.tokens for signal in teacher.signals)
            stored = sum(signal.bytes for signal in teacher.signals)
            many = len(teacher.signals)
            sentence += (
                f" ran once over {words.count(tokens)} tokens and left {words.data(stored)}"
                + f" of features in {many} signal{'s' if many > 1 else ''}"
                + f" ({words.data(teacher.stored_bytes_per_token)} a token of training)."
            )
        else:
            sentence += " left no signals in a store."
        sentences.append(sentence)
        mine = [row for row in comparison.students if row.teacher == teacher.name]
        if not mine:
            sentences.append("No student has been trained from it yet.")
            continue
        trained = "student" if len(mine) == 1 else "students"
        sentences.append(
            f"{words.spelled(len(mine)).capitalize()} {trained} trained from that store alone, "
            "without the teacher."
        )
        best = comparison.best_student(teacher.name)
        blind = [row for row in mine if row.at_chance]
        if comparison.of_teacher(teacher.name)[0].at_chance:
            sentences.append(
                "The teacher is not above chance on the test split, so that there is no quality to "
                "keep a share of: teach it longer, or on more text."
            )
        elif best is None and blind:
            sentences.append("No student is above chance on the test split.")
        if best is not None:
            reached = f"{comparison.quality_name} {comparison.headline.show(best.quality)}"
            sentence = (
                f"Student {best.name} is best: {reached}"
                if best.retention is None
                else f"Student {best.name} keeps most: {words.percent(best.retention)} of the "
                f"teacher's quality ({reached})"
            )
            if best.size_ratio is not None:
                sentence += f" with {words.percent(1 / best.size_ratio)} of its parameters"
            sentences.append(sentence + ".")
    return " ".join(sentences)
