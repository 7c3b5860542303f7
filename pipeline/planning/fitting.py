"""Checks that a teacher fits the corpus, and a student its teacher, from their sections alone."""

from pathlib import Path
from typing import Any

from pipeline.corpus.text.examples import Example
from pipeline.corpus.text.parameters import CorpusParams
from pipeline.corpus.tokens.tokenize_one import tokenize_one
from pipeline.corpus.tokens.tokenize_prompt import Template
from pipeline.corpus.tokens.tokenizer import local_tokenizer
from pipeline.errors import ConfigError, DecantError, IncompatibleError
from pipeline.planning.miniatures import teacher_values
from pipeline.store.forms.form import Content, Form
from pipeline.store.forms.registry import names_of
from pipeline.store.signals import Signal
from pipeline.student.losses.registry import AttentionLoss, find_loss
from pipeline.student.parameters import StudentParams
from pipeline.tasks import generates, models_language
from pipeline.teacher.parameters.teacher import TeacherParams
from pipeline.teacher.source.quantization import check_quantization, check_stored_quantization


def check_template(name: str, template: str | None, corpus: CorpusParams) -> None:
    """Refuse a template that the task does not use, or that leaves out a column.

    Raises:
        ConfigError: Naming the teacher.
    """
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


def check_teacher(key: str, teacher: TeacherParams, task: str) -> None:
    """Refuse keys of a teacher that contradict each other, the task or what is on this machine.

    Raises:
        ConfigError: Naming the key.
        IncompatibleError: If weights that are packed would have to be trained.
    """
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


def _check_packing(key: str, teacher: TeacherParams) -> None:
    """Check that weights are quantised once, are not trained, and that the package is installed."""
    quantization = teacher.model.quantization
    packing = None if quantization is None else quantization.build()
    is_trained = teacher.fit is not None
    check_quantization(packing, key=key, path=teacher.model.path, is_trained=is_trained)
    check_stored_quantization(
        teacher_values(teacher.model), packing, key=key, is_trained=is_trained
    )


def check_rows(key: str, teacher: TeacherParams, task: Any, rows: list[Example]) -> None:
    """Render and tokenise one row of each split as the tokenize stage does.

    Raises:
        ConfigError: If a template refuses a row, or leaves out what it must show.
    """
    first_rows = list({row.split: row for row in reversed(rows)}.values())
    if not first_rows:
        return
    tokens, model = teacher.tokens, teacher.model
    source = tokens.tokenizer or (None if tokens.vocab else model.path)
    tokenizer = None if source is None else local_tokenizer(source, revision=model.revision)
    if source is not None and tokenizer is None:
        return  # not at hand
    try:
        tokenize_one(
            first_rows,
            task=task,
            tokenizer=tokenizer,
            max_length=tokens.max_length,
            overlong=tokens.overlong,
            **tokens.rendering(),
        )
    except ConfigError as error:
        raise ConfigError(f"{key}.tokens: {error}") from error


def check_output(name: str, student: StudentParams, logits: Form | None, task: str) -> None:
    """Check that the form of the logits serves a student's output term and its vocabulary."""
    from pipeline.student.align.output_checks import check_output_loss, temperature_index

    term = student.loss.output
    if logits is None or term.weight.is_off:
        return
    signal = Signal(logits, None)
    try:
        check_output_loss(signal, term)
        temperature_index(signal, term.temperature)
    except IncompatibleError as error:
        raise IncompatibleError(f"students.{name}.{error}") from error
    is_cut = student.model.vocabulary == "corpus" and models_language(task)
    if is_cut and logits.content is not Content.LOGITS:
        raise IncompatibleError(
            f"students.{name}.model.vocabulary: corpus needs logits over all ids, the capture has "
            f"form {logits.name}; capture logits as {names_of(Content.LOGITS)}, or use vocabulary: "
            "teacher"
        )


def check_architecture(name: str, student: StudentParams, config: dict[str, Any]) -> None:
    """Build the student's configuration if its teacher's is known, and compare head counts."""
    from pipeline.student.model.architecture import student_configuration, teacher_configuration
    from pipeline.student.model.width import check_sizes
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
    heads, expected = (size_of(config, "num_attention_heads") for config in (built, teacher))
    attention = student.loss.attention
    needs_equal = find_loss(AttentionLoss, attention.loss).equal_heads
    if not attention.weight.is_off and needs_equal and heads != expected:
        raise IncompatibleError(
            f"students.{name}.loss.attention: the student has {heads} attention heads, the teacher "
            f"{expected}; give the student {expected}, use loss: relations or head_mean, or set "
            "the term's weight to 0"
        )
