"""The harness that compares us with plain Zarr and Dask must be able to find something."""

import pytest

from benchmarks.plain_zarr import Ours, score


@pytest.mark.usefixtures("unsynced")
def test_ours_reads_nothing_wrong_where_plain_zarr_does(ledger, times):
    found = score(times(8, 61))
    ours = found.pop(Ours.name)
    for fault, count in ours.items():
        for number in range(count.injected):
            ledger.record(f"beside plain Zarr: {fault}", wrong=number < count.wrong)
    assert {fault: count.wrong for fault, count in ours.items() if count.wrong} == {}
    assert {fault for fault, count in ours.items() if count.right} <= {"writer killed"}
    for name, counts in found.items():
        wrong = {fault for fault, count in counts.items() if count.wrong}
        assert {"missing file", "two files swapped"} <= wrong, name
