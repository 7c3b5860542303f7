"""Stage two: one student, from the store alone. The teacher is never loaded."""

import logging
import os
from collections.abc import Generator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments, set_seed

from pipeline.errors import ConfigError, IncompatibleError, ResourceError, is_out_of_memory
from pipeline.provenance import fingerprint
from pipeline.store.layout import BLOCKS
from pipeline.store.reader import StoreReader
from pipeline.student.align.distiller import Distiller
from pipeline.student.data.batch_order import BatchOrder
from pipeline.student.data.features import TeacherFeatures
from pipeline.student.data.feed import most_waiting
from pipeline.student.data.reads import SegmentReads
from pipeline.student.data.stream import StoreDataset
from pipeline.student.loop.micro_batch import Rehearsal, held_bytes, settle_micro_batch
from pipeline.student.loop.steps import StudentLoop
from pipeline.student.loop.training import Training
from pipeline.student.model.build import build_student
from pipeline.student.model.export import export, write_curve
from pipeline.student.model.lora import merge_adapters
from pipeline.student.model.origin import checkpoint_digest
from pipeline.student.vocabulary.vocabulary import Vocabulary, VocabularyDataset, corpus_vocabulary
from pipeline.taps.row_length import require_room
from pipeline.tasks import models_language
from pipeline.training.arguments import training_arguments
from pipeline.training.checkpoints import (
    checkpoint_lock,
    last_complete_checkpoint,
    remove_checkpoints,
)
from pipeline.training.generators import forked_generators
from pipeline.training.options import check_options
from pipeline.training.reporting import reporters

logger = logging.getLogger(__name__)
CHECKPOINTS = 2
"""Layout of a checkpoint's files: those of another one are not found."""
SHARDING = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}
"""What accelerate's launcher asks for by a variable, and here has no whole weights to work on."""


def train_student(training: Training) -> None:
    """Train a student and export it as a plain Hugging Face directory.

    Raises:
        IncompatibleError: If store and student do not fit; before the first step.
        IntegrityError: If the store is not whole.
        ResourceError: If memory or the disk is too small.
    """
    run = StudentRun(training)
    for _ in run.train(run.loop()):
        pass


class StudentRun:
    """A student that is built, with all that it will be trained from; nothing has run yet.

    Args:
        training: What is to be trained.
        reads: Segments of its store that other students read too.

    Raises:
        ConfigError: If weights are to be sharded over processes, or a reporter is not there.
        IncompatibleError: If store and student do not fit.
        IntegrityError: If the store is not whole.
    """

    def __init__(self, training: Training, reads: SegmentReads | None = None) -> None:
        _check_unsharded()
        options, runtime = training.student, training.runtime
        key = f"students.{training.name}.train"
        check_options(options.train, runtime.torch_device(), key=key)
        self.training = training
        self._reporters: list[TrainerCallback] = reporters(
            runtime.report_to, training.work / "runs" / training.name, training.name
        )
        self._reader = StoreReader(training.store, training.selected["signals"])
        ids = options.model.vocabulary == "corpus"
        self._kept = corpus_vocabulary(self._reader, options.parts) if ids else None
        with forked_generators():
            set_seed(options.train.seed)
            self._student = _build(training, self._reader, self._kept)
            self._distiller = _distiller(training, self._reader, self._kept, self._student)
        signals = list(training.selected["signals"])
        pool: dict[str, Any] = {
            "pool_segments": options.pool_segments, "parts": options.parts, "reads": reads
        }  # fmt: skip
        self._dataset = (
            StoreDataset(self._reader, signals, **pool)
            if self._kept is None
            else VocabularyDataset(self._reader, signals, ids=self._kept.ids, **pool)
        )
        self._directory = training.work / "train" / f"{training.name}-{self._identity()[:16]}"
        self._arguments = self._prepare_arguments()
        self._distiller.to(self._arguments.device)

    @property
    def device(self) -> torch.device:
        """Where it trains."""
        return self._arguments.device

    @property
    def ranks(self) -> int:
        """How many processes train it."""
        return self._arguments.world_size

    @property
    def held_bytes(self) -> int:
        """What it holds on its device between two steps, beside its weights."""
        return held_bytes(self._distiller, ranks=self.ranks)

    def loop(self, *, held_bytes: int | None = None) -> StudentLoop:
        """Return the loop that trains it, with the micro-batches that fit.

        Args:
            held_bytes: What it and others hold on the device between two steps; None: it alone.

        Raises:
            ResourceError: If `auto` finds that not even one example fits.
        """
        training, arguments = self.training, self._arguments
        options = training.student
        piece_size = training.runtime.micro_batch_size or None
        if piece_size == "auto":
            rehearsal = Rehearsal(
                self._distiller,
                self._dataset,
                arguments.device,
                precision=options.train.precision,
                is_apart=options.gradient_norms or self._distiller.balance is not None,
                held_bytes=self.held_bytes if held_bytes is None else held_bytes,
                waiting=most_waiting(options.train.gradient_accumulation_steps),
            )
            piece_size = settle_micro_batch(
                rehearsal.fits,
                options.train.batch_size,
                name=training.name,
                record=self._directory / "micro_batch.json",
                device=arguments.device,
            )
        order = BatchOrder(
            self._dataset.segment,
            self._dataset.length,
            batch_size=options.train.batch_size,
            pool_segments=options.pool_segments,
            seed=options.train.seed,
            rank=arguments.process_index,
            ranks=arguments.world_size,
        )
        return StudentLoop(
            self._distiller,
            self._dataset,
            order,
            arguments,
            description=f"train {training.name}",
            gradient_norms=options.gradient_norms,
            piece_size=piece_size,
            reporters=self._reporters,
        )

    def train(self, loop: StudentLoop) -> Generator[float, None, None]:
        """Train to the end, from the last complete checkpoint, and export the student.

        Before each step it yields the epochs that are done, and another student may train.

        Raises:
            IncompatibleError: If the store's signals are others by now.
            IntegrityError: If the store is not whole, or the loss not finite.
            ResourceError: If memory or the disk is too small.
        """
        directory, reader = self._directory, self._reader
        is_first = loop.state.is_world_process_zero
        with checkpoint_lock(directory) if is_first else nullcontext():
            resumed = last_complete_checkpoint(directory, reader.pins)
            if resumed is not None:
                logger.info("%s: resuming from %s", self.training.name, resumed)
            try:
                yield from loop.steps(None if resumed is None else Path(resumed))
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                raise self._no_memory(error) from error
            if not is_first:
                return
            reader.check_pins()
            self.training.before_commit()
            merge_adapters(self._student)
            export(self._student, reader, self.training.output, self._record(), self._kept)
            write_curve(loop.state.log_history, self.training.curve)
            remove_checkpoints(directory)

    def _prepare_arguments(self) -> TrainingArguments:
        options = self.training.student.train
        if options.gradient_checkpointing:
            # The tap refuses the reentrant kind.
            self._student.activation_checkpointing_enable({"use_reentrant": False})
        plain = options.model_copy(update={"gradient_checkpointing": False})
        return training_arguments(plain, self._directory, self.training.runtime.torch_device())

    def _no_memory(self, error: BaseException) -> ResourceError:
        training = self.training
        size = training.runtime.micro_batch_size
        remedy = (
            "run it with nothing beside it"
            if size == "auto"
            else "set micro_batch_size to auto in runtime.yaml, or to a smaller number"
        )
        return ResourceError(
            f"students.{training.name}: out of memory ({' '.join(str(error).split())[:200]}) in "
            f"micro-batches of {size or training.student.train.batch_size}; {remedy}, then run the "
            "same command again"
        )

    def _identity(self) -> str:
        """Digest of all that decides what the student becomes; checkpoints are found by it."""
        training, options = self.training, self.training.student
        model = options.model
        return fingerprint(
            {
                "selected": dict(training.selected),
                "architecture": dict(model.architecture or {}),
                "checkpoint": model.checkpoint,
                "revision": model.revision,
                "commit": getattr(self._student.config, "_commit_hash", None),
                "weights": checkpoint_digest(model.checkpoint),
                "init": model.init,
                "vocabulary": model.vocabulary,
                "lora": None if model.lora is None else model.lora.model_dump(mode="json"),
                "objective": options.loss.record(),
                "options": options.train.model_dump(mode="json"),
                "pool_segments": options.pool_segments,
                # So many times the batch, though no parameter says so.
                "processes": int(os.environ.get("WORLD_SIZE", "1")),
                "checkpoints": CHECKPOINTS,
                **self._chosen(),
            }
        )

    def _chosen(self) -> dict[str, int]:
        return {} if self.training.student.parts is None else {"parts": self.training.student.parts}

    def _record(self) -> dict[str, Any]:
        """Say where the exported student comes from."""
        terms = self.training.student.loss.record()
        spec = self._reader.plan["spec"]
        return {
            "student": self.training.name,
            **self.training.selected,
            **self._chosen(),
            "objective": terms,
            "objective_fingerprint": fingerprint(terms),
            "made_of": {key: spec.get(key) for key in ("tokenizer", "tokens")},
        }


