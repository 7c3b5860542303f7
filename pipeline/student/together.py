"""Several students at once: each segment is read and decoded once for all of them.

Every student has its own thread and its own `Trainer`, and only one of them runs at a time: turns
change at the beginning of a step. Who leaves puts the random state aside and finds it again, so a
student becomes, bit for bit, what it would become alone. The next turn is for the student that is
least far, so that all of one seed walk through the segments side by side, whatever their batches.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any

import torch

from pipeline.errors import ConfigError, in_short
from pipeline.store.reader import StoreReader
from pipeline.student.random_state import RandomState
from pipeline.student.reads import SegmentReads
from pipeline.student.stream import POOLS
from pipeline.student.train import StudentRun
from pipeline.student.trainer import DistillationTrainer
from pipeline.student.training import Training

logger = logging.getLogger(__name__)


class StoppedError(Exception):
    """Another student's training was interrupted, and this one ends with it."""


class Turns:
    """Lets one of several threads run at a time, with the random state it had when it last ran.

    Args:
        states: Each one's random state when it begins.
        how_far: Tells how far one is; who is least far has the next turn, the first of several.
    """

    def __init__(self, states: Sequence[RandomState], how_far: Callable[[int], float]) -> None:
        self._states = list(states)
        self._how_far = how_far
        self._left = set(range(len(states)))
        self._turn = self._next()
        self._is_stopped = False
        self._changed = threading.Condition()

    def begin(self, number: int) -> None:
        """Wait for the first turn.

        Raises:
            StoppedError: If there will be none.
        """
        self._wait(number)

    def pass_on(self, number: int) -> None:
        """Give the turn to who is least far, and wait for the next one.

        Raises:
            StoppedError: If there will be none.
        """
        if self._next() != number or self._is_stopped:
            self._states[number] = RandomState.now()
            self._give()
            self._wait(number)

    def end(self, number: int) -> None:
        """Leave the turns to the others."""
        with self._changed:
            # Within, because who was stopped may leave at the same time.
            self._left.discard(number)
            self._give()

    def stop(self) -> None:
        """Give nobody another turn; who runs stops at the end of its step."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()

    def _next(self) -> int | None:
        return min(self._left, key=lambda number: (self._how_far(number), number), default=None)

    def _give(self) -> None:
        with self._changed:  # may be held already
            self._turn = self._next()
            self._changed.notify_all()

    def _wait(self, number: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._turn == number or self._is_stopped)
        if self._is_stopped:
            raise StoppedError
        self._states[number].restore()


def train_together(trainings: Sequence[Training]) -> None:
    """Train students of one store side by side and export each as `train_student` does.

    All of them are in memory at the same time. One that fails leaves the others to go on; one that
    reads nothing of a damaged signal fails with those that do, for they read together.

    Raises:
        ConfigError: If their stores or precisions differ, or several processes train.
        DecantError: The error of the first student that failed, when all others are done.
    """
    _check(trainings)
    first = trainings[0]
    walk_alike = len({_walk(one) for one in trainings}) == 1
    if not walk_alike:
        logger.info("their seed, pool_segments or parts differ: segments are not read once for all")
    pins = {name: pin for one in trainings for name, pin in one.selected["signals"].items()}
    # Of two students in step, one has let go of a pool at most that the other still needs; what it
    # reads ahead of them is kept meanwhile.
    shared = {"users": len(trainings), "most_kept": 2 * POOLS * first.pool_segments}
    reads = SegmentReads(StoreReader(first.store, pins), list(pins), **shared if walk_alike else {})
    try:
        _finish(trainings, _run_all(*_prepare(trainings, reads), reads.leave))
    finally:
        reads.close()


def _prepare(
    trainings: Sequence[Training], reads: SegmentReads
) -> tuple[list[StudentRun], list[DistillationTrainer], Turns]:
    """Build all of them in one thread: they share what `accelerate` knows of this process."""
    runs = [StudentRun(training, reads) for training in trainings]
    if runs[0].ranks > 1:
        raise ConfigError(
            f"--students: found {runs[0].ranks} processes, expected one, in which students take "
            "turns; set processes to 1, or train one student at a time"
        )
    held = sum(run.held_bytes for run in runs)
    trainers: list[DistillationTrainer] = []
    states: list[RandomState] = []

    def pass_on(number: int) -> None:
        turns.pass_on(number)

    for number, run in enumerate(runs):
        trainers.append(run.trainer(held_bytes=held, between_steps=partial(pass_on, number)))
        # A trainer sets the seed when it is made, and alone it would go on from there.
        states.append(RandomState.now())
    turns = Turns(states, lambda number: float(trainers[number].state.epoch or 0.0))
    return runs, trainers, turns


def _run_all(
    runs: Sequence[StudentRun],
    trainers: Sequence[DistillationTrainer],
    turns: Turns,
    leave: Callable[[], None],
) -> list[Future[None]]:
    threads = torch.get_num_threads()

    def train(number: int) -> None:
        try:
            turns.begin(number)
            torch.set_num_threads(threads)  # counts for one thread
            if runs[number].device.type == "cuda":
                torch.cuda.set_device(runs[number].device)
            runs[number].train(trainers[number])
        finally:
            leave()
            turns.end(number)

    with ThreadPoolExecutor(len(runs), thread_name_prefix="student") as pool:
        try:
            found = [pool.submit(train, number) for number in range(len(runs))]
            wait(found)
        except BaseException:  # KeyboardInterrupt is one
            turns.stop()
            raise
    return found


def _check(trainings: Sequence[Training]) -> None:
    for what, of in (
        ("store", lambda one: one.selected["store"]),
        ("precision", lambda one: one.options.precision),
    ):
        found = {one.name: of(one) for one in trainings}
        if len(set(found.values())) > 1:
            each = ", ".join(f"{name} {value}" for name, value in found.items())
            raise ConfigError(
                f"--students: found more than one {what} ({each}), expected one for all; train "
                "those of one together, the others apart"
            )


def _walk(training: Training) -> tuple[Any, ...]:
    """What decides in which order a student goes through the segments."""
    return training.options.seed, training.pool_segments, training.parts


def _finish(trainings: Sequence[Training], found: Sequence[Future[None]]) -> None:
    """Say which students are done, and raise the first error."""
    errors = {
        training.name: error
        for training, future in zip(trainings, found, strict=True)
        if (error := future.exception()) is not None
    }
    if not errors:
        return
    done = [training.name for training in trainings if training.name not in errors]
    for name, error in errors.items():
        logger.error("%s was not trained: %s", name, in_short(error))
    logger.info("trained: %s", ", ".join(done) or "none")
    raise next(iter(errors.values()))
