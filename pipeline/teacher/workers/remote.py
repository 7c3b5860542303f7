"""A running Dask cluster: reaching it, and refusing what its workers cannot do before they must.

Its workers are processes that somebody else started, perhaps on other machines. They must have this
software, see the store at the same path, and have the device; each is asked, also one that joins
later. The cluster is left as it was found.
"""

import hashlib
import ipaddress
import logging
import re
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from distributed import Client, Worker
from distributed.security import Security

from pipeline.errors import ConfigError, DecantError, IncompatibleError, ResourceError
from pipeline.provenance import software
from pipeline.store.layout import Layout
from pipeline.teacher.workers.cluster import quiet_servers
from pipeline.teacher.workers.schedule import Certificates, Runtime

logger = logging.getLogger(__name__)
ANSWER_SECONDS = 10.0
"""After this nobody answers at an address."""
DISTRIBUTION = "decant-kd"
ADDRESS = re.compile(r"(?P<scheme>tcp|tls)://(?P<host>[^\s/]+):\d{1,5}")
SAME = ("python", "torch", "transformers", "numpy", "numcodecs")
"""Versions that values or pickles depend on."""


def _identity() -> dict[str, str]:
    digest = hashlib.blake2b(digest_size=8)
    package = Path(__file__).parents[1]
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package).as_posix()};".encode() + path.read_bytes())
    found = {name: version for name, version in software().items() if name in SAME}
    # The last number of a Python changes neither values nor pickles.
    found["python"] = ".".join(found["python"].split(".")[:2])
    installed = [one.version for one in metadata.distributions(name=DISTRIBUTION)]
    own = installed[0] if installed else "not installed"
    return {DISTRIBUTION: own, "source of pipeline": digest.hexdigest(), **found}


IDENTITY = _identity()
"""What must be the same in every process of a capture; as it was when the process began, for what
it runs is that, whatever has been installed since."""


@dataclass(frozen=True)
class Demands:
    """What a capture asks of a worker; travels to it as plain values, before any pickle.

    `nonce` is what the file `proof` of the store holds.
    """

    identity: dict[str, str]
    proof: str
    nonce: str
    device: str


def demands(attempt: Path, device: str) -> Demands:
    """Write the file that a worker must see below the directory of an attempt; return it all."""
    nonce, proof = uuid4().hex, attempt.resolve() / "proof"
    proof.write_text(nonce, encoding="ascii")
    return Demands(IDENTITY, str(proof), nonce, device)


def refusal(wanted: Demands, address: str) -> DecantError | None:
    """Return, in a worker, why it cannot take part; None if it can."""
    for name, expected in wanted.identity.items():
        found = IDENTITY.get(name, "none")
        if found != expected:
            return IncompatibleError(
                f"worker {address}: {name} is {found}, expected {expected} as in the capture; "
                "install the same there, start the worker again, then run the same command again"
            )
    try:
        seen = Path(wanted.proof).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        seen = str(error)
    if seen != wanted.nonce:
        store = Path(wanted.proof).parents[2]
        return ConfigError(
            f"worker {address}: does not see what the capture wrote into {store} "
            f"({seen[:120]}); mount the project at the same absolute path on every machine"
        )
    try:
        torch.empty(0, device=wanted.device)
    except (RuntimeError, AssertionError) as error:
        return ConfigError(
            f"worker {address}: no device {wanted.device!r} ({str(error).splitlines()[0]}); start "
            "workers where it is, or set device in runtime.yaml"
        )
    return None


def _answer(wanted: Demands, dask_worker: Worker) -> DecantError | None:
    return refusal(wanted, dask_worker.address)


def refuse_unfit(runtime: Runtime, layout: Layout) -> None:
    """Reach the cluster and ask every worker that is there, before the teacher is loaded.

    For the holder of the store's lock. Warns of a cluster that anybody may send code to.

    Raises:
        ConfigError: If certificates are missing, or a worker does not see the store.
        IncompatibleError: If a worker has another version.
        ResourceError: If nobody answers.
    """
    attempt = layout.attempt(uuid4().hex)
    attempt.mkdir(parents=True)
    wanted = demands(attempt, runtime.device)
    with running_cluster(runtime.scheduler, runtime.tls) as client:
        _warn_if_open(runtime.scheduler)
        answers: Any = client.run(_answer, wanted, on_error="return")
        for address, answer in sorted(answers.items()):
            if isinstance(answer, DecantError):
                raise answer
            if answer is not None:
                raise IncompatibleError(
                    f"worker {address}: cannot run this software "
                    f"({type(answer).__name__}: {' '.join(str(answer).split())[:200]}); install "
                    f"{DISTRIBUTION} {IDENTITY[DISTRIBUTION]} there as it is here, start the "
                    "worker again, then run the same command again"
                )
        logger.info("%s: %d workers; dashboard %s", *_described(runtime.scheduler, answers, client))


def _described(address: str, answers: Any, client: Client) -> tuple[str, int, str]:
    try:
        link = client.dashboard_link
    except KeyError:
        # A scheduler started with --no-dashboard has none to tell of.
        link = None
    return address, len(answers), link or "off"


@contextmanager
def running_cluster(address: str, certificates: Certificates) -> Iterator[Client]:
    """Be a client of a running cluster, whose servers go on afterwards.

    Raises:
        ConfigError: If certificates are missing, or given for an address without encryption.
        ResourceError: If nobody answers.
    """
    security = _security(address, certificates)
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


def _security(address: str, certificates: Certificates) -> Security | None:
    """Return what a client shows and expects, or refuse it before anybody is asked."""
    match = ADDRESS.fullmatch(address)
    if match is None:
        raise ConfigError(
            f"scheduler {address!r}: expected tcp://HOST:PORT or tls://HOST:PORT of a running "
            "cluster; correct it in runtime.yaml"
        )
    given = {f"tls_{one.name}": getattr(certificates, one.name) for one in fields(certificates)}
    missing = [key for key, path in given.items() if path is None]
    if match["scheme"] == "tcp":
        if len(missing) < len(given):
            raise ConfigError(
                f"scheduler {address}: tcp:// uses no certificates, yet "
                f"{', '.join(key for key in given if key not in missing)} is given; write tls://, "
                "or remove it from runtime.yaml"
            )
        return None
    if missing:
        raise ConfigError(
            f"scheduler {address}: {', '.join(missing)} missing, expected paths of PEM files; add "
            "them to runtime.yaml"
        )
    for key, path in given.items():
        if not path.is_file():
            raise ConfigError(f"{key}: {path} is no file; correct it in runtime.yaml")
    security = Security(
        tls_ca_file=str(certificates.ca),
        tls_client_cert=str(certificates.cert),
        tls_client_key=str(certificates.key),
        require_encryption=True,
    )
    try:
        security.get_connection_args("client")
    except ssl.SSLError as error:
        raise ConfigError(
            f"tls_ca {certificates.ca}, tls_cert {certificates.cert}, tls_key {certificates.key}: "
            f"cannot be used ({error.reason or error}); expected PEM files, the key without a "
            "password and that of the certificate"
        ) from error
    return security


def _warn_if_open(address: str) -> None:
    """Say that a task is a pickle: whoever may send one runs code as the workers' user."""
    match = ADDRESS.fullmatch(address)
    if match is None or match["scheme"] == "tls":
        return
    host = match["host"].strip("[]")
    try:
        is_local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_local = host == "localhost"
    if not is_local:
        logger.warning(
            "%s asks nobody who they are: whoever reaches a port of this cluster runs code as its "
            "user; use tls:// on a network that others share",
            address,
        )
