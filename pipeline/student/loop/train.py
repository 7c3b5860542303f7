"""Stage two: one student, from the store alone. The teacher is never loaded."""

import logging
import os
from collections.abc import Generator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments, set_seed

from pipeline.errors import ConfigError, IncompatibleError, ResourceError
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
from pipeline.training.memory import is_out_of_memory
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


def train_student(**asked: Any) -> None:
    """Train a student and export it as a plain Hugging Face directory.

    Args:
        **asked: The fields of a `Training`.

    Raises:
        IncompatibleError: If store and student do not fit; before the first step.
        IntegrityError: If the store is not whole.
        ResourceError: If memory or the disk is too small.
    """
    train_alone(Training(**asked))


def train_alone(training: Training) -> None:
    """Train one student to its end; see `train_student`."""
    run = StudentRun(training)
    for _ in run.train(run.loop()):
        pass


class StudentRun:
    """A student that is built, with all that it will be trained from; nothing has run yet.

    Args:
        asked: What is to be trained.
        reads: Segments of its store that other students read too.

    Raises:
        ConfigError: If weights are to be sharded over processes, or a reporter is not there.
        IncompatibleError: If store and student do not fit.
        IntegrityError: If the store is not whole.
    """

    def __init__(self, asked: Training, reads: SegmentReads | None = None) -> None:
        _check_unsharded()
        check_options(asked.options, asked.device, key=f"students.{asked.name}.train")
        self.asked = asked
        self._reporters: list[TrainerCallback] = reporters(
            asked.report_to, asked.work / "runs" / asked.name, asked.name
        )
        self._reader = StoreReader(asked.store, asked.selected["signals"])
        ids = asked.model.vocabulary == "corpus"
        self._kept = corpus_vocabulary(self._reader, asked.parts) if ids else None
        with torch.random.fork_rng():
            set_seed(asked.options.seed)
            self._student = _build(asked, self._reader, self._kept)
            self._distiller = _distiller(asked, self._reader, self._kept, self._student)
        signals = list(asked.selected["signals"])
        pool: dict[str, Any] = {
            "pool_segments": asked.pool_segments, "parts": asked.parts, "reads": reads
        }  # fmt: skip
        self._dataset = (
            StoreDataset(self._reader, signals, **pool)
            if self._kept is None
            else VocabularyDataset(self._reader, signals, ids=self._kept.ids, **pool)
        )
        self._directory = asked.work / "train" / f"{asked.name}-{self._identity()[:16]}"
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
        asked, arguments = self.asked, self._arguments
        piece_size = asked.micro_batch_size or None
        if piece_size == "auto":
            rehearsal = Rehearsal(
                self._distiller,
                self._dataset,
                arguments.device,
                precision=asked.options.precision,
                is_apart=asked.gradient_norms or self._distiller.balance is not None,
                held_bytes=self.held_bytes if held_bytes is None else held_bytes,
                waiting=most_waiting(asked.options.gradient_accumulation_steps),
            )
            piece_size = settle_micro_batch(
                rehearsal.fits,
                asked.options.batch_size,
                name=asked.name,
                record=self._directory / "micro_batch.json",
                device=arguments.device,
            )
        order = BatchOrder(
            self._dataset.segment,
            self._dataset.length,
            batch_size=asked.options.batch_size,
            pool_segments=asked.pool_segments,
            seed=asked.options.seed,
            rank=arguments.process_index,
            ranks=arguments.world_size,
        )
        return StudentLoop(
            self._distiller,
            self._dataset,
            order,
            arguments,
            description=f"train {asked.name}",
            gradient_norms=asked.gradient_norms,
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
                logger.info("%s: resuming from %s", self.asked.name, resumed)
            try:
                yield from loop.steps(None if resumed is None else Path(resumed))
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                raise self._no_memory(error) from error
            if not is_first:
                return
            reader.check_pins()
            self.asked.before_commit()
            merge_adapters(self._student)
            export(self._student, reader, self.asked.output, self._record(), self._kept)
            write_curve(loop.state.log_history, self.asked.curve)
            remove_checkpoints(directory)

    def _prepare_arguments(self) -> TrainingArguments:
        options = self.asked.options
        if options.gradient_checkpointing:
            # The tap refuses the reentrant kind.
            self._student.activation_checkpointing_enable({"use_reentrant": False})
        plain = options.model_copy(update={"gradient_checkpointing": False})
        return training_arguments(plain, self._directory, self.asked.device)

    def _no_memory(self, error: BaseException) -> ResourceError:
        size = self.asked.micro_batch_size
        remedy = (
            "run it with nothing beside it"
            if size == "auto"
            else "set micro_batch_size to auto in runtime.yaml, or to a smaller number"
        )
        return ResourceError(
            f"students.{self.asked.name}: out of memory ({' '.join(str(error).split())[:200]}) in "
            f"micro-batches of {size or self.asked.options.batch_size}; {remedy}, then run the "
            "same command again"
        )

    def _identity(self) -> str:
        """Digest of all that decides what the student becomes; checkpoints are found by it."""
        asked, model = self.asked, self.asked.model
        return fingerprint(
            {
                "selected": dict(asked.selected),
                "architecture": dict(model.architecture or {}),
                "checkpoint": model.checkpoint,
                "revision": model.revision,
                "commit": getattr(self._student.config, "_commit_hash", None),
                "weights": checkpoint_digest(model.checkpoint),
                "init": model.init,
                "vocabulary": model.vocabulary,
                "lora": None if model.lora is None else model.lora.model_dump(mode="json"),
                "objective": asked.objective.record(),
                "options": asked.options.model_dump(mode="json"),
                "pool_segments": asked.pool_segments,
                # So many times the batch, though no parameter says so.
                "processes": int(os.environ.get("WORLD_SIZE", "1")),
                "checkpoints": CHECKPOINTS,
                **self._chosen(),
            }
        )

    def _chosen(self) -> dict[str, int]:
        return {} if self.asked.parts is None else {"parts": self.asked.parts}

    def _record(self) -> dict[str, Any]:
        """Say where the exported student comes from."""
        terms = self.asked.objective.record()
        spec = self._reader.plan["spec"]
        return {
            "student": self.asked.name,
            **self.asked.selected,
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


def _build(asked: Training, reader: StoreReader, kept: Vocabulary | None) -> PreTrainedModel:
    plan = reader.plan
    student = build_student(
        asked.model,
        teacher_config=reader.teacher_config(),
        vocab=plan["vocab"],
        classes=tuple(plan["classes"]),
        task=plan["task"],
        seed=asked.options.seed,
        blocks=_blocks(reader, asked.selected) if asked.model.init == "teacher-layers" else None,
        layer_choice=asked.selected["assets"].get(BLOCKS, {}).get("layers", "uniform"),
        vocabulary=None if kept is None else kept.ids,
        tokenizer=reader.tokenizer(),
    )
    require_room(student, plan["max_length"], f"students.{asked.name}.model")
    return student


def _distiller(
    asked: Training, reader: StoreReader, kept: Vocabulary | None, student: PreTrainedModel
) -> Distiller:
    task = reader.plan["task"]
    maps = {
        term: {int(layer): found for layer, found in pairs.items()}
        for term, pairs in asked.selected["maps"].items()
    }
    features = TeacherFeatures(
        reader,
        list(asked.selected["signals"]),
        temperature=asked.objective.output.temperature,
        # Classes are no ids: what a sequence model says has nothing to do with them.
        vocabulary=kept.ids if kept and models_language(task) else None,
    )
    return Distiller(student, features, asked.objective, maps, task=task)


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
