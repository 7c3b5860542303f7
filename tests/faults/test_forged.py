"""Records that contradict each other, every one with a good seal: the contradiction is found."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import IncompatibleError, IntegrityError
from pipeline.store.layout import Layout
from pipeline.store.reader import StoreReader
from pipeline.store.records import Declaration
from pipeline.store.shards import bytes_digest
from tests.faults.damage import (
    HIDDEN,
    QUERY_KEY,
    Damage,
    flip,
    forge_column,
    forge_index,
    forge_manifest,
    outcome,
    read_everything,
    seal_again,
    swap,
)
from tests.store.synthetic import Synthetic


def plan_alone(store: Path) -> None:
    seal_again(Layout(store).plan, lambda plan: plan.update(pad_id=7))


def manifest_alone(store: Path) -> None:
    seal_again(Layout(store).manifest(HIDDEN), lambda manifest: manifest["receipts"].reverse())


def digest_in_the_index(store: Path) -> None:
    forge_index(store, lambda index: index["signals"][HIDDEN].update(digest="0" * 64))


def swapped_manifests(store: Path) -> None:
    """Both whole, and the index with them: query and key of one layer for another's."""

    def change(index: dict[str, Any]) -> None:
        signals = index["signals"]
        one, other = QUERY_KEY
        signals[one], signals[other] = signals[other], signals[one]

    swap(*(Layout(store).manifest(name) for name in QUERY_KEY))
    forge_index(store, change)


def features_of_other_rows(store: Path) -> None:
    """A manifest whose receipts say that a segment holds other examples; all digests agree."""

    def change(manifest: dict[str, Any]) -> None:
        receipts = manifest["receipts"]
        receipts[0]["rows"] = receipts[1]["rows"]

    forge_manifest(store, change)


def receipt_dropped(store: Path) -> None:
    forge_manifest(store, lambda manifest: manifest["receipts"].pop())


def receipt_dropped_and_digest_kept(store: Path) -> None:
    layout = Layout(store)
    seal_again(layout.manifest(HIDDEN), lambda manifest: manifest["receipts"].pop())
    record = bytes_digest(layout.manifest(HIDDEN).read_bytes())
    forge_index(store, lambda index: index["signals"][HIDDEN].update(manifest=record))


def statistics_of_another_layer(store: Path) -> None:
    path = Layout(store).channels("hidden", 2)
    flip(path, path.stat().st_size - 1, 0)


def examples_of_another_order(store: Path) -> None:
    """Labels joined to other rows: column and plan agree, the row digests do not."""
    forge_column(store, "label", lambda column: np.roll(column, 1))


FORGERIES = [
    plan_alone,
    manifest_alone,
    digest_in_the_index,
    swapped_manifests,
    features_of_other_rows,
    receipt_dropped,
    receipt_dropped_and_digest_kept,
    statistics_of_another_layer,
    examples_of_another_order,
]


@pytest.mark.parametrize("forge", FORGERIES, ids=lambda forge: forge.__name__)
def test_a_forgery_is_never_read(store, whole_store, ledger, forge: Damage):
    forge(store)
    found = outcome(store, whole_store)
    ledger.record("forged records", detected=found == "refused", wrong=found == "wrong")
    assert found == "refused"


@pytest.mark.parametrize(
    ("forge", "match"),
    [
        (features_of_other_rows, "features of other rows .* expected"),
        (examples_of_another_order, "is not the row that was planned"),
        (receipt_dropped, "not the manifest of .* that the index states"),
    ],
)
def test_the_error_says_what_is_wrong(store, forge: Callable[[Path], None], match):
    forge(store)
    with pytest.raises(IntegrityError, match=match):
        read_everything(store)


def test_another_format_is_incompatible(store):
    forge_index(store, lambda index: index.update(format=99))
    with pytest.raises(IncompatibleError, match="store format 99, this software reads 1"):
        StoreReader(store)


@pytest.mark.parametrize(
    "change",
    [
        {"form": "int9", "signal": "hidden/1/int9-0f737721"},
        {"form_version": 99},
        {"options": {"x": 1}},
    ],
)
def test_a_form_of_another_software_is_incompatible(store, change):
    declared = StoreReader(store).signal(HIDDEN).declaration
    with pytest.raises(IncompatibleError, match="use the software that wrote"):
        Declaration.from_json(declared.to_json() | change)


@pytest.mark.usefixtures("unsynced")
def test_a_plan_of_other_rows_is_refused(store):
    plan_alone(store)
    with pytest.raises(IntegrityError, match="the plan of another corpus or other options"):
        Synthetic(store).plan()
