"""check: does everything in `params.yaml` fit, before anything long starts?

Every other stage validates only its own sections. Without this one, a misspelt key of a student
would be found only after the teacher was trained and captured. All errors are reported together.
The models are checked, which takes torch, only if nothing else is wrong. The output never changes,
so a changed parameter re-runs this stage and then only the stages that use the parameter.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from pipeline.corpus.text.added import check_added
from pipeline.corpus.text.checks import check_task
from pipeline.corpus.text.examples import Example
from pipeline.corpus.text.parameters import CorpusParams
from pipeline.corpus.text.preview import preview
from pipeline.errors import ConfigError, DecantError, IncompatibleError, ManyFoundError
from pipeline.evaluate.options import EvaluateParams
from pipeline.planning.fitting import (
    check_architecture,
    check_output,
    check_rows,
    check_teacher,
    check_template,
)
from pipeline.planning.miniatures import check_student_model, check_teacher_model, teacher_values
from pipeline.planning.rehearsal import rehearse
from pipeline.provenance import write_json
from pipeline.scores.registry import headline
from pipeline.section import Section
from pipeline.store.signals import Signal
from pipeline.student.align.needs import depth_of
from pipeline.student.align.objective import check_task as check_losses
from pipeline.student.parameters import StudentParams
from pipeline.teacher.capture.request import resolve_layers, resolve_signals
from pipeline.teacher.parameters.capture import CaptureParams, plain_layers
from pipeline.teacher.parameters.teacher import TeacherParams
from pipeline.training.options import TrainOptions, check_options
from stages.command import params_option, stage
from stages.parameters import section, validate
from stages.project import DATA, runtime

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


class Project(Section):
    """The sections of `params.yaml`. `evaluate` is required, if only as `{}`: DVC tracks it."""

    corpus: Any
    teachers: dict[str, Any]
    students: dict[str, Any]
    evaluate: Any


class Findings:
    """The errors of a file of parameters, in the order in which they were found."""

    def __init__(self, params: Path) -> None:
        self.params = params
        self.errors: list[DecantError] = []

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Record an error of the body and continue."""
        try:
            yield
        except (ConfigError, IncompatibleError) as error:
            prefix, message = f"{self.params}: ", str(error)
            is_prefixed = message.startswith(prefix)
            self.errors.append(error if is_prefixed else type(error)(prefix + message))

    def part(self, value: Any, kind: Any, key: str) -> Any:
        """Return a validated section; None if it is not valid."""
        with self.collected():
            return validate(value, kind, file=self.params, key=key)
        return None

    def report(self) -> None:
        """Raise the errors that were recorded.

        Raises:
            DecantError: The only error, or all of them.
        """
        if self.errors:
            raise self.errors[0] if len(self.errors) == 1 else ManyFoundError(self.errors)


@click.command()
@params_option
@stage
def check(params: Path) -> None:
    """Check params.yaml before anything long starts.

    Every section is checked against what its stage expects, and the sections against each other.
    All errors are shown at once. Silent when everything fits.

    \b
    Example:
      decant check
    """
    project: Project = section(params, "", Project)
    findings = Findings(params)
    corpus = findings.part(project.corpus, CorpusParams, "corpus")
    evaluate = findings.part(project.evaluate, EvaluateParams, "evaluate")
    teachers = {
        name: teacher
        for name, value in project.teachers.items()
        if (teacher := findings.part(value, TeacherParams, f"teachers.{name}")) is not None
    }
    students = {
        name: student
        for name, value in project.students.items()
        if (student := findings.part(value, StudentParams, f"students.{name}")) is not None
    }
    for group, names in (("teachers", project.teachers), ("students", project.students)):
        _check_names(findings, group, names)
    _check_options(findings, teachers, students, runtime().device)
    for name, student in students.items():
        with findings.collected():
            _check_has_teacher(name, student, project.teachers)
    if corpus is not None:
        rows = _check_corpus(findings, corpus)
        if evaluate is not None:
            with findings.collected():
                headline(corpus.task, evaluate.score)
        for name, teacher in teachers.items():
            _check_teacher(findings, name, teacher, corpus, rows)
        for name, student in students.items():
            with findings.collected():
                check_losses(student.loss, corpus.task, key=f"students.{name}.loss")
    # The checks below need torch, and parameters without errors.
    findings.report()
    assert corpus is not None  # otherwise report() has raised
    for name, teacher in teachers.items():
        own = {key: student for key, student in students.items() if student.teacher == name}
        _check_models(findings, name, teacher, own, corpus.task)
    findings.report()
    write_json(DATA / "checked.json", {"fits": True})


