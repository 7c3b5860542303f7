"""What holds in every test: no network, one thread, the same examples from hypothesis each time."""

import gc
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).parents[1]
LOOPBACK = ("127.0.0.1", "::1", "localhost")

# No deadline: the first call of a test pays for imports and for shape checks.
settings.register_profile("tests", deadline=None, derandomize=True, max_examples=50)
settings.register_profile("thorough", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "tests"))


_connect = socket.socket.connect


def _connect_on_this_machine(self: socket.socket, address: Any) -> None:
    if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in LOOPBACK:
        raise RuntimeError(f"a test connects to {address[0]}; tests stay on this machine")
    _connect(self, address)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--faults",
        choices=("few", "many"),
        default="few",
        help="How often faults are injected: `few` for every day, `many` for `make faults`.",
    )


def pytest_collection_finish() -> None:
    """What is imported by now stays: every training collects garbage, in all that is not frozen."""
    gc.collect()
    gc.freeze()


def pytest_configure() -> None:
    """Before any test module is imported: libraries look for nothing outside this machine."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Sums in another order round differently; the number of threads decides the order. The first
    # is for processes that tests start, the second for this one, where torch is there by now.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _stay_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "connect", _connect_on_this_machine)


@pytest.fixture(autouse=True)
def _begin_at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever directory a test enters, the next one begins in this."""
    monkeypatch.chdir(ROOT)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The variable runs them on another device, which shows that the tests work.
    if torch.cuda.is_available() or "DECANT_TEST_DEVICE" in os.environ:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder with real data beside the checkout; skip where there is none."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip(f"no real data at {path}")
    return path
