"""Connect to a running Dask cluster, and check its workers before they get segments.

The user started its workers, perhaps on other machines. They must have the same software, see the
store at the same path, and have the device; every worker is checked, also one that joins later. The
cluster keeps running afterwards.
"""

import hashlib
import ipaddress
import logging
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import torch
from distributed import Client, Worker
from distributed.client import ClosedClientError
from distributed.security import Security

from pipeline.errors import ConfigError, DecantError, IncompatibleError, ResourceError
from pipeline.provenance import software
from pipeline.runtime import Runtime
from pipeline.store.layout import Layout
from pipeline.teacher.workers.cluster import quiet_servers

logger = logging.getLogger(__name__)
ANSWER_SECONDS = 10.0
"""Timeout for connecting to a scheduler."""
DISTRIBUTION = "decant-kd"
VERSIONS = ("python", "torch", "transformers", "numpy", "numcodecs")
"""Software whose versions can change values or pickles."""


def _identity() -> dict[str, str]:
    digest = hashlib.blake2b(digest_size=8)
    package = Path(__file__).parents[2]
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package).as_posix()};".encode() + path.read_bytes())
    versions = {name: version for name, version in software().items() if name in VERSIONS}
    # The patch version of Python changes neither values nor pickles.
    versions["python"] = ".".join(versions["python"].split(".")[:2])
    installed = [package.version for package in metadata.distributions(name=DISTRIBUTION)]
    own = installed[0] if installed else "not installed"
    return {DISTRIBUTION: own, "source of pipeline": digest.hexdigest(), **versions}


IDENTITY = _identity()
"""What must be equal in all processes of a capture. It is computed at import, because a process
runs the code it started with, even if another version was installed since."""


@dataclass(frozen=True)
class Requirements:
    """What a capture requires of a cluster's worker; sent as plain values, before any pickle.

    `nonce` is the content of the file `proof` in the store.
    """

    identity: dict[str, str]
    proof: str
    nonce: str
    device: str


def requirements(attempt: Path, device: str) -> Requirements:
    """Write a proof file into an attempt's directory and return the requirements for workers."""
    nonce, proof = uuid4().hex, attempt.resolve() / "proof"
    proof.write_text(nonce, encoding="ascii")
    return Requirements(IDENTITY, str(proof), nonce, device)


def refusal(required: Requirements, address: str) -> DecantError | None:
    """Check in a worker that it meets the requirements; return the error, or None."""
    for name, expected in required.identity.items():
        own = IDENTITY.get(name, "none")
        if own != expected:
            return IncompatibleError(
                f"worker {address}: {name} is {own}, expected {expected} as in the capture; "
                "install the same version there, restart the worker, then run this command again"
            )
    try:
        seen = Path(required.proof).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        seen = str(error)
    if seen != required.nonce:
        store = Path(required.proof).parents[2]
        return ConfigError(
            f"worker {address}: does not see the file that the capture wrote into {store} "
            f"({seen[:120]}); mount the project at the same absolute path on every machine"
        )
    try:
        torch.empty(0, device=required.device)
    except (RuntimeError, AssertionError) as error:
        return ConfigError(
            f"worker {address}: no device {required.device!r} ({str(error).splitlines()[0]}); "
            "start workers on a machine that has it, or set device in runtime.yaml"
        )
    return None


def _check_worker(required: Requirements, dask_worker: Worker) -> DecantError | None:
    return refusal(required, dask_worker.address)


def refuse_unfit(runtime: Runtime, layout: Layout) -> None:
    """Connect to the cluster and check all its workers, before the teacher is loaded.

    The caller holds the store's lock. Warns if the cluster accepts code from anyone.

    Raises:
        ConfigError: If certificates are missing, or a worker does not see the store.
        IncompatibleError: If a worker has another version.
        ResourceError: If the scheduler does not answer.
    """
    attempt = layout.attempt(uuid4().hex)
    attempt.mkdir(parents=True)
    required = requirements(attempt, runtime.torch_device())
    with running_cluster(runtime) as client:
        _warn_if_open(runtime.scheduler)
        with needs_scheduler(runtime.scheduler):
            answers: Any = client.run(_check_worker, required, on_error="return")
        for address, answer in sorted(answers.items()):
            if isinstance(answer, DecantError):
                raise answer
            if answer is not None:
                raise IncompatibleError(
                    f"worker {address}: cannot run this software "
                    f"({type(answer).__name__}: {' '.join(str(answer).split())[:200]}); install "
                    f"{DISTRIBUTION} {IDENTITY[DISTRIBUTION]} there as it is here, restart the "
                    "worker, then run the same command again"
                )
        logger.info("%s: %d workers; dashboard %s", *_described(runtime.scheduler, answers, client))


