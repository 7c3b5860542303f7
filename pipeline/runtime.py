"""How this machine runs the stages: its devices, workers, threads and memory."""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from pipeline.errors import ConfigError
from pipeline.section import Section

SCHEDULERS = ("synchronous", "threads", "processes")
LOOPBACK = "127.0.0.1:0"

Places = dict[str, int | str]
Few = Annotated[int, Field(ge=0, le=2**16)]
"""A number of threads or processes; C libraries refuse large ones."""
Bytes = Annotated[int, Field(ge=0)] | Annotated[str, Field(pattern=r"^\d+(\.\d+)?[KMGT]i?B$")]
"""A number of bytes in a format of accelerate."""


def _known_scheduler(value: str) -> str:
    if value in SCHEDULERS or re.fullmatch(r"(tcp|tls)://[^\s/]+:\d{1,5}", value):
        return value
    raise ValueError(
        f"found {value!r}, expected {', '.join(SCHEDULERS)}, or tcp://HOST:PORT or tls://HOST:PORT "
        "of a running cluster"
    )


def _listed(value: Any) -> Any:
    """Read `a,b` as a list of two: environment variables have no other lists."""
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    return tuple(value) if isinstance(value, list) else value


class Runtime(Section):
    """How this machine runs stages: `runtime.yaml` (not in git) or `DECANT_*` variables.

    None of it changes a result except `processes`, which multiplies the batch size. For captures by
    `processes` and clusters this holds as far as torch gives the same results with another number
    of threads.

    Attributes:
        device: A torch device; `auto` takes CUDA where there is one.
        device_map: How a teacher is spread if one device does not hold it: `auto`, `balanced`,
            `balanced_low_0`, `sequential`, or a device, `cpu` or `disk` for every module.
        max_memory: Memory that it may use, such as `20GiB`, by device number or `cpu`.
        offload_directory: Where weights on disk go; by default `data/work/offload`.
        scheduler: Dask's for capture: `synchronous`, `threads`, `processes` (workers that may die),
            or the address of a running cluster, `tcp://host:port` or `tls://host:port`.
        tls_ca: Certificate (PEM) of the authority of a `tls://` cluster.
        tls_cert: This machine's certificate for that cluster.
        tls_key: The key of that certificate, without a password.
        dashboard: Whether `processes` serve Dask's dashboard on loopback, or its address.
        workers: Segments captured at once by `threads` or `processes`; 0: one a GPU, else 2.
        worker_megabytes: Memory at which a worker process is killed; 0 sets no limit.
        writers: Threads that compress and write shards, in each process; 0: one beside a teacher on
            the CPU, all cores but one beside a GPU, at most 8.
        threads: Threads of torch in each process; 0 leaves torch's default.
        micro_batch_size: Examples of a student's batch that run at once; 0: all; `auto`: the most
            that fit, found before the first step.
        processes: Processes that train one student, each with its own batch.
        report_to: Services that receive each logged step, by the names of `transformers.Trainer`.
    """

    device: str = "auto"
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | Places | None = None
    max_memory: dict[str, Bytes] | None = None
    offload_directory: Path | None = None
    scheduler: Annotated[str, AfterValidator(_known_scheduler)] = "synchronous"
    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    dashboard: bool | str = False
    workers: Few = 0
    worker_megabytes: Annotated[int, Field(ge=0, le=2**32)] = 0
    writers: Few = 0
    threads: Few = 0
    micro_batch_size: Annotated[int, Field(ge=0, le=2**32)] | Literal["auto"] = 0
    processes: Annotated[Few, Field(ge=1)] = 1
    report_to: Annotated[tuple[str, ...], BeforeValidator(_listed)] = ()

    @property
    def is_cluster(self) -> bool:
        """Whether the scheduler is a running cluster."""
        return "://" in self.scheduler

    @property
    def dashboard_address(self) -> str:
        """Address of the dashboard of `processes`; empty for no dashboard."""
        if isinstance(self.dashboard, str):
            return self.dashboard
        return LOOPBACK if self.dashboard else ""

    def torch_device(self) -> str:
        """Return the device that `device` names, the same at every call.

        Raises:
            ConfigError: If there is no such device.
        """
        import torch

        if self.device == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        tested = self.device
        if tested == "cuda":
            # Several processes would otherwise all begin on the first GPU.
            rank = int(os.environ.get("LOCAL_RANK", "0"))
            tested = f"cuda:{rank % max(1, torch.cuda.device_count())}"
        try:
            torch.empty(0, device=tested)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"runtime device {self.device!r}: {reason}; use cpu or auto"
            ) from error
        return self.device


def gpu_names() -> tuple[str, ...]:
    """Return the GPUs that this process sees, as `CUDA_VISIBLE_DEVICES` names them."""
    import torch

    # The variable may hold numbers or UUIDs, and more of them than there are GPUs.
    listed = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    count = torch.cuda.device_count()
    return tuple(([name for name in listed if name] or [str(n) for n in range(count)])[:count])
