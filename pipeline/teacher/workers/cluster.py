"""Start worker processes on this machine that accept only this process and end with it."""

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
"""A level above all messages."""
TRACKER = "ignore:resource_tracker"
"""Warning filter: Python's resource tracker warns when it cleans up after a killed process."""

PAGES = ("distributed.http.statics", "distributed.http.scheduler.info")
"""HTTP routes that a dashboard's pages need: styles, and links to the workers."""

SETTINGS = {
    # A forked worker already has torch imported, so a dead one is replaced quickly. The fork server
    # has neither threads nor CUDA, unlike this process.
    "distributed.worker.multiprocessing-method": "forkserver",
    # We count deaths ourselves: Dask also counts them for segments that only waited in the worker.
    "distributed.scheduler.allowed-failures": 0,
    "distributed.scheduler.no-workers-timeout": "2 minutes",
    # A dead process is noticed by its connection. A silent one may be running a slow teacher.
    "distributed.scheduler.worker-ttl": None,
    # Workers hold no Dask data, so of the memory limits only termination makes sense.
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.profile.enabled": False,
    "distributed.diagnostics.nvml": False,
    # The workers' HTTP servers do not check certificates, so they serve nothing.
    "distributed.worker.http.routes": [],
    # These variables would be set in this process.
    "distributed.nanny.pre-spawn-environ": {},
}


@contextmanager
def quiet_servers() -> Iterator[None]:
    """Silence Dask's servers: the user gets one line about a dead worker from us."""
    loggers = [
        logging.getLogger(name)
        for name in logging.root.manager.loggerDict
        if name.partition(".")[0] in NOISY
    ]
    levels = [noisy.level for noisy in loggers]
    for noisy in loggers:
        noisy.setLevel(QUIET)
    try:
        yield
    finally:
        for noisy, level in zip(loggers, levels, strict=True):
            noisy.setLevel(level)


@contextmanager
def local_workers(
    count: int, megabytes: int, directory: Path, *, preload: str, dashboard: str = ""
) -> Iterator[Client]:
    """Run single-threaded worker processes that accept only this process.

    They listen on loopback. A task is a pickle, so anyone who can send one runs code as this user;
    temporary certificates keep out other users of the machine. Workers end when this process ends,
    in whatever way.

    Args:
        count: Number of workers.
        megabytes: Memory in MiB at which a worker is terminated; 0 for no limit.
        directory: Directory for Dask's own files.
        preload: Module with their tasks, imported once in the fork server.
        dashboard: Address of Dask's dashboard, readable by anyone who reaches it; empty for none.

    Raises:
        ConfigError: If a dashboard is requested and bokeh is not installed.
        ResourceError: If the workers do not start.
    """
    if dashboard and find_spec("bokeh") is None:
        raise ConfigError(
            "dashboard: needs bokeh, which is not installed; install it, or set dashboard: false"
        )
    settings = {
        **SETTINGS,
        "temporary-directory": str(directory.resolve() / "dask"),
        # The scheduler serves only the routes that the dashboard needs.
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
            # By default it would listen on port 8787, and serve a dashboard if bokeh is installed.
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
    """Kill the workers after an error: closing would wait for busy ones, whose results are lost."""
    if kind is None:
        return
    for nanny in cluster.workers.values():
        nanny.close_gracefully()
        if nanny.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(nanny.pid, signal.SIGKILL)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay Ctrl-C to the end of the block, because a half-started cluster cannot be closed."""
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

    It and its forks ignore Ctrl-C, which a terminal sends to all processes; only this process
    handles it.
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
    """Add a warning filter to the environment of processes that the block starts."""
    before = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = f"{before},{warning}" if before else warning
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONWARNINGS"]
        else:
            os.environ["PYTHONWARNINGS"] = before
