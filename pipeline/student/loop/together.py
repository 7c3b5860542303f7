"""Trains several students in one process: each segment is read and decoded once for all of them.

The training of each student is a generator of steps, and the students take turns between steps.
Each has its own random state, so its weights equal, bit for bit, those of a separate run. The next
turn goes to the student with the least progress: students of one seed use the same segments at the
same time, whatever their batch sizes.
"""

import logging
from collections.abc import Generator, Sequence
from traceback import clear_frames
from typing import Any

from pipeline.errors import ConfigError, Interrupted, in_short
from pipeline.store.reader import StoreReader
from pipeline.student.data.reads import SegmentReads
from pipeline.student.data.stream import POOLS
from pipeline.student.loop.random_state import RandomState
from pipeline.student.loop.steps import StudentLoop
from pipeline.student.loop.train import StudentRun
from pipeline.student.loop.training import Training
from pipeline.training.interrupts import INTERRUPTS

logger = logging.getLogger(__name__)
RUN_EACH = ("tensorboard", "dvclive")
"""Reporters that can keep several runs in one process."""


def take_turns(
    walks: Sequence[Generator[float, None, None]], states: Sequence[RandomState]
) -> list[BaseException | None]:
    """Run all walks to their end, and return the error of each that has failed.

    A `KeyboardInterrupt` ends who runs, and then all others where they are; `Interrupted` ends one
    that has saved its state, and the others go on to save theirs.

    Args:
        walks: Each yields now and then how far it is; the next turn is for who is least far, the
            first of several.
        states: Each one's random state when it begins.
    """
    errors: list[BaseException | None] = [None] * len(walks)
    random = list(states)
    far = dict.fromkeys(range(len(walks)), 0.0)
    try:
        while far:
            number = min(far, key=lambda number: (far[number], number))
            random[number].restore()
            try:
                far[number] = next(walks[number])
            except StopIteration:
                del far[number]
            except (Exception, Interrupted) as error:  # noqa: BLE001 (raised when all are done)
                del far[number]
                errors[number] = error
                # Its frames hold a batch and a graph, for which the others may want the room.
                for one in (error, error.__cause__):
                    if one is not None:
                        clear_frames(one.__traceback__)
            random[number] = RandomState.now()
    finally:
        for walk in walks:
            walk.close()
    return errors


def train_together(trainings: Sequence[Training]) -> None:
    """Train students of one store in turns and export each as `train_student` does.

    All of them are in memory at the same time. If one fails, the others continue. A damaged signal
    fails all students, also those that do not use it, because they read together.

    Raises:
        ConfigError: If their stores or precisions differ, several processes train, or they report
            to what has one run for a process.
        DecantError: The error of the first student that failed, when all others are done.
        Interrupted: If a signal came; every student has written a checkpoint.
    """
    _check(trainings)
    _check_reporters(trainings)
    first = trainings[0]
    walk_alike = len({_order(one) for one in trainings}) == 1
    if not walk_alike:
        logger.info("their seed, pool_segments or parts differ: segments are not read once for all")
    pins = {name: pin for one in trainings for name, pin in one.selected["signals"].items()}
    # A student may release at most one pool that another still needs; segments that it reads ahead
    # of the others are kept meanwhile.
    shared = {"users": len(trainings), "most_kept": 2 * POOLS * first.student.pool_segments}
    reads = SegmentReads(StoreReader(first.store, pins), list(pins), **shared if walk_alike else {})
    try:
        # Around all students: one that has not begun must stop, too.
        with INTERRUPTS.heeded():
            found = take_turns(*_walks(trainings, reads))
        _finish(trainings, found)
    finally:
        reads.close()


def _walks(
    trainings: Sequence[Training], reads: SegmentReads
) -> tuple[list[Generator[float, None, None]], list[RandomState]]:
    """Build all students before any trains: they share what `accelerate` knows of this process."""
    runs = [StudentRun(training, reads) for training in trainings]
    if runs[0].ranks > 1:
        raise ConfigError(
            f"--students: found {runs[0].ranks} processes, expected one, in which students take "
            "turns; set processes to 1, or train one student at a time"
        )
    held = sum(run.held_bytes for run in runs)
    walks: list[Generator[float, None, None]] = []
    states: list[RandomState] = []
    for run in runs:
        walks.append(_walk(run, run.loop(held_bytes=held), reads))
        # A loop sets the seed when it is made, and alone it would go on from there.
        states.append(RandomState.now())
    return walks, states


def _walk(run: StudentRun, loop: StudentLoop, reads: SegmentReads) -> Generator[float, None, None]:
    try:
        yield from run.train(loop)
    finally:
        reads.leave()


def _check(trainings: Sequence[Training]) -> None:
    for what, of in (
        ("store", lambda one: one.selected["store"]),
        ("precision", lambda one: one.student.train.precision),
    ):
        found = {one.name: of(one) for one in trainings}
        if len(set(found.values())) > 1:
            each = ", ".join(f"{name} {value}" for name, value in found.items())
            raise ConfigError(
                f"--students: found more than one {what} ({each}), expected one for all; train "
                "those of one together, the others apart"
            )


def _check_reporters(trainings: Sequence[Training]) -> None:
    found = {name for one in trainings for name in one.runtime.report_to} - set(RUN_EACH)
    if found:
        raise ConfigError(
            f"--students: found report_to {', '.join(sorted(found))}, which has one run for a "
            f"process, expected {' or '.join(RUN_EACH)}; change runtime.yaml, or train one student "
            "at a time"
        )


def _order(training: Training) -> tuple[Any, ...]:
    """What decides in which order a student goes through the segments."""
    student = training.student
    return student.train.seed, student.pool_segments, student.parts


def _finish(trainings: Sequence[Training], found: Sequence[BaseException | None]) -> None:
    """Say which students are done, and raise the first error."""
    errors = {
        training.name: error
        for training, error in zip(trainings, found, strict=True)
        if error is not None
    }
    if not errors:
        return
    done = [training.name for training in trainings if training.name not in errors]
    for name, error in errors.items():
        logger.error("%s was not trained: %s", name, in_short(error))
    logger.info("trained: %s", ", ".join(done) or "none")
    raise next(iter(errors.values()))
