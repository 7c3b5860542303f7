"""The options of one optimisation as `transformers.TrainingArguments`."""

from pathlib import Path

from transformers import TrainingArguments

from pipeline.training.options import TrainOptions

OPTIMIZERS = {
    "adamw": "adamw_torch_fused",
    "adamw_8bit": "adamw_bnb_8bit",
    "adafactor": "adafactor",
}
"""The names of the optimisers in `transformers`."""


def training_arguments(options: TrainOptions, directory: Path, device: str) -> TrainingArguments:
    """Return the arguments of `transformers` for these options.

    Checkpoints go to `directory`; `mark_complete` removes old ones.
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
        optim=OPTIMIZERS[options.optimizer],
        bf16=options.precision == "bfloat16",
        fp16=options.precision == "float16",
        tf32=True if options.precision == "tf32" else None,
        activation_checkpointing=options.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        seed=options.seed,
        logging_steps=options.log_every,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=options.save_every,
        save_total_limit=None,  # see checkpoints.py
        report_to="none",  # see reporting.py
        run_name=directory.name,
        use_cpu=device == "cpu",
        # Alike on every rank from the start; else a teacher's head would travel at every step.
        ddp_broadcast_buffers=False,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device != "cpu",
    )
    # One process, one device: DataParallel would cut flat token features by rows of the batch.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def warmup_steps(arguments: TrainingArguments, steps: int) -> int:
    """Return the steps of warm-up; none in a run of one step, whose rate it would make 0."""
    return arguments.get_warmup_steps(steps) if steps > 1 else 0
