"""Stage two's loop: a student's optimiser steps, one after another.

`accelerate` scales, averages and clips the gradients; the order of steps is written out here.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin
from transformers import TrainerCallback, TrainerState, TrainingArguments, set_seed

from pipeline.provenance import needing_room
from pipeline.student.align.distiller import Distiller, term_counts
from pipeline.student.data.batch_order import BatchOrder
from pipeline.student.data.feed import Feed
from pipeline.student.data.stream import StoreDataset
from pipeline.student.loop.checkpoint import Checkpoints
from pipeline.student.loop.curve import Curve
from pipeline.student.loop.gradient import StepGradient
from pipeline.student.loop.optimizer import make_optimizer, make_schedule
from pipeline.training.checkpoints import checkpoint_bytes
from pipeline.training.interrupts import INTERRUPTS, Stop


class StudentLoop:
    """Trains a `Distiller` on the examples of a store.

    Args:
        distiller: Student and projectors, on the device that they train on.
        dataset: Where examples are looked up.
        order: Which examples are in a batch together.
        arguments: The optimisation.
        description: What is trained, for the progress bar and for errors.
        gradient_norms: Log the norm of each term's gradient.
        piece_size: Largest micro-batch; a larger batch runs in several, to the same gradient. None
            for whole batches.
        reporters: Where the curve is reported.
    """

    def __init__(
        self,
        distiller: Distiller,
        dataset: StoreDataset,
        order: BatchOrder,
        arguments: TrainingArguments,
        *,
        description: str,
        gradient_norms: bool = False,
        piece_size: int | None = None,
        reporters: Sequence[TrainerCallback] = (),
    ) -> None:
        set_seed(arguments.seed)
        self._distiller, self._dataset, self._order = distiller, dataset, order
        self._arguments = arguments
        self._batches_a_step = arguments.gradient_accumulation_steps
        self._steps_an_epoch = -(-len(order) // self._batches_a_step)
        epochs = int(arguments.num_train_epochs)
        steps = arguments.max_steps if arguments.max_steps > 0 else epochs * self._steps_an_epoch
        # A term that is off leaves some weights without a gradient. Buffers are alike on every rank
        # from the start; else a teacher's head would travel at every step.
        distributed: Any = DistributedDataParallelKwargs(
            find_unused_parameters=True, broadcast_buffers=False
        )
        self._accelerator = Accelerator(
            mixed_precision=arguments.mixed_precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            kwargs_handlers=[distributed],
        )
        self.state = TrainerState(
            max_steps=steps,
            num_train_epochs=-(-steps // self._steps_an_epoch),
            logging_steps=int(arguments.logging_steps),
            save_steps=int(arguments.save_steps),
            train_batch_size=arguments.train_batch_size,
            is_local_process_zero=self._accelerator.is_local_main_process,
            is_world_process_zero=self._accelerator.is_main_process,
        )
        self._model, self._optimizer = self._accelerator.prepare(
            distiller, make_optimizer(distiller, arguments)
        )
        phases = distiller.objective.phases
        first = [] if phases is None or steps < 2 else [phases.first_steps(steps)]
        self._schedule = make_schedule(self._optimizer, arguments, [*first, steps - sum(first)])
        self._gradient = StepGradient(
            distiller,
            self._model,
            self._accelerator,
            max_norm=arguments.max_grad_norm,
            has_norms=gradient_norms,
        )
        self._curve = Curve(
            description,
            distiller,
            self.state,
            self._gradient,
            self._accelerator,
            arguments,
            reporters,
        )
        self._checkpoints = Checkpoints(
            Path(str(arguments.output_dir)),
            distiller,
            self._optimizer,
            self._schedule,
            self._accelerator,
            pins=dataset.reader.pins,
        )
        count = partial(term_counts, objective=distiller.objective, task=distiller.task)
        self._feed = Feed(dataset, arguments.device, count, piece_size=piece_size)

    def steps(self, checkpoint: Path | None = None) -> Iterator[float]:
        """Train to the end; before each step, yield the epochs that are done.

        Who waits at a yield may let another student train, and restores the random state then.

        Args:
            checkpoint: A checkpoint of this run to go on from.

        Raises:
            IncompatibleError: If a signal was captured anew, or the store is another.
            IntegrityError: If the store is damaged, or a value is not finite.
            Interrupted: If a signal came; the checkpoint of the last step is written.
            ResourceError: If there is no room for the checkpoints.
        """
        state = self.state
        self._checkpoints.load(checkpoint, state, self._gradient.values)
        if state.global_step == state.max_steps:
            return
        batches: Iterator[list[int]] | None = None
        with self._watched() as stop:
            for step in range(state.global_step, state.max_steps):
                epoch, in_epoch = divmod(step, self._steps_an_epoch)
                if batches is None or in_epoch == 0:
                    batches = self._begin_epoch(epoch, in_epoch)
                yield state.epoch or 0.0

                fed = self._feed.take(batches, self._batches_a_step)
                self._gradient.compute(fed, state)
                norm = self._gradient.clip(state)
                self._optimizer.step()
                rate = float(self._schedule.get_last_lr()[0])
                if not self._accelerator.optimizer_step_was_skipped:
                    self._schedule.step()
                self._optimizer.zero_grad()

                state.global_step = step + 1
                batches_done = min((in_epoch + 1) * self._batches_a_step, len(self._order))
                state.epoch = epoch + batches_done / len(self._order)
                self._dataset.reader.check_pins()
                self._curve.advance(sum(batch.tokens for batch in fed))

                is_stopped, is_last = stop.is_asked(), state.global_step == state.max_steps
                if is_last or state.global_step % state.logging_steps == 0:
                    self._curve.add_point(norm, rate)
                if is_last or is_stopped or state.global_step % state.save_steps == 0:
                    self._curve.check()
                    self._checkpoints.save(state, self._gradient.values)
                    self._curve.reports.tell("on_save", state)
                if is_stopped:
                    break
            self._curve.end()
        stop.check(state.global_step)

    def _begin_epoch(self, epoch: int, done: int) -> Iterator[list[int]]:
        """Return the epoch's batches after `done` steps, and have their segments read ahead."""
        self._order.set_epoch(epoch)
        is_last = (epoch + 1) * self._steps_an_epoch >= self.state.max_steps
        then = [] if is_last else self._order.next_segments()
        self._dataset.follow(self._order.timetable(), then)
        if done == 0:
            # The seed that a `DataLoader` draws: curves stay those of runs that had one.
            torch.empty((), dtype=torch.int64).random_()
        return islice(self._order, done * self._batches_a_step, None)

    @contextmanager
    def _watched(self) -> Iterator[Stop]:
        """Hold interrupts back until a step ends; let go of everything however the run ends."""
        directory = Path(str(self._arguments.output_dir))
        try:
            with (
                INTERRUPTS.heeded(),
                needing_room(directory, checkpoint_bytes(self._distiller)),
                self._curve.open(),
            ):
                yield Stop(self._accelerator.num_processes)
        finally:
            self._feed.close()
