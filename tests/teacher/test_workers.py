"""Worker processes compute what one process computes, and their errors arrive as they are."""

import shutil

import pytest
import torch

from pipeline.errors import ConfigError, IntegrityError, ResourceError, is_out_of_memory
from pipeline.store.index import read_index
from pipeline.teacher.workers import cluster
from tests.captured import Captured, copied, prepared, signal
from tests.teacher.test_capture import break_teacher, rare_token

SIGNALS = [
    signal("hidden", 2, "int8"),
    signal("attention", 2, "qk"),
    signal("attention", 1, "map"),
    signal("value", 1, "int8"),
    signal("logits", None, "topk", k=8, temperatures=[1.0]),
]
PROCESSES = {"scheduler": "processes", "workers": 2}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Captured:
    found = prepared(tmp_path_factory.mktemp("whole"), "llama")
    found.capture(SIGNALS, blocks=[2])
    return found


@pytest.fixture
def store(whole, tmp_path) -> Captured:
    return copied(whole, tmp_path / "copy")


def files(store: Captured) -> dict[str, bytes]:
    return {
        str(path.relative_to(store.store)): path.read_bytes()
        for path in store.store.rglob("*")
        if path.is_file() and path.name != "lock"
    }


@pytest.mark.slow
def test_workers_write_the_same_files_as_one_process(store, whole):
    """Not only the digests: every byte of the store but the name of who wrote it."""
    shutil.rmtree(store.stores)
    store.capture(SIGNALS, blocks=[2], **PROCESSES)
    assert files(store) == files(whole)


@pytest.mark.slow
def test_features_that_are_not_finite_arrive_as_what_they_are(store):
    token, _ = rare_token(store)
    break_teacher(store, 1, token)
    with pytest.raises(IntegrityError, match=r"not finite in example slots .*nonfinite: skip"):
        store.capture(SIGNALS, **PROCESSES)
    assert not read_index(store.layout)["signals"]


def test_workers_that_do_not_start_are_no_traceback(store, monkeypatch):
    def refuse(**_: object) -> None:
        raise RuntimeError("Nanny failed to start.")

    shutil.rmtree(store.stores)
    monkeypatch.setattr(cluster, "LocalCluster", refuse)
    monkeypatch.setattr(cluster, "start_fork_server", lambda _: None)
    with pytest.raises(ResourceError, match=r"2 worker processes do not start \(Nanny failed"):
        store.capture(SIGNALS, **PROCESSES)


def test_a_dashboard_needs_bokeh(store, monkeypatch):
    shutil.rmtree(store.stores)
    monkeypatch.setattr(cluster, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="dashboard: needs bokeh, which is not installed"):
        store.capture(SIGNALS, **PROCESSES, dashboard="127.0.0.1:0")


def test_memory_that_torch_does_not_get_counts_as_a_death():
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**50)
    assert is_out_of_memory(refused.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    for words in (
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling",
    ):
        assert is_out_of_memory(RuntimeError(words))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
