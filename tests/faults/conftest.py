import sys
from collections.abc import Callable

import pytest

from tests.faults.ledger import SESSION, Ledger
from tests.store.fixtures import store, unsynced, whole_store

__all__ = ["store", "unsynced", "whole_store"]


@pytest.fixture
def ledger() -> Ledger:
    """Counts what was injected and what came of it; see `make faults`."""
    return SESSION


@pytest.fixture(scope="session")
def times(request: pytest.FixtureRequest) -> Callable[[int, int], int]:
    """`times(few, many)`: how often to inject, in `make test` and in `make faults`."""
    many = request.config.getoption("--faults") == "many"
    return lambda few, all_of_them: all_of_them if many else few


def pytest_unconfigure(config: pytest.Config) -> None:
    """Print the table after everything else, where faults are what the run is about."""
    if SESSION.counts and config.getoption("--faults") == "many":
        sys.stdout.write("\n" + "\n".join(SESSION.table()) + "\n")
