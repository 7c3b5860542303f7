"""Stage two: one student, from the store alone. The teacher is never loaded."""

import logging
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, set_seed

from pipeline.errors import IncompatibleError
from pipeline.provenance import (
    fingerprint,
    needing_room,
    replace_directory,
    write_bytes_atomically,
    write_json,
)
from pipeline.store.reader import StoreReader
from pipeline.student.build import build_student
from pipeline.student.distiller import TERMS, Distiller
from pipeline.student.features import TeacherFeatures
from pipeline.student.lora import merge_adapters
from pipeline.student.objective import Objective
from pipeline.student.order import BatchOrder
from pipeline.student.origin import LoraOptions, checkpoint_digest
from pipeline.student.stream import StoreDataset
from pipeline.student.trainer import DistillationTrainer
from pipeline.student.vocabulary import Vocabulary, VocabularyDataset, corpus_vocabulary
from pipeline.tasks import models_language
from pipeline.training.arguments import training_arguments
from pipeline.training.checkpoints import (
    checkpoint_lock,
    last_complete_checkpoint,
    remove_checkpoints,
    train_from,
)
from pipeline.training.options import TrainOptions

logger = logging.getLogger(__name__)


def train_student(
    *,
    name: str,
    selected: Mapping[str, Any],
    stores: Path,
    output: Path,
    curve: Path,
    work: Path,
    architecture: Mapping[str, Any] | None,
    checkpoint: str | None,
    init: Literal["random", "teacher-layers"],
    objective: Objective,
    options: TrainOptions,
    pool_segments: int,
    gradient_norms: bool,
    device: str,
    revision: str | None = None,
    vocabulary: Literal["teacher", "corpus"] = "teacher",
    lora: LoraOptions | None = None,
    parts: int | None = None,
) -> None:
    """Train a student and export it as a plain Hugging Face directory.

    Args:
        name: The student's name.
        selected: What the select stage wrote: store, signals with digests, layer maps.
        stores: Directory of stores.
        output: Where the student goes; replaced when training is done.
        curve: CSV of every logged term.
        work: Directory for checkpoints; the same parameters and features continue there.
        architecture: Configuration keys that differ from the teacher's.
        checkpoint: Directory or hub id to start from instead.
        init: Random weights, or the teacher's blocks from the store's assets.
        objective: The terms of the loss.
        options: The optimisation.
        pool_segments: Segments mixed together in memory.
        gradient_norms: Log the norm of each term's gradient.
        device: A torch device.
        revision: Revision of a hub checkpoint.
        vocabulary: All ids of the teacher, or those that its captured training rows need.
        lora: Adapters that train instead of the weights the student starts with; the export has
            them merged.
        parts: So many of the first parts of the training text: 1 leaves out all that was added to
            the corpus. None for all.

    Raises:
        IncompatibleError: If store and student do not fit; before the first step.
        IntegrityError: If the store is not whole.
    """
    store = stores / selected["store"]
    reader = StoreReader(store, selected["signals"])
    plan = reader.plan
    maps = {term: {int(s): t for s, t in pairs.items()} for term, pairs in selected["maps"].items()}
    tokenizer = reader.tokenizer()
    kept = corpus_vocabulary(reader, parts) if vocabulary == "corpus" else None
    with torch.random.fork_rng():
        set_seed(options.seed)
        student = build_student(
            architecture=None if architecture is None else dict(architecture),
            checkpoint=checkpoint,
            init=init,
            teacher_config=reader.teacher_config(),
            vocab=plan["vocab"],
            classes=tuple(plan["classes"]),
            task=plan["task"],
            seed=options.seed,
            blocks=_blocks(reader, selected) if init == "teacher-layers" else None,
            layer_choice=selected["assets"].get("blocks", {}).get("layers", "uniform"),
            revision=revision,
            vocabulary=None if kept is None else kept.ids,
            lora=lora,
            tokenizer=tokenizer,
        )
        _check_length(student, plan["max_length"], name)
        signals = list(selected["signals"])
        # Classes are no ids: what a sequence model says has nothing to do with them.
        features = TeacherFeatures(
            reader,
            signals,
            temperature=objective.output.temperature,
            vocabulary=kept.ids if kept and models_language(plan["task"]) else None,
        )
        distiller = Distiller(student, features, objective, maps, task=plan["task"])
    pool: dict[str, Any] = {"pool_segments": pool_segments, "parts": parts}
    dataset = (
        StoreDataset(reader, signals, **pool)
        if kept is None
        else VocabularyDataset(reader, signals, ids=kept.ids, **pool)
    )
    chosen = {} if parts is None else {"parts": parts}
    terms = objective.model_dump(mode="json")
    identity = fingerprint(
        {
            "selected": dict(selected),
            "architecture": dict(architecture or {}),
            "checkpoint": checkpoint,
            "revision": revision,
            "commit": getattr(student.config, "_commit_hash", None),
            "weights": checkpoint_digest(checkpoint),
            "init": init,
            "vocabulary": vocabulary,
            "lora": None if lora is None else lora.model_dump(mode="json"),
            "objective": terms,
            "options": options.model_dump(mode="json"),
            "pool_segments": pool_segments,
            **chosen,
        }
    )
    directory = work / "train" / f"{name}-{identity[:16]}"
    if options.gradient_checkpointing:
        # Here, because Trainer knows only the distiller; the tap refuses the reentrant kind.
        student.activation_checkpointing_enable({"use_reentrant": False})
    plain = options.model_copy(update={"gradient_checkpointing": False})
    arguments = training_arguments(plain, directory, device)
    order = BatchOrder(
        dataset.segment,
        dataset.length,
        batch_size=options.batch_size,
        pool_segments=pool_segments,
        seed=options.seed,
        rank=arguments.process_index,
        ranks=arguments.world_size,
    )
    trainer = DistillationTrainer(
        distiller,
        dataset,
        order,
        arguments,
        description=f"train {name}",
        gradient_norms=gradient_norms,
    )
    with checkpoint_lock(directory) if trainer.is_world_process_zero() else nullcontext():
        resumed = last_complete_checkpoint(directory, reader.pins)
        if resumed is not None:
            logger.info("%s: going on from %s", name, resumed)
        train_from(trainer, resumed)
        if not trainer.is_world_process_zero():
            return
        reader.check_pins()
        merge_adapters(student)
        record = {
            "student": name,
            **selected,
            **chosen,
            "objective": terms,
            "objective_fingerprint": fingerprint(terms),
            "made_of": {key: plan["spec"].get(key) for key in ("tokenizer", "tokens")},
        }
        export(student, reader, output, record, kept)
        write_curve(trainer.state.log_history, curve)
        remove_checkpoints(directory)


