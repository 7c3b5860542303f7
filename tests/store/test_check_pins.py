"""A reader notices that what it is pinned to was rewritten, by one look at the index's file."""

import shutil

import pytest

from pipeline.errors import IncompatibleError, IntegrityError
from pipeline.store import reader as module
from pipeline.store.index import index_asset, index_signal, withdraw
from pipeline.store.layout import Layout
from pipeline.store.reader import StoreReader
from tests.store.synthetic import name_of

NAME, OTHER = name_of("hidden", 2, "int8"), name_of("hidden", 1, "float16")

pytestmark = pytest.mark.usefixtures("unsynced")


@pytest.fixture
def reader(store):
    return StoreReader(store, {NAME: StoreReader(store).signal(NAME).digest})


def test_an_index_that_is_the_same_file_is_not_read_again(reader, store, monkeypatch):
    with monkeypatch.context() as patch:
        patch.delattr(module, "read_index")
        reader.check_pins()
    index_asset(Layout(store), "other", {"file": "other", "bytes": 1, "xxh3": 1})
    # Another index with the same pins: read once, then known.
    reader.check_pins()
    monkeypatch.delattr(module, "read_index")
    reader.check_pins()


def test_other_signals_may_come_and_go(reader, store):
    withdraw(Layout(store), OTHER)
    reader.check_pins()
    StoreReader(store).check_pins()


def test_another_digest_is_named_with_both(reader, store):
    digest = reader.pins[NAME]
    index_signal(Layout(store), NAME, "0" * 64)
    message = rf"{NAME} has digest 0{{16}} now, expected {digest[:16]}: .*; run the select stage"
    for _ in range(2):
        with pytest.raises(IncompatibleError, match=message):
            reader.check_pins()


def test_what_was_withdrawn_and_is_back_equal_is_fine(reader, store):
    withdraw(Layout(store), NAME)
    with pytest.raises(IncompatibleError, match=rf"{NAME} was withdrawn, expected .*; run the cap"):
        reader.check_pins()
    shutil.copyfile(Layout(store).declaration(NAME), Layout(store).manifest(NAME))
    index_signal(Layout(store), NAME, reader.pins[NAME])
    reader.check_pins()


def test_a_removed_store_and_an_altered_index_are_integrity_errors(reader, store):
    Layout(store).index.write_bytes(b"{}")
    with pytest.raises(IntegrityError, match=r"manifest\.json"):
        reader.check_pins()
    shutil.rmtree(store)
    with pytest.raises(IntegrityError, match="the store was removed while it was read"):
        reader.check_pins()