def _described(address: str, answers: Any, client: Client) -> tuple[str, int, str]:
    try:
        link = client.dashboard_link
    except KeyError:
        # The scheduler was started with --no-dashboard.
        link = None
    return address, len(answers), link or "off"


@contextmanager
def running_cluster(runtime: Runtime) -> Iterator[Client]:
    """Connect to a running cluster, which keeps running afterwards.

    Raises:
        ConfigError: If certificates are missing, or given for an address without encryption.
        ResourceError: If the scheduler does not answer.
    """
    address, security = runtime.scheduler, _security(runtime)
    with quiet_servers():
        try:
            client = Client(
                address,
                timeout=ANSWER_SECONDS,
                security=security,
                set_as_default=False,
                name="decant",
            )
        except (OSError, TimeoutError) as error:
            raise ResourceError(
                f"scheduler {address}: no answer within {ANSWER_SECONDS:.0f} s "
                f"({' '.join(str(error).split())[:200] or type(error).__name__}); expected a "
                "running `dask scheduler`: start it, or correct scheduler in runtime.yaml"
            ) from error
        with client, client.as_current():
            yield client


@contextmanager
def needs_scheduler(address: str) -> Iterator[None]:
    """Raise a ResourceError if the scheduler cannot be reached in this block."""
    try:
        yield
    except (OSError, ClosedClientError) as error:
        raise scheduler_gone(address) from error


def scheduler_gone(address: str) -> ResourceError:
    """Return the error about a scheduler that was lost after the first connection."""
    return ResourceError(
        f"scheduler {address}: is gone, or someone cancelled the tasks of this capture; check that "
        "it runs, then run the same command again: finished segments are kept"
    )


def _security(runtime: Runtime) -> Security | None:
    """Return the TLS settings of a client, or refuse an invalid address or certificates."""
    address = runtime.scheduler
    given = {"tls_ca": runtime.tls_ca, "tls_cert": runtime.tls_cert, "tls_key": runtime.tls_key}
    missing = [key for key, path in given.items() if path is None]
    if address.startswith("tcp://"):
        if len(missing) < len(given):
            raise ConfigError(
                f"scheduler {address}: tcp:// uses no certificates, but "
                f"{', '.join(key for key in given if key not in missing)} is given; use tls://, "
                "or remove it from runtime.yaml"
            )
        return None
    if missing:
        raise ConfigError(
            f"scheduler {address}: {', '.join(missing)} missing, expected paths of PEM files; add "
            "them to runtime.yaml"
        )
    for key, path in given.items():
        if path is None or not path.is_file():
            raise ConfigError(f"{key}: {path} is not a file; correct it in runtime.yaml")
    security = Security(
        tls_ca_file=str(runtime.tls_ca),
        tls_client_cert=str(runtime.tls_cert),
        tls_client_key=str(runtime.tls_key),
        require_encryption=True,
    )
    try:
        security.get_connection_args("client")
    except ssl.SSLError as error:
        raise ConfigError(
            f"tls_ca {runtime.tls_ca}, tls_cert {runtime.tls_cert}, tls_key {runtime.tls_key}: "
            f"cannot be used ({error.reason or error}); expected PEM files, with the key of the "
            "certificate and without a password"
        ) from error
    return security


def _warn_if_open(address: str) -> None:
    """Warn about an open cluster: tasks are pickles, so their sender runs code as its user."""
    if address.startswith("tls://"):
        return
    host = urlsplit(address).hostname or ""
    try:
        is_local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_local = host == "localhost"
    if not is_local:
        logger.warning(
            "%s has no authentication: anyone who reaches a port of this cluster can run code as "
            "its user; use tls:// on a shared network",
            address,
        )
