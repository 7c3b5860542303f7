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
    """Return what is known of a teacher's configuration without its weights.

    Of a model that reads images too it is the text part. Empty for a hub id that is not cached.
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
    """Check the taps that a capture needs; return what was found, or None where nothing is known.

    Args:
        key: `teachers.T`.
        model: Its section `model`.
        signals: What is captured.
        keeps_blocks: Whether blocks are kept for students to start from.
        task: What its head is for.
        max_length: Longest row, in tokens.
        vocab: Ids of the tokenizer that is trained for it, if one is.

    Raises:
        ConfigError: If a key of a new teacher is unknown, or no configuration comes of them.
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
        selected: What the select stage would write.
        task: What its head is for.
        max_length: Longest row, in tokens.
        is_causal: Whether the teacher is; None where that is not known.

    Raises:
        ConfigError: If no configuration comes of the student's keys.
        IncompatibleError: If the student cannot learn what it is asked to.
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
    found = check_in_miniature(
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
    if found is not None and attended and is_causal not in (None, found.causal):
        kinds = {True: "causal", False: "not causal"}
        raise IncompatibleError(
            f"{key}.loss.attention: the teacher's attention is {kinds[bool(is_causal)]}, the "
            f"student's {kinds[found.causal]}; choose a student of the teacher's kind, or set the "
            "term's weight to 0"
        )