def _check_unsharded() -> None:
    for variable, name in SHARDING.items():
        if os.environ.get(variable, "").lower() in ("1", "true"):
            raise ConfigError(
                f"{variable}: {name} shards the weights, expected every process to hold them "
                "whole; launch with plain data parallelism (accelerate's --multi_gpu, or torchrun)"
            )


def _build(training: Training, reader: StoreReader, kept: Vocabulary | None) -> PreTrainedModel:
    plan, options = reader.plan, training.student
    is_cut = options.model.init == "teacher-layers"
    student = build_student(
        options.model,
        teacher_config=reader.teacher_config(),
        vocab=plan["vocab"],
        classes=tuple(plan["classes"]),
        task=plan["task"],
        seed=options.train.seed,
        blocks=_blocks(reader, training.selected) if is_cut else None,
        layer_choice=training.selected["assets"].get(BLOCKS, {}).get("layers", "uniform"),
        vocabulary=None if kept is None else kept.ids,
        tokenizer=reader.tokenizer(),
    )
    require_room(student, plan["max_length"], f"students.{training.name}.model")
    return student


def _distiller(
    training: Training, reader: StoreReader, kept: Vocabulary | None, student: PreTrainedModel
) -> Distiller:
    task = reader.plan["task"]
    maps = {
        term: {int(layer): found for layer, found in pairs.items()}
        for term, pairs in training.selected["maps"].items()
    }
    features = TeacherFeatures(
        reader,
        list(training.selected["signals"]),
        temperature=training.student.loss.output.temperature,
        # Classes are no ids: what a sequence model says has nothing to do with them.
        vocabulary=kept.ids if kept and models_language(task) else None,
    )
    return Distiller(student, features, training.student.loss, maps, task=task)


def _blocks(reader: StoreReader, selected: Mapping[str, Any]) -> Path:
    path = reader.asset(BLOCKS)
    record = reader.index["assets"][BLOCKS]
    found = f"{record['bytes']}-{record['xxh3']:016x}"
    wanted = selected["assets"][BLOCKS]["digest"]
    if found != wanted:
        raise IncompatibleError(
            f"{path}: blocks {found}, expected {wanted}; run the select stage again (`decant "
            "select STUDENT`)"
        )
    return path
