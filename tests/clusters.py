"""Dask clusters to be a guest of: in this process, or started by Dask's own command lines."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from distributed import LocalCluster
from distributed.security import Security

from pipeline.teacher.workers.cluster import quiet_servers
from tests.docs.pages import ROOT

NOWHERE = "127.0.0.1:0"
PATIENCE_SECONDS = 60.0


def until(happened: Callable[[], object], seconds: float = PATIENCE_SECONDS) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


@contextmanager
def cluster_within(workers: int = 2, threads: int = 1) -> Iterator[LocalCluster]:
    """A cluster of threads of this process that is reached by its address, as any other."""
    with (
        quiet_servers(),
        LocalCluster(
            n_workers=workers,
            processes=False,
            threads_per_worker=threads,
            protocol="tcp://",
            host="127.0.0.1",
            dashboard_address=NOWHERE,
            worker_dashboard_address=NOWHERE,
            scheduler_kwargs={"dashboard": False},
        ) as cluster,
    ):
        yield cluster


def certificates(directory: Path) -> dict[str, Path]:
    """Write a certificate that vouches for itself; who has it is a member."""
    directory.mkdir(parents=True, exist_ok=True)
    made = Security.temporary()
    texts = {"ca": made.tls_ca_file, "cert": made.tls_client_cert, "key": made.tls_client_key}
    for name, text in texts.items():
        (directory / f"{name}.pem").write_text(text)
    return {f"tls_{name}": directory / f"{name}.pem" for name in texts}


@dataclass
class Servers:
    """A scheduler and workers, each a process with its command line."""

    directory: Path
    certificates: Mapping[str, Path] | None = None
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def address(self) -> str:
        """Where the scheduler listens; waits until it does."""
        record = self.directory / "scheduler.json"

        def is_there() -> bool:
            return record.exists() and record.read_text().endswith("}")

        until(is_there)
        return json.loads(record.read_text())["address"]

    def _tls(self) -> list[str]:
        if self.certificates is None:
            return []
        flags = {"tls_ca": "ca-file", "tls_cert": "cert", "tls_key": "key"}
        return [f"--tls-{flags[name]}={path}" for name, path in self.certificates.items()]

    def start(self, module: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Start one server; its working directory is not the project's."""
        self.directory.mkdir(parents=True, exist_ok=True)
        common = ["--host=127.0.0.1", f"--dashboard-address={NOWHERE}", "--no-dashboard"]
        log = (self.directory / f"{len(self.processes)}.log").open("wb")
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments, *common, *self._tls()],
            cwd=self.directory,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=log,
            stderr=log,
        )
        log.close()
        self.processes.append(process)
        return process

    def start_scheduler(self) -> None:
        protocol = "tcp" if self.certificates is None else "tls"
        record = self.directory / "scheduler.json"
        options = ["--port=0", f"--protocol={protocol}://", f"--scheduler-file={record}"]
        self.start("distributed.cli.dask_scheduler", *options)

    def start_worker(self, *preload: str) -> subprocess.Popen[bytes]:
        """Start a worker that nobody replaces; what it loads first may keep it from joining."""
        loads = ["pipeline.teacher.workers.worker", *preload]
        options = [f"--preload={name}" for name in loads]
        record = f"--scheduler-file={self.directory / 'scheduler.json'}"
        # The scheduler may still be starting.
        place = f"--local-directory={self.directory / 'scratch'}"
        return self.start(
            "distributed.cli.dask_worker",
            *(record, "--no-nanny", "--nthreads=1", "--death-timeout=60", place, *options),
        )

    def end(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()

    def log(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.directory.glob("*.log")))


@contextmanager
def servers(
    directory: Path,
    *,
    tls: Mapping[str, Path] | None = None,
    workers: Sequence[str | None] = (None,),
) -> Iterator[Servers]:
    """Start a scheduler and workers; a worker's entry is a file to preload, if any."""
    found = Servers(directory, tls)
    try:
        found.start_scheduler()
        for preload in workers:
            found.start_worker(*([preload] if preload else []))
        yield found
    finally:
        found.end()
