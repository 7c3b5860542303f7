"""Worker processes on this machine, that only this process can talk to and that end with it."""

import logging
import multiprocessing.forkserver
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import dask.config
from distributed import Client, LocalCluster
from distributed.security import Security

from pipeline.errors import ConfigError, ResourceError

logger = logging.getLogger(__name__)
NOISY = ("asyncio", "distributed", "tornado")
QUIET = logging.CRITICAL + 1
TRACKER = "ignore:resource_tracker"
"""Python's tracker of semaphores removes what a killed process leaves, and would warn of it."""

PAGES = ("distributed.http.statics", "distributed.http.scheduler.info")
"""What the pages of a dashboard ask for: styles, and the links to the workers."""

SETTINGS = {
    # A forked worker has torch imported already, so one that died is replaced in a moment. The
    # server that forks has neither threads nor CUDA, unlike this process.
    "distributed.worker.multiprocessing-method": "forkserver",
    # Deaths are counted here: Dask counts them for segments that only waited for the dead worker.
    "distributed.scheduler.allowed-failures": 0,
    "distributed.scheduler.no-workers-timeout": "2 minutes",
    # An ended process is noticed by its connection. Silence is no sign: a teacher may take long.
    "distributed.scheduler.worker-ttl": None,
    # A worker keeps nothing of Dask's: of the memory limit only the end of the worker makes sense.
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.profile.enabled": False,
    "distributed.diagnostics.nvml": False,
    # Of the workers' servers for a dashboard nothing is left to ask: they know no certificates.
    "distributed.worker.http.routes": [],
    # They would be set for this process.
    "distributed.nanny.pre-spawn-environ": {},
}


@contextmanager
def quiet_servers() -> Iterator[None]:
    """Silence Dask's servers: what they say of a death, a user learns in one line."""
    loggers = [
        logging.getLogger(name)
        for name in logging.root.manager.loggerDict
        if name.partition(".")[0] in NOISY
    ]
    levels = [one.level for one in loggers]
    for one in loggers:
        one.setLevel(QUIET)
    try:
        yield
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)


@contextmanager
def local_workers(
    count: int, megabytes: int, directory: Path, *, preload: str, dashboard: str = ""
) -> Iterator[Client]:
    """Run worker processes of one thread each, that only this process can talk to.

    They listen on loopback. A task is a pickle, so whoever may send one runs code as this user:
    certificates that live as long as the cluster keep out the machine's other users. Workers end
    when this process does, however it ends.

    Args:
        count: How many.
        megabytes: Memory at which one is ended; 0 for no limit.
        directory: For Dask's own files.
        preload: The module that holds their tasks, imported once and forked with each.
        dashboard: Where Dask's dashboard listens, for anybody there to read; empty for nowhere.

    Raises:
        ConfigError: If a dashboard is asked for and bokeh is not installed.
        ResourceError: If they do not start.
    """
    if dashboard and find_spec("bokeh") is None:
        raise ConfigError(
            "dashboard: needs bokeh, which is not installed; install it, or set dashboard: false"
        )
    settings = {
        **SETTINGS,
        "temporary-directory": str(directory.resolve() / "dask"),
        # Nothing is left to ask of the scheduler's own pages; those of the dashboard stay.
        "distributed.scheduler.http.routes": list(PAGES) if dashboard else [],
    }
    with quiet_servers(), dask.config.set(settings):
        start_fork_server(preload)
        with ExitStack() as stack:
            with uninterrupted():
                cluster = stack.enter_context(_cluster(count, megabytes, dashboard))
                client = stack.enter_context(Client(cluster))
                stack.push(partial(_kill_if_failed, cluster))
            if dashboard:
                logger.info("dashboard %s", client.dashboard_link)
            yield client


def _cluster(count: int, megabytes: int, dashboard: str) -> Any:
    try:
        return LocalCluster(
            n_workers=count,
            threads_per_worker=1,
            host="127.0.0.1",
            # Without an address it would listen on 8787; and with bokeh it would show itself.
            dashboard_address=dashboard or "127.0.0.1:0",
            scheduler_kwargs={"dashboard": bool(dashboard)},
            worker_dashboard_address="127.0.0.1:0",
            security=Security.temporary(),
            memory_limit=megabytes * 2**20,
            silence_logs=QUIET,
        )
    except (OSError, RuntimeError, TimeoutError) as error:
        raise ResourceError(
            f"{count} worker processes do not start ({' '.join(str(error).split())}); free memory, "
            "use fewer workers or scheduler: synchronous, then run the same command again"
        ) from error


def _kill_if_failed(cluster: Any, kind: object, *_: object) -> None:
    """End the workers at once: asked to close, a busy one is waited for, and nobody wants it."""
    if kind is None:
        return
    for nanny in cluster.workers.values():
        nanny.close_gracefully()
        if nanny.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(nanny.pid, signal.SIGKILL)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Answer Ctrl-C at the end of the block: half a cluster cannot be closed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupts: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if interrupts:
        raise KeyboardInterrupt


def start_fork_server(preload: str) -> None:
    """Start the process that workers are forked from, with the module `preload` imported.

    It and all it forks are deaf to Ctrl-C, which reaches every process of a terminal: this process
    alone answers it.
    """
    multiprocessing.forkserver.set_forkserver_preload([preload])
    with _children_ignore(TRACKER):
        if threading.current_thread() is not threading.main_thread():
            multiprocessing.forkserver.ensure_running()
            return
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            multiprocessing.forkserver.ensure_running()
        finally:
            signal.signal(signal.SIGINT, before)


@contextmanager
def _children_ignore(warning: str) -> Iterator[None]:
    """Add a filter of warnings to those of the processes that the block starts."""
    before = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = f"{before},{warning}" if before else warning
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONWARNINGS"]
        else:
            os.environ["PYTHONWARNINGS"] = before
