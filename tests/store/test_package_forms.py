"""A form of another package is captured and read; a store names the package that it needs."""

import pytest

from pipeline.errors import IncompatibleError
from pipeline.registry import Origin
from pipeline.store.forms.registry import FORMS, build_form, forms_of, identity, origin_of
from pipeline.store.reader import StoreReader
from pipeline.store.signals import Signal
from pipeline.store.upkeep.unneeded import unneeded
from tests.installed import install_package
from tests.store import synthetic
from tests.store.synthetic import Synthetic, channels, values

CODE = """
from dataclasses import dataclass
from typing import ClassVar

from pipeline.store.forms.float16 import Float16


@dataclass(frozen=True)
class Plain(Float16):
    digits: int = 3

    name: ClassVar[str] = "plain"
    rank: ClassVar[int] = 11
"""


@pytest.fixture
def install(monkeypatch, tmp_path):
    def forget() -> None:
        vars(FORMS).pop("_theirs", None)
        FORMS._loaded.clear()

    def run(version: str) -> None:
        site = tmp_path / version
        site.mkdir()
        install_package(
            monkeypatch,
            site,
            name="decant-plain",
            code=CODE,
            entries={"decant.forms": {"hidden.plain": "decant_plain:Plain"}},
            version=version,
        )
        forget()

    yield run, forget
    monkeypatch.undo()
    forget()


@pytest.fixture
def store(install, monkeypatch, tmp_path):
    install[0]("1.2")
    signal = Signal(build_form("hidden", "plain", {}), 2)
    monkeypatch.setattr(synthetic, "SIGNALS", {signal.name: signal})
    return Synthetic(tmp_path / "store").run((signal.name,)), signal


def test_its_package_is_part_of_what_it_is(store):
    path, signal = store
    assert origin_of(signal.form) == Origin(package="decant-plain", version="1.2")
    reader = StoreReader(path)
    declared = reader.signal(signal.name).declaration
    assert declared.to_json()["origin"] == {"package": "decant-plain", "version": "1.2"}
    assert "origin" not in declared.to_json()["options"]
    read = reader.read_segment(0, [signal.name]).features[signal.name]
    decoded = declared.form.decode(read, channels(signal))["hidden"]
    true = values(signal, 0)["hidden"]
    assert abs(decoded[: len(true)] - true).max() < 0.01
    assert list(forms_of("hidden"))[:2] == ["float16", "plain"]


def test_a_store_names_the_package_that_is_missing(store, install, monkeypatch):
    path, signal = store
    monkeypatch.undo()
    install[1]()
    with pytest.raises(
        IncompatibleError,
        match=r"the package decant-plain is not installed, expected version 1\.2; pip install",
    ):
        StoreReader(path).signal(signal.name)


def test_unneeded_stores_are_found_next_to_one_whose_package_is_missing(
    store, install, monkeypatch, caplog
):
    path, _ = store
    monkeypatch.undo()
    install[1]()
    assert unneeded(path.parent, {path.name: set()}) == []
    assert "the package decant-plain is not installed" in caplog.text


def test_another_version_of_the_package_is_another_form(store, install, monkeypatch):
    path, signal = store
    monkeypatch.undo()
    install[0]("1.3")
    assert identity(build_form("hidden", "plain", {})) != signal.name.rpartition("/")[2]
    with pytest.raises(
        IncompatibleError,
        match=r"written by that of decant-plain 1\.2, found that of decant-plain 1\.3; pip install",
    ):
        StoreReader(path).signal(signal.name)
