"""How a model is optimised, the same words for teachers and students."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from transformers import TrainingArguments

Positive = Annotated[int, Field(ge=1)]


class TrainOptions(BaseModel):
    """One optimisation: AdamW with warm-up, a schedule and gradient clipping.

    `batch_size` counts examples of one micro-batch on one device; `steps`, if given, replaces
    `epochs`. `warmup` is a share of the run. Intervals are in optimiser steps.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    epochs: Positive = 3
    steps: Positive | None = None
    batch_size: Positive = 32
    gradient_accumulation_steps: Positive = 1
    learning_rate: Annotated[float, Field(gt=0)] = 5e-4
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = "linear"
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    precision: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False
    seed: Annotated[int, Field(ge=0)] = 0
    log_every: Positive = 10
    save_every: Positive = 200


def training_arguments(options: TrainOptions, directory: Path, device: str) -> TrainingArguments:
    """Return the arguments of `transformers.Trainer` for these options.

    Checkpoints go to `directory`; the newest two are kept, because only one with its completion
    marker counts.
    """
    arguments = TrainingArguments(
        output_dir=str(directory),
        num_train_epochs=options.epochs,
        max_steps=options.steps or -1,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        learning_rate=options.learning_rate,
        lr_scheduler_type=options.schedule,
        warmup_steps=options.warmup,
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        bf16=options.precision == "bfloat16",
        activation_checkpointing=options.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        seed=options.seed,
        logging_steps=options.log_every,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=options.save_every,
        save_total_limit=2,
        report_to="none",
        use_cpu=device == "cpu",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device != "cpu",
    )
    # One process, one device: DataParallel would cut flat token features by rows of the batch.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments
