"""Checks of a teacher's taps and a student's losses, on miniatures built from configurations.

They need torch but no weights, so `decant check` runs them before anything long starts.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import DecantError, IncompatibleError
from pipeline.provenance import read_json
from pipeline.store.signals import Signal
from pipeline.student.parameters import StudentParams
from pipeline.teacher.parameters.model import TeacherModel

TRAINED_PAD = 1
"""The padding id of a tokenizer that is trained here."""


def teacher_values(model: TeacherModel) -> dict[str, Any]:
    """Return a teacher's configuration, which needs no weights.

    For a model that also reads images it is the text part. It is empty for a hub id that is not
    cached.
    """
    if model.scratch is not None:
        return model.scratch
    values: dict[str, Any] = {}
    if (path := Path(str(model.path)) / "config.json").is_file():
        values = read_json(path)
    elif not Path(str(model.path)).is_dir():
        from transformers import PreTrainedConfig

        try:
            values = PreTrainedConfig.get_config_dict(
                str(model.path), revision=model.revision, local_files_only=True
            )[0]
        except (OSError, ValueError):
            return {}
    if isinstance(values.get("text_config"), dict) and "model_type" in values["text_config"]:
        return values["text_config"]
    return values


def check_teacher_model(
    key: str,
    model: TeacherModel,
    signals: Sequence[Signal],
    *,
    keeps_blocks: bool,
    task: str,
    max_length: int,
    vocab: int | None,
) -> Any:
    """Check the taps that a capture needs; return the report, or None without a configuration.

    Args:
        key: `teachers.T`.
        model: Its section `model`.
        signals: The signals to capture.
        keeps_blocks: Whether blocks are kept for students to start from.
        task: The task of its head.
        max_length: Longest row, in tokens.
        vocab: Size of the tokenizer that is trained for it; None if it has one.

    Raises:
        ConfigError: If the keys of a new teacher do not make a configuration.
        IncompatibleError: If the teacher cannot give a signal.
    """
    from pipeline.taps.miniature import check_in_miniature
    from pipeline.teacher.capture.outline import known_config
    from pipeline.teacher.capture.tap_check import taps_of
    from pipeline.teacher.source.scratch import scratch_config

    values = teacher_values(model)
    if model.trust_remote_code or "model_type" not in values:
        return None
    if model.scratch is not None:
        config = scratch_config(
            model.scratch,
            task=task,
            classes=("0", "1"),
            vocab=64 if vocab is None else vocab,
            pad_id=0 if vocab is None else TRAINED_PAD,
            key=key,
        )
    else:
        try:
            config = known_config(values)
        except DecantError as error:
            raise type(error)(f"{key}.model: {error}") from error
    return check_in_miniature(
        config, task, taps_of(signals), where=key, max_length=max_length, blocks=keeps_blocks
    )


def check_student_model(
    name: str,
    student: StudentParams,
    teacher: Mapping[str, Any],
    selected: Mapping[str, Any],
    *,
    task: str,
    max_length: int,
    is_causal: bool | None,
) -> None:
    """Check the taps that a student's losses need, and that the teacher's weights can be cut.

    Args:
        name: The student's name.
        student: Its section.
        teacher: The teacher's configuration, from `teacher_values`.
        selected: The record that the select stage would write.
        task: The task of its head.
        max_length: Longest row, in tokens.
        is_causal: Whether the teacher's attention is causal; None if unknown.

    Raises:
        ConfigError: If the student's keys do not make a configuration.
        IncompatibleError: If the student cannot have the losses of its section.
    """
    from pipeline.student.model.architecture import (
        keep_room,
        student_configuration,
        teacher_configuration,
    )
    from pipeline.student.model.width import check_cuttable
    from pipeline.taps.check import TapRequest
    from pipeline.taps.configuration import size_of
    from pipeline.taps.miniature import check_in_miniature
    from pipeline.tasks import models_language
    from pipeline.teacher.capture.outline import known_config

    model, key = student.model, f"students.{name}"
    if model.architecture is not None:
        if "model_type" not in teacher:
            return
        of_teacher = teacher_configuration(teacher)
        try:
            config = student_configuration(
                model.architecture, of_teacher, vocab=size_of(of_teacher, "vocab_size")
            )
            keep_room(config, of_teacher, task, model.architecture)
            if model.init == "teacher-layers":
                check_cuttable(config, of_teacher, task)
        except DecantError as error:
            raise type(error)(f"{key}.model: {error}") from error
    elif (path := Path(str(model.checkpoint)) / "config.json").is_file():
        config = known_config(read_json(path))
    else:
        return
    relations = student.loss.attention.compared_relations
    attended = sorted(map(int, selected["maps"]["attention"]))
    report = check_in_miniature(
        config,
        task,
        TapRequest(
            hidden=sorted(map(int, selected["maps"]["feature"])),
            attention=[] if relations == ("vv",) else attended,
            values=attended if "vv" in relations else [],
            head=models_language(task),
        ),
        where=f"{key}.model",
        max_length=max_length,
        has_one_head_count=bool(attended),
    )
    if report is not None and attended and is_causal not in (None, report.causal):
        kinds = {True: "causal", False: "not causal"}
        raise IncompatibleError(
            f"{key}.loss.attention: the teacher's attention is {kinds[bool(is_causal)]}, the "
            f"student's {kinds[report.causal]}; choose a student of the teacher's kind, or set the "
            "term's weight to 0"
        )
