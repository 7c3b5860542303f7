"""check: does all of `params.yaml` fit, before anything long starts?

The other stages validate their own sections and nothing else; without this one a misspelt key of a
student would be found when the teacher is trained and captured. Its output never changes, so a
changed parameter runs this stage and, beyond it, only what the parameter is for.
"""

import re
from pathlib import Path
from typing import Any, Self

import click
from pydantic import model_validator

from pipeline.corpus.added import check_added
from pipeline.corpus.checks import check_task
from pipeline.corpus.preview import preview
from pipeline.corpus.tokenize_prompt import Template
from pipeline.errors import ConfigError, DecantError, IncompatibleError
from pipeline.evaluate.scores import headline
from pipeline.provenance import write_json
from pipeline.store.forms.form import Geometry
from pipeline.store.records import Declaration
from pipeline.store.signals import Signal
from pipeline.student.needs import depth_of
from pipeline.student.objective import check_task as check_losses
from pipeline.tasks import generates, models_language
from pipeline.teacher.quantization import check_packed, check_quantization
from pipeline.teacher.request import resolve_layers, resolve_signals
from pipeline.training.options import TrainOptions, check_options
from stages.command import params_option, stage
from stages.miniatures import check_student_model, check_teacher_model, teacher_values
from stages.parameters import Section, section
from stages.project import DATA, runtime
from stages.rehearsal import rehearse
from stages.sections.capture import CaptureParams, plain_layers
from stages.sections.corpus import CorpusParams
from stages.sections.evaluate import EvaluateParams
from stages.sections.student import StudentParams
from stages.sections.teacher import TeacherModel
from stages.sections.tokens import TokenParams

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


class TeacherParams(Section):
    """Section `teachers.T`. `fit: null` leaves a pretrained teacher's weights as they are."""

    tokens: TokenParams
    model: TeacherModel
    fit: TrainOptions | None = None
    capture: CaptureParams

    # After, not before: what a function has seen is no JSON any more, whose lists may be tuples.
    @model_validator(mode="after")
    def _says_how_it_learns(self) -> Self:
        if "fit" not in self.model_fields_set:
            raise ValueError(
                "fit is missing; say how to train the teacher, or `fit: null` to leave its weights "
                "as they are"
            )
        return self


class ProjectParams(Section):
    """All of `params.yaml`. `evaluate: {}` must stand there, because DVC tracks it."""

    corpus: CorpusParams
    teachers: dict[str, TeacherParams]
    students: dict[str, StudentParams]
    evaluate: EvaluateParams


@click.command()
@params_option
@stage
def check(params: Path) -> None:
    """Check all of params.yaml against what the stages expect, and the parts against each other.

    \b
    Example:
      decant check
    """
    project: ProjectParams = section(params, "", ProjectParams)
    device = runtime().device
    try:
        _check_project(project)
        _check_options(project, device)
    except (ConfigError, IncompatibleError) as error:
        raise type(error)(f"{params}: {error}") from error
    write_json(DATA / "checked.json", {"fits": True})


def _check_project(project: ProjectParams) -> None:
    check_task(project.corpus.source, project.corpus.task, project.corpus.classes)
    check_added(project.corpus.added, project.corpus.task)
    for source in (project.corpus.source, *project.corpus.added):
        preview(source, project.corpus.task, root=Path(), classes=project.corpus.classes)
    headline(project.corpus.task, project.evaluate.score)
    _check_names("teachers", project.teachers)
    _check_names("students", project.students)
    for name, student in project.students.items():
        if student.teacher not in project.teachers:
            raise ConfigError(
                f"students.{name}.teacher: found {student.teacher!r}, expected one of "
                f"{', '.join(project.teachers)}; correct it"
            )
    for name, teacher in project.teachers.items():
        students = {s: p for s, p in project.students.items() if p.teacher == name}
        _check_template(name, teacher.tokens.template, project.corpus)
        _check_teacher(name, teacher, project.corpus.task, students)


def _check_options(project: ProjectParams, device: str) -> None:
    """Refuse an optimisation that this machine lacks something for.

    Which device `auto` takes is not asked: who checks need not be where training will run.
    """
    asked = {f"teachers.{name}.fit": one.fit for name, one in project.teachers.items()}
    asked |= {f"students.{name}.train": one.train for name, one in project.students.items()}
    for key, options in asked.items():
        if options is not None:
            check_options(options, None if device == "auto" else device, key=key)


def _check_names(group: str, names: dict[str, Any]) -> None:
    if not names:
        raise ConfigError(f"{group}: found none, expected at least one; add one")
    for name in names:
        if not NAME.fullmatch(name):
            raise ConfigError(
                f"{group}.{name}: the name becomes a file's and a DVC stage's; "
                "use letters, digits, - and _"
            )


def _check_template(name: str, template: str | None, corpus: CorpusParams) -> None:
    key = f"teachers.{name}"
    if template is None:
        return
    if corpus.task != "prompt-target":
        raise ConfigError(
            f"{key}.tokens.template: given for task {corpus.task}, which has none; remove it, or "
            "use task prompt-target"
        )
    try:
        Template.parse(template, has_pairs=getattr(corpus.source, "pair", None) is not None)
    except ConfigError as error:
        raise ConfigError(f"{key}.{error}") from error


