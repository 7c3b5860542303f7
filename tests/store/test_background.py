"""The background writer: bounded, first failure raised, and nobody waits for ever."""

import threading
import time

import pytest

from pipeline.store.background import BackgroundWriter


class BoomError(Exception):
    """What a job raises."""


def fail() -> None:
    raise BoomError("first")


def test_jobs_run_and_are_done_when_the_block_ends():
    done: list[int] = []
    with BackgroundWriter(threads=2, pending=3) as writer:
        for i in range(20):
            writer.submit(lambda i=i: done.append(i))
    assert sorted(done) == list(range(20))


def test_no_more_than_pending_jobs_pile_up():
    gate = threading.Event()
    submitted = []

    def submit_all(writer: BackgroundWriter) -> None:
        for i in range(5):
            writer.submit(gate.wait)
            submitted.append(i)

    with BackgroundWriter(threads=1, pending=2) as writer:
        thread = threading.Thread(target=submit_all, args=(writer,))
        thread.start()
        time.sleep(0.1)
        assert len(submitted) == 2
        gate.set()
        thread.join(5)
    assert len(submitted) == 5


def test_the_first_failure_is_raised_by_the_next_submit_and_nothing_more_runs():
    ran = []

    def block() -> None:
        with BackgroundWriter(threads=1, pending=1) as writer:
            writer.submit(fail)
            for i in range(5):
                writer.submit(lambda i=i: ran.append(i))

    with pytest.raises(BoomError, match="first"):
        block()
    assert ran == []


def test_a_failure_of_the_last_job_is_raised_at_the_end():
    with pytest.raises(BoomError, match="first"), BackgroundWriter() as writer:
        writer.submit(fail)


def test_jobs_behind_a_failure_are_not_begun():
    gate, ran = threading.Event(), []

    def fail_late() -> None:
        gate.wait()
        fail()

    def block() -> None:
        with BackgroundWriter(threads=1, pending=3) as writer:
            writer.submit(fail_late)
            writer.submit(lambda: ran.append(1))
            gate.set()

    with pytest.raises(BoomError, match="first"):
        block()
    assert ran == []


def test_the_error_of_the_block_wins_and_running_jobs_finish():
    done = []
    started = threading.Event()

    def slow() -> None:
        started.set()
        time.sleep(0.05)
        done.append("running")

    def block() -> None:
        with BackgroundWriter(threads=1, pending=3) as writer:
            writer.submit(slow)
            writer.submit(lambda: done.append("waiting"))
            started.wait()
            raise KeyError

    with pytest.raises(KeyError):
        block()
    assert done == ["running"]


def test_who_waits_for_a_slot_is_woken_when_the_block_ends():
    """Tasks of a threaded scheduler may still submit when another task has failed."""
    gate, outcome = threading.Event(), []

    def submit(writer: BackgroundWriter) -> None:
        try:
            writer.submit(lambda: None)
        except RuntimeError as error:
            outcome.append(error)

    def block(writer: BackgroundWriter) -> None:
        with writer:
            writer.submit(gate.wait)
            writer.submit(gate.wait)
            waiter.start()
            time.sleep(0.05)
            threading.Timer(0.1, gate.set).start()
            raise KeyError

    writer = BackgroundWriter(threads=1, pending=2)
    waiter = threading.Thread(target=submit, args=(writer,), daemon=True)
    with pytest.raises(KeyError):
        block(writer)
    waiter.join(5)
    assert not waiter.is_alive()
    assert len(outcome) == 1


def test_as_many_bytes_wait_as_fit_and_a_larger_job_runs_alone():
    gate, submitted = threading.Event(), []

    def submit_all(writer: BackgroundWriter) -> None:
        for size in (3, 4, 5, 20):
            writer.submit(gate.wait, size)
            submitted.append(size)

    with BackgroundWriter(threads=4, most_bytes=8) as writer:
        thread = threading.Thread(target=submit_all, args=(writer,))
        thread.start()
        time.sleep(0.1)
        assert submitted == [3, 4]
        gate.set()
        thread.join(5)
    assert submitted == [3, 4, 5, 20]
