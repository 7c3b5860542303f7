"""Builds a student from a configuration or a checkpoint, with random weights or the teacher's.

The teacher's `config.json` and weights come from the store's assets; the teacher is not loaded.
"""

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import (
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from pipeline.corpus.tokens.tokenizer import check_same_tokenizer
from pipeline.errors import ConfigError, IncompatibleError, in_short
from pipeline.student.align.layer_maps import block_choice
from pipeline.student.model.architecture import (
    check_vocabulary,
    keep_room,
    student_configuration,
    teacher_configuration,
)
from pipeline.student.model.blocks import load_blocks
from pipeline.student.model.lora import add_adapters
from pipeline.student.model.origin import StudentModel
from pipeline.student.model.width import check_sizes
from pipeline.student.vocabulary.vocabulary import keep_vocabulary
from pipeline.taps.configuration import auto_class
from pipeline.tasks import Task, models_language, outputs_of
from pipeline.training.own_code import own_code

logger = logging.getLogger(__name__)

PROBLEM_TYPES: dict[str, Any] = {
    "classification": "single_label_classification",
    "multi-label": "multi_label_classification",
    "regression": "regression",
}


def build_student(
    model: StudentModel,
    *,
    teacher_config: Mapping[str, Any],
    vocab: int,
    classes: tuple[str, ...],
    task: Task,
    seed: int,
    blocks: Path | None = None,
    layer_choice: Literal["uniform"] | Sequence[int] = "uniform",
    vocabulary: Int[Tensor, " kept"] | None = None,
    tokenizer: Path | None = None,
) -> PreTrainedModel:
    """Build a student in float32 on the CPU, the same for the same arguments and versions.

    The process's random state is left as it was.

    Args:
        model: How it starts. Weights that a checkpoint lacks are random.
        teacher_config: The teacher's `config.json`.
        vocab: Length of the teacher's tokenizer.
        classes: Names of the classes; empty for a language task or regression.
        task: One of `pipeline.tasks`; decides the student's head.
        seed: Seed of all random weights.
        blocks: The teacher's blocks among the store's assets, for `teacher-layers`.
        layer_choice: The teacher's block for each student block, counted from 1, or `uniform`.
        vocabulary: The teacher's ids that the student keeps, in its order; None for all.
        tokenizer: Directory of the teacher's tokenizer, which a checkpoint's must equal; None
            compares nothing.

    Raises:
        ConfigError: If classes are missing, a key is unknown, or no model can be built.
        IncompatibleError: If vocabulary, tokenizer, special ids, sizes or blocks do not fit the
            teacher.
        IntegrityError: If the file of blocks is missing or broken.
    """
    fewest = {"classification": 2, "multi-label": 1}.get(task, 0)
    if len(classes) < fewest:
        raise ConfigError(f"{task} needs at least {fewest} classes, the corpus has {len(classes)}")
    teacher = teacher_configuration(teacher_config)
    fresh: Collection[str] = ()
    if model.architecture is None:
        student, fresh = _from_checkpoint(
            str(model.checkpoint), model.revision, teacher, vocab, tokenizer, classes, task, seed
        )
    else:
        config = student_configuration(
            model.architecture, teacher, vocab=vocab, layer_choice=layer_choice
        )
        keep_room(config, teacher, task, model.architecture)
        student = _from_architecture(
            config, teacher, model.init, blocks, layer_choice, classes, task, seed
        )
    if vocabulary is not None:
        # After the weights: the kept rows are the checkpoint's or the teacher's own.
        keep_vocabulary(student, vocabulary)
    if model.lora is not None:
        with _seeded(seed):
            add_adapters(student, model.lora, fresh=fresh)
    return student


def _from_architecture(
    config: PreTrainedConfig,
    teacher: PreTrainedConfig,
    init: str,
    blocks: Path | None,
    layer_choice: Literal["uniform"] | Sequence[int],
    classes: tuple[str, ...],
    task: Task,
    seed: int,
) -> PreTrainedModel:
    """Draw a student's weights; with `init: teacher-layers` replace them by the teacher's."""
    _set_task(config, classes, task)
    if init == "teacher-layers":
        if blocks is None:
            raise IncompatibleError(
                "init teacher-layers: the store holds no blocks of the teacher; "
                "name the blocks that capture keeps and run it again, or use init: random"
            )
        check_sizes(config, teacher)
    try:
        with _seeded(seed):
            model = auto_class(task).from_config(config, dtype=torch.float32)
    except (ValueError, RuntimeError, AssertionError) as error:
        reason = in_short(error)
        raise ConfigError(
            f"model.architecture: no {task} model of type {config.model_type} comes of it "
            f"({reason}); change the key it names, or the model_type"
        ) from error
    if init == "teacher-layers" and blocks is not None:
        choice = block_choice(
            layer_choice,
            student_layers=config.num_hidden_layers,
            teacher_layers=teacher.num_hidden_layers,
        )
        load_blocks(model, blocks, choice, teacher)
        logger.info("student starts from teacher blocks %s", ", ".join(map(str, choice)))
    return model


def _from_checkpoint(
    checkpoint: str,
    revision: str | None,
    teacher: PreTrainedConfig,
    vocab: int,
    tokenizer: Path | None,
    classes: tuple[str, ...],
    task: Task,
    seed: int,
) -> tuple[PreTrainedModel, Collection[str]]:
    """Load a checkpoint; return the student and the names of weights that the checkpoint lacks.

    Its special ids become those of the teacher, whose tokenizer the student uses.
    """
    if code := own_code(checkpoint, revision):
        raise ConfigError(
            f"model.checkpoint {checkpoint}: brings code of its own ({code[0]}), and students "
            "run transformers' own models alone; take auto_map out of a copy of its config.json, "
            "or choose another checkpoint"
        )
    try:
        config = AutoConfig.from_pretrained(checkpoint, revision=revision, trust_remote_code=False)
        for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
            setattr(config, key, getattr(teacher, key, None))
        check_vocabulary(config, teacher, vocab, f"model.checkpoint {checkpoint}")
        if tokenizer is not None:
            check_same_tokenizer(
                checkpoint,
                revision,
                tokenizer,
                key="model.checkpoint",
                remedy="start from a checkpoint with the teacher's tokenizer, or from "
                "model.architecture",
            )
        _set_task(config, classes, task)
        with _seeded(seed):
            # Safetensors only: a pickle would be executed.
            model, report = auto_class(task).from_pretrained(
                checkpoint,
                config=config,
                revision=revision,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        return model, report["missing_keys"]
    except (OSError, ValueError, RuntimeError) as error:
        reason = in_short(error)
        raise ConfigError(
            f"model.checkpoint {checkpoint}: no {task} model comes of it ({reason}); "
            "expected a Hugging Face directory or hub id with safetensors weights"
        ) from error


def _set_task(config: PreTrainedConfig, classes: tuple[str, ...], task: Task) -> None:
    """Set the corpus's classes in the configuration of a student that is no language model."""
    if models_language(task):
        return
    config.problem_type = PROBLEM_TYPES[task]
    if task == "regression":
        config.num_labels = outputs_of(task, classes)
    else:
        config.id2label = dict(enumerate(classes))
        config.label2id = {name: index for index, name in enumerate(classes)}


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draw weights from `seed`, and leave the CPU's and every GPU's generator as they were.

    `torch.manual_seed` would also seed the GPUs, which `fork_rng(devices=[])` does not restore.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
