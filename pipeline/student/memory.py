"""What a student takes in memory while it trains, told from its configuration alone.

Weights, gradients and moments follow from the student built on the meta device. Activations are an
estimate: the count of Korthikanti et al. (arXiv 2205.05198) for a transformer's block, in the
precision of the run.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from pipeline.errors import ConfigError
from pipeline.student.architecture import student_configuration, teacher_configuration
from pipeline.student.lora import add_adapters
from pipeline.student.objective import Objective
from pipeline.student.origin import StudentModel
from pipeline.tasks import models_language
from pipeline.training.options import TrainOptions

FLOAT_BYTES = 4
"""Weights, gradients and moments are float32 in either precision."""
BLOCK_UNITS = 17
"""Values that a block keeps for its backward pass, in units of tokens times width: 34 bytes in half
precision."""
LOGITS_COPIES = 3
"""Of tokens times vocabulary: the logits, their log-softmax and its gradient."""
POOLS = 2.5
"""Pools of segments in memory: the one in use, the one before, half of the next."""


@dataclass(frozen=True)
class StudentMemory:
    """Bytes that a student takes; `activation_bytes` is an estimate, the rest follows exactly."""

    parameters: int
    trained: int
    weight_bytes: int
    gradient_bytes: int
    moment_bytes: int
    projector_bytes: int
    activation_bytes: int
    pool_bytes: int

    @property
    def device_bytes(self) -> int:
        """What the training device holds."""
        return (
            self.weight_bytes
            + self.gradient_bytes
            + self.moment_bytes
            + self.projector_bytes
            + self.activation_bytes
        )


def student_memory(
    *,
    model: StudentModel,
    objective: Objective,
    options: TrainOptions,
    teacher_config: Mapping[str, Any],
    task: str,
    max_length: int,
    feature_pairs: int,
    attention_pairs: int,
    segment_bytes: int,
    pool_segments: int,
) -> StudentMemory:
    """Return what a student takes.

    Args:
        model: How it starts.
        objective: Its terms.
        options: How it is optimised.
        teacher_config: The teacher's configuration.
        task: What its head is for.
        max_length: Longest row in tokens.
        feature_pairs: Pairs of layers of the feature term.
        attention_pairs: Pairs of layers of the attention term.
        segment_bytes: What the student's signals take of one segment before compression.
        pool_segments: Segments of a pool.

    Raises:
        ConfigError: If the architecture makes no model.
    """
    student = _on_meta(model, teacher_config, task)
    config = student.config.get_text_config()
    parameters = sum(one.numel() for one in student.parameters())
    trained = sum(one.numel() for one in student.parameters() if one.requires_grad)
    teacher = teacher_configuration(teacher_config).get_text_config()
    bridge = config.hidden_size * teacher.hidden_size + teacher.hidden_size
    projectors = 0 if objective.feature.weight.is_off else feature_pairs * bridge
    # Weight, gradient and two moments of a projector: all of it trains.
    return StudentMemory(
        parameters=parameters,
        trained=trained,
        weight_bytes=FLOAT_BYTES * parameters,
        gradient_bytes=FLOAT_BYTES * trained,
        moment_bytes=2 * FLOAT_BYTES * trained,
        projector_bytes=4 * FLOAT_BYTES * projectors,
        activation_bytes=_activations(
            config, objective, options, task, max_length, attention_pairs
        ),
        pool_bytes=round(POOLS * pool_segments * segment_bytes),
    )


def _activations(
    config: Any,
    objective: Objective,
    options: TrainOptions,
    task: str,
    max_length: int,
    attention_pairs: int,
) -> int:
    item = 2 if options.precision == "bfloat16" else FLOAT_BYTES
    tokens = options.batch_size * max_length
    depth = 1 if options.gradient_checkpointing else config.num_hidden_layers
    kept = config.num_hidden_layers * config.hidden_size if options.gradient_checkpointing else 0
    blocks = tokens * (BLOCK_UNITS * depth * config.hidden_size + kept) * item
    maps = 0
    if not objective.attention.weight.is_off:
        # Scores and log-probabilities of the student and of the teacher, in float32.
        maps = 4 * FLOAT_BYTES * attention_pairs * config.num_attention_heads * tokens * max_length
    outputs = config.vocab_size if models_language(task) else 0
    return blocks + maps + LOGITS_COPIES * FLOAT_BYTES * tokens * outputs


def _on_meta(model: StudentModel, teacher_config: Mapping[str, Any], task: str) -> PreTrainedModel:
    """Return the student on the meta device, its adapters with it."""
    if model.architecture is not None:
        teacher = teacher_configuration(teacher_config)
        config = student_configuration(model.architecture, teacher, vocab=teacher.vocab_size)
    else:
        try:
            config = AutoConfig.from_pretrained(str(model.checkpoint), revision=model.revision)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"model.checkpoint {model.checkpoint}: no configuration to be had "
                f"({str(error).splitlines()[0]}); expected a directory with config.json, or a hub "
                "id in the local cache"
            ) from error
    factory = AutoModelForCausalLM if models_language(task) else AutoModelForSequenceClassification
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            student: PreTrainedModel = factory.from_config(config, dtype=torch.float32)
            if model.lora is not None:
                add_adapters(student, model.lora, fresh=())
    except (ValueError, RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"model: no {task} model of type {config.model_type} comes of it "
            f"({' '.join(str(error).split())[:200]}); change the key it names"
        ) from error
    return student
