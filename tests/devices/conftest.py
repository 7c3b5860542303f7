"""Stores of each family, for the pretended GPU and a real one."""

from collections.abc import Callable
from functools import cache

import pytest

from tests.captured import Captured, prepared
from tests.devices.cases import SIGNALS


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> Callable[[str], Captured]:
    """Captured once a family, however the tests are ordered."""

    @cache
    def store(kind: str) -> Captured:
        captured = prepared(tmp_path_factory.mktemp("devices"), kind)
        captured.capture(SIGNALS[kind])
        return captured

    return store


@pytest.fixture(params=SIGNALS)
def store(request, stores) -> tuple[str, Captured]:
    return request.param, stores(request.param)