def _check_teacher(
    name: str, teacher: TeacherParams, task: str, students: dict[str, StudentParams]
) -> None:
    key = f"teachers.{name}"
    if teacher.model.scratch is not None and teacher.fit is None:
        raise ConfigError(f"{key}.fit: found null; a teacher from scratch must be trained, add it")
    _check_packing(key, teacher)
    path, revision = teacher.model.path, teacher.model.revision
    if path is not None and revision is None and not Path(path).is_dir():
        raise ConfigError(
            f"{key}.model.path: found {path}, which is no directory here, and no revision; correct "
            "the path, or pin model.revision if it is a hub id, whose weights may change"
        )
    if teacher.tokens.vocab is None and teacher.tokens.tokenizer is None and not teacher.model.path:
        raise ConfigError(
            f"{key}.tokens: no tokenizer; give vocab to train one, or tokenizer with a directory "
            "or hub id"
        )
    if teacher.tokens.max_length > teacher.capture.segment_tokens:
        raise ConfigError(
            f"{key}.capture.segment_tokens: found {teacher.capture.segment_tokens}, expected at "
            f"least tokens.max_length, {teacher.tokens.max_length}; raise it"
        )
    if teacher.tokens.targets == "teacher" and not generates(task):
        raise ConfigError(
            f"{key}.tokens.targets: found teacher, but task {task} has no prompts that a teacher "
            "could go on from; use targets: corpus, or task prompt-target or messages"
        )
    config = teacher_values(teacher.model)
    depth = depth_of(config)
    if depth is not None:
        # Before the students, whose check needs torch.
        _signals(f"{key}.capture", teacher.capture, depth, task)
    for student, options in students.items():
        check_losses(options.loss, task, key=f"students.{student}.loss")
        _check_output(student, options, teacher.capture, task)
    if depth is not None:
        _rehearse(key, teacher, config, depth, task, students)


def _check_packing(key: str, teacher: TeacherParams) -> None:
    """See that weights are packed once and not trained, by a package that is there."""
    quantization = teacher.model.quantization
    packing = None if quantization is None else quantization.build()
    is_trained = teacher.fit is not None
    check_quantization(packing, key=key, path=teacher.model.path, is_trained=is_trained)
    check_packed(teacher_values(teacher.model), packing, key=key, is_trained=is_trained)


def _check_output(name: str, student: StudentParams, capture: CaptureParams, task: str) -> None:
    """See that the logits' form serves the output term, and a student that has fewer ids."""
    from pipeline.student.outputs import check_output_loss, temperature_index

    logits, term = capture.logits_form(), student.loss.output
    if logits is None or term.weight.is_off:
        return
    declared = Declaration.of(Signal("logits", None, logits), Geometry(), (), {}, None)
    try:
        check_output_loss(declared, term)
        temperature_index(declared, term.temperature)
    except IncompatibleError as error:
        raise IncompatibleError(f"students.{name}.{error}") from error
    is_cut = student.model.vocabulary == "corpus" and models_language(task)
    if is_cut and logits.name != "head":
        raise IncompatibleError(
            f"students.{name}.model.vocabulary: corpus needs logits over all ids, the capture has "
            f"form {logits.name}; capture logits as head, or use vocabulary: teacher"
        )


def _signals(key: str, capture: CaptureParams, depth: int, task: str) -> list[Signal]:
    return resolve_signals(
        capture.requests(), capture.logits_form(), depth=depth, task=task, key=key
    )


def _rehearse(
    key: str,
    teacher: TeacherParams,
    config: dict[str, Any],
    depth: int,
    task: str,
    students: dict[str, StudentParams],
) -> None:
    """Let every student select what it needs from what capture will write, and be built."""
    capture, max_length = teacher.capture, teacher.tokens.max_length
    signals = _signals(f"{key}.capture", capture, depth, task)
    blocks = (
        []
        if capture.blocks is None
        else resolve_layers(
            plain_layers(capture.blocks), first=1, depth=depth, key=f"{key}.capture.blocks"
        )
    )
    found = check_teacher_model(
        key,
        teacher.model,
        signals,
        keeps_blocks=bool(blocks),
        task=task,
        max_length=max_length,
        vocab=teacher.tokens.vocab,
    )
    for name, student in students.items():
        _check_architecture(name, student, config)
        selected = rehearse(name, student, signals, blocks, depth=depth, config=config)
        check_student_model(
            name,
            student,
            config,
            selected,
            task=task,
            max_length=max_length,
            is_causal=None if found is None else found.causal,
        )


def _check_architecture(name: str, student: StudentParams, config: dict[str, Any]) -> None:
    """Build the student's configuration, where its teacher's is known, and compare head counts."""
    from pipeline.student.architecture import student_configuration, teacher_configuration
    from pipeline.student.sizes import check_sizes
    from pipeline.taps.configuration import size_of

    architecture = student.model.architecture
    if architecture is None or "model_type" not in config:
        return
    teacher = teacher_configuration(config)
    try:
        built = student_configuration(architecture, teacher, vocab=size_of(teacher, "vocab_size"))
        if student.model.init == "teacher-layers":
            check_sizes(built, teacher)
    except DecantError as error:
        raise type(error)(f"students.{name}.model: {error}") from error
    found, expected = (size_of(one, "num_attention_heads") for one in (built, teacher))
    attention = student.loss.attention
    if not attention.weight.is_off and attention.loss == "kl" and found != expected:
        raise IncompatibleError(
            f"students.{name}.loss.attention: the student has {found} attention heads, the teacher "
            f"{expected}; give the student {expected}, use loss: relations or head_mean, or set "
            "the term's weight to 0"
        )


if __name__ == "__main__":
    check()