def _blocks(reader: StoreReader, selected: Mapping[str, Any]) -> Path:
    path = reader.asset("blocks")
    record = reader.index["assets"]["blocks"]
    found = f"{record['bytes']}-{record['xxh3']:016x}"
    wanted = selected["assets"]["blocks"]["digest"]
    if found != wanted:
        raise IncompatibleError(
            f"{path}: blocks {found}, expected {wanted}; run the select stage again"
        )
    return path


def _check_length(student: PreTrainedModel, max_length: int, name: str) -> None:
    positions = getattr(student.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and positions < max_length:
        raise IncompatibleError(
            f"students.{name}.model: {positions} positions, the corpus has rows of up to "
            f"{max_length} tokens; raise max_position_embeddings or lower the teacher's "
            "tokens.max_length"
        )


def export(
    student: PreTrainedModel,
    reader: StoreReader,
    output: Path,
    record: Mapping[str, Any],
    kept: Vocabulary | None = None,
) -> None:
    """Write the student, with the tokenizer, where any Hugging Face loader finds it.

    It is written and synced aside, with `record` of where it comes from, and takes the place of an
    earlier one by two renames: a student is whole or it is not there.

    Raises:
        ResourceError: If there is no room for it.
    """
    staging = output.with_name(f".{output.name}.writing")
    shutil.rmtree(staging, ignore_errors=True)
    student.set_attn_implementation("sdpa")
    with needing_room(staging, sum(p.numel() * p.element_size() for p in student.parameters())):
        student.save_pretrained(staging)
        if kept is None:
            reader.copy_tokenizer(staging)
        else:
            kept.tokenizer.save(staging)
    write_json(staging / "distillation.json", record)
    replace_directory(output, staging)


def write_curve(history: Sequence[Mapping[str, float]], path: Path) -> None:
    """Write the logged values, a row a logged step, columns in a fixed order."""
    rows = [row for row in history if "loss" in row]
    more = sorted({key for row in rows for key in row if key.startswith(("gradient_", "factor_"))})
    wanted = ["step", "epoch", "loss", *TERMS, *more, "grad_norm", "learning_rate"]
    columns = [key for key in wanted if any(key in row for row in rows)]
    lines = [",".join(columns)]
    lines += [",".join(f"{row[key]:.6g}" if key in row else "" for key in columns) for row in rows]
    write_bytes_atomically(path, ("\n".join(lines) + "\n").encode())
