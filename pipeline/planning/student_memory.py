"""Estimates of the memory that a student takes in training, from its configuration.

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
from pipeline.student.align.chunked import DEVICE_SIZES, DEVICE_VALUES
from pipeline.student.align.objective import Objective
from pipeline.student.data.feed import most_waiting
from pipeline.student.model.architecture import student_configuration, teacher_configuration
from pipeline.student.model.lora import add_adapters
from pipeline.student.model.origin import StudentModel
from pipeline.taps.configuration import size_of
from pipeline.tasks import models_language
from pipeline.training.options import HALF, TrainOptions

FLOAT_BYTES = 4
"""Weights and gradients are float32 in any precision; so are moments, except with `adamw_8bit`."""
LEAST_8BIT_VALUES = 4096
"""bitsandbytes keeps moments of smaller tensors, and of embeddings, in float32."""
BLOCK_UNITS = 17
"""Values that a block keeps for its backward pass, in units of tokens times width: 34 bytes in half
precision."""
LOSS_COPIES = 8
"""Copies of a block of logits, or of a chunk of maps or states, that a loss and its gradient hold
for teacher and student."""
POOLS = 2
"""Pools of segments in memory: one is used while the next is read."""


@dataclass(frozen=True)
class StudentMemory:
    """The bytes that a student takes.

    Those of activations, and of the teacher's head and features, are estimates.
    """

    parameters: int
    trained: int
    weight_bytes: int
    gradient_bytes: int
    moment_bytes: int
    projector_bytes: int
    teacher_bytes: int
    activation_bytes: int
    pool_bytes: int

    @property
    def device_bytes(self) -> int:
        """Bytes on the training device."""
        return (
            self.weight_bytes
            + self.gradient_bytes
            + self.moment_bytes
            + self.projector_bytes
            + self.teacher_bytes
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
    head_bytes: int,
    token_bytes: float,
    segment_bytes: int,
    pool_segments: int,
    store_bytes: int,
    vocabulary: int | None = None,
) -> StudentMemory:
    """Return the bytes that a student takes.

    Args:
        model: How it starts.
        objective: Its terms.
        options: How it is optimised.
        teacher_config: The teacher's configuration.
        task: What its head is for.
        max_length: Longest row in tokens.
        feature_pairs: Pairs of layers of the feature term.
        attention_pairs: Pairs of layers of the attention term.
        head_bytes: The teacher's head, where the student's loss needs it.
        token_bytes: What the student's signals take of a token before compression.
        segment_bytes: What they take of one segment before compression.
        pool_segments: Segments of a pool.
        store_bytes: What its signals take of the whole store before compression: no pool has more.
        vocabulary: How many of the teacher's ids the student keeps; None for all.

    Raises:
        ConfigError: If the architecture makes no model.
    """
    student = _on_meta(model, teacher_config, task, vocabulary)
    config = student.config.get_text_config()
    parameters = sum(one.numel() for one in student.parameters())
    trained = sum(one.numel() for one in student.parameters() if one.requires_grad)
    teacher = teacher_configuration(teacher_config)
    bridge = config.hidden_size * teacher.hidden_size + teacher.hidden_size
    projectors = 0 if objective.feature.weight.is_off else feature_pairs * bridge
    batch_tokens = options.batch_size * max_length
    waiting = most_waiting(options.gradient_accumulation_steps)
    # Weight, gradient and two moments of a projector: all of it trains.
    return StudentMemory(
        parameters=parameters,
        trained=trained,
        weight_bytes=FLOAT_BYTES * parameters,
        gradient_bytes=FLOAT_BYTES * trained,
        moment_bytes=_moments(student, options.optimizer),
        projector_bytes=4 * FLOAT_BYTES * projectors,
        # Features in their stored numbers, of the batch in use and of those that wait there.
        teacher_bytes=head_bytes + round((1 + waiting) * batch_tokens * token_bytes),
        activation_bytes=_activations(
            config,
            objective,
            options,
            task,
            max_length,
            feature_pairs,
            attention_pairs,
            teacher.hidden_size,
        ),
        pool_bytes=min(round(POOLS * pool_segments * segment_bytes), store_bytes),
    )


def _moments(student: PreTrainedModel, optimizer: str) -> int:
    """Return the bytes that an optimiser keeps for a student's weights."""
    trained = {name: one for name, one in student.named_parameters() if one.requires_grad}
    if optimizer == "adafactor":
        # Of a matrix, means of its rows and columns.
        kept = sum(sum(one.shape) if one.dim() > 1 else one.numel() for one in trained.values())
        return FLOAT_BYTES * kept
    embeddings = {id(m.weight) for m in student.modules() if isinstance(m, torch.nn.Embedding)}
    is_small = {
        name: one.numel() < LEAST_8BIT_VALUES or id(one) in embeddings
        for name, one in trained.items()
    }
    return sum(
        2 * one.numel() * (FLOAT_BYTES if optimizer == "adamw" or is_small[name] else 1)
        for name, one in trained.items()
    )


def _activations(
    config: Any,
    objective: Objective,
    options: TrainOptions,
    task: str,
    max_length: int,
    feature_pairs: int,
    attention_pairs: int,
    d_teacher: int,
) -> int:
    item = 2 if options.precision in HALF else FLOAT_BYTES
    tokens, width = options.batch_size * max_length, config.hidden_size
    depth = 1 if options.gradient_checkpointing else config.num_hidden_layers
    kept = config.num_hidden_layers * width if options.gradient_checkpointing else 0
    found = tokens * (BLOCK_UNITS * depth * width + kept) * item
    if not objective.feature.weight.is_off:
        # Until the backward pass a pair keeps the gradients of its states and of its projector.
        found += feature_pairs * tokens * width * item
        found += feature_pairs * FLOAT_BYTES * (width + 1) * d_teacher
        found += LOSS_COPIES * FLOAT_BYTES * min(tokens * d_teacher, DEVICE_VALUES)
    if not objective.attention.weight.is_off:
        # Until the backward pass a pair keeps the gradients of query and key, and no map.
        scores = size_of(config, "num_attention_heads") * tokens * max_length
        found += attention_pairs * 2 * tokens * width * item
        found += LOSS_COPIES * FLOAT_BYTES * min(scores, DEVICE_VALUES)
    if models_language(task) and not (
        objective.output.weight.is_off and objective.labels.weight.is_off
    ):
        # A chunk of either side, a block of it in the loss, and the gradient of the head, which
        # waits for the backward pass that makes it the parameter's.
        logits = tokens * config.vocab_size
        found += 2 * FLOAT_BYTES * min(logits, DEVICE_SIZES.chunk)
        found += LOSS_COPIES * FLOAT_BYTES * min(logits, DEVICE_SIZES.block)
        found += FLOAT_BYTES * config.vocab_size * width
    return found


def _on_meta(
    model: StudentModel,
    teacher_config: Mapping[str, Any],
    task: str,
    vocabulary: int | None,
) -> PreTrainedModel:
    """Return the student on the meta device, with its adapters."""
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
    if vocabulary is not None:
        config.vocab_size, config.pad_token_id = vocabulary, None
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