def _check_names(findings: Findings, group: str, names: Mapping[str, Any]) -> None:
    with findings.collected():
        if not names:
            raise ConfigError(f"{group}: found none, expected at least one; add one")
    for name in names:
        with findings.collected():
            if not NAME.fullmatch(name):
                raise ConfigError(
                    f"{group}.{name}: the name becomes a file's and a DVC stage's; "
                    "use letters, digits, - and _"
                )


def _check_options(
    findings: Findings,
    teachers: Mapping[str, TeacherParams],
    students: Mapping[str, StudentParams],
    device: str,
) -> None:
    """Refuse training options that this machine cannot run.

    `auto` is not resolved to a device: the machine that checks may not be the one that trains.
    """
    options_by_key: dict[str, TrainOptions | None] = {
        f"teachers.{name}.fit": teacher.fit for name, teacher in teachers.items()
    }
    options_by_key |= {
        f"students.{name}.train": student.train for name, student in students.items()
    }
    for key, options in options_by_key.items():
        if options is not None:
            with findings.collected():
                check_options(options, None if device == "auto" else device, key=key)


def _check_has_teacher(name: str, student: StudentParams, teachers: Mapping[str, Any]) -> None:
    if student.teacher not in teachers:
        raise ConfigError(
            f"students.{name}.teacher: found {student.teacher!r}, expected one of "
            f"{', '.join(teachers)}; correct it"
        )


def _check_corpus(findings: Findings, corpus: CorpusParams) -> list[Example]:
    """Return the first rows of the corpus; none if they are not at hand."""
    before = len(findings.errors)
    with findings.collected():
        check_task(corpus.source, corpus.task, corpus.classes)
        check_added(corpus.added, corpus.task)
    if len(findings.errors) > before:
        return []
    rows: list[Example] = []
    for source in (corpus.source, *corpus.added):
        with findings.collected():
            rows += preview(source, corpus.task, root=Path(), classes=corpus.classes)
    return rows


def _check_teacher(
    findings: Findings, name: str, teacher: TeacherParams, corpus: CorpusParams, rows: list[Example]
) -> None:
    """Check a teacher by its parameters and the first rows of the corpus."""
    key = f"teachers.{name}"
    before = len(findings.errors)
    with findings.collected():
        check_template(name, teacher.tokens.template, corpus)
    with findings.collected():
        check_teacher(key, teacher, corpus.task)
    if len(findings.errors) == before:
        with findings.collected():
            check_rows(key, teacher, corpus.task, rows)
    depth = depth_of(teacher_values(teacher.model))
    if depth is not None:
        with findings.collected():
            _signals(key, teacher.capture, depth, corpus.task)
            _blocks(key, teacher.capture, depth)


def _signals(key: str, capture: CaptureParams, depth: int, task: str) -> list[Signal]:
    requests, logits = capture.requests(), capture.logits_form()
    return resolve_signals(requests, logits, depth=depth, task=task, key=f"{key}.capture")


def _blocks(key: str, capture: CaptureParams, depth: int) -> list[int]:
    if capture.blocks is None:
        return []
    return resolve_layers(
        plain_layers(capture.blocks), first=1, depth=depth, key=f"{key}.capture.blocks"
    )


def _check_models(
    findings: Findings,
    name: str,
    teacher: TeacherParams,
    students: Mapping[str, StudentParams],
    task: str,
) -> None:
    """Check the teacher's taps, then that each student finds its signals and can be built."""
    key, capture, max_length = f"teachers.{name}", teacher.capture, teacher.tokens.max_length
    for student, options in students.items():
        with findings.collected():
            check_output(student, options, capture.logits_form(), task)
    config = teacher_values(teacher.model)
    depth = depth_of(config)
    if depth is None:
        return
    signals, blocks = _signals(key, capture, depth, task), _blocks(key, capture, depth)
    report, before = None, len(findings.errors)
    with findings.collected():
        report = check_teacher_model(
            key,
            teacher.model,
            signals,
            keeps_blocks=bool(blocks),
            task=task,
            max_length=max_length,
            vocab=teacher.tokens.vocab,
        )
    if len(findings.errors) > before:
        return  # its students would only repeat the error
    for student, options in students.items():
        with findings.collected():
            check_architecture(student, options, config)
            selected = rehearse(student, options, signals, blocks, depth=depth, config=config)
            check_student_model(
                student,
                options,
                config,
                selected,
                task=task,
                max_length=max_length,
                is_causal=None if report is None else report.causal,
            )


if __name__ == "__main__":
    check()
