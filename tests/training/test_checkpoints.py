"""A checkpoint counts when its marker is there."""

import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from transformers import TrainerState

from pipeline.errors import ResourceError
from pipeline.provenance import read_json, write_json
from pipeline.training.checkpoints import (
    MARKER,
    begin_after,
    check_room,
    mark_complete,
    remove_checkpoints,
)
from pipeline.training.checkpoints import last_complete_checkpoint as last


def test_the_newest_checkpoint_with_a_marker_counts(tmp_path):
    assert last(tmp_path) is None
    for step in (9, 100, 20):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert last(tmp_path) is None
    for step in (9, 20):
        (tmp_path / f"checkpoint-{step}" / MARKER).write_text("{}")
    assert last(tmp_path) == str(tmp_path / "checkpoint-20")
    (tmp_path / "checkpoint-100" / MARKER).write_text("{}")
    assert last(tmp_path) == str(tmp_path / "checkpoint-100")
    assert last(tmp_path / "nowhere") is None


def test_a_checkpoint_that_was_trained_from_others_is_passed_over(tmp_path, caplog):
    features = {"hidden/1/a": "1" * 64, "logits/b": "2" * 64}
    markers = {
        3: {"features": features},
        4: {"features": features | {"logits/b": "3" * 64}},
        5: {"features": {"hidden/1/a": "1" * 64}},
        6: {"step": 6},
        7: ["step"],
    }
    for step, marker in markers.items():
        write_json(tmp_path / f"checkpoint-{step}" / MARKER, marker)
    (tmp_path / "checkpoint-8").mkdir()
    (tmp_path / "checkpoint-8" / MARKER).write_text("{")
    assert last(tmp_path, features) == str(tmp_path / "checkpoint-3")
    reasons = [record.getMessage().partition("gone on from: ")[2] for record in caplog.records]
    assert "not readable as JSON" in reasons[0]
    assert reasons[1:3] == ["it does not say which signals it was trained from"] * 2
    assert reasons[3] == f"it was trained from logits/b none, expected {'2' * 16}"
    assert reasons[4] == f"it was trained from logits/b {'3' * 16}, expected {'2' * 16}"
    # A teacher uses no store.
    assert last(tmp_path) == str(tmp_path / "checkpoint-8")


def test_the_marker_says_the_step_and_what_was_learnt_from(tmp_path):
    checkpoint = tmp_path / "checkpoint-7"
    (checkpoint / "deep").mkdir(parents=True)
    (checkpoint / "deep" / "state.bin").write_bytes(b"1")
    mark_complete(checkpoint)
    assert read_json(checkpoint / MARKER) == {"step": 7}
    mark_complete(checkpoint, {"a": "1"})
    assert read_json(checkpoint / MARKER) == {"step": 7, "features": {"a": "1"}}


def test_the_two_of_the_highest_steps_are_kept_whenever_they_were_written(tmp_path):
    for step, written in ((2, 400), (9, 300), (20, 200), (100, 100)):
        path = checkpoint(tmp_path, step, 200)
        os.utime(path, (written, written))
    mark_complete(tmp_path / "checkpoint-100")
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-20", "checkpoint-100"}


def checkpoint(directory: Path, step: int, steps: int) -> Path:
    path = directory / f"checkpoint-{step}"
    path.mkdir()
    TrainerState(global_step=step, max_steps=steps).save_to_json(str(path / "trainer_state.json"))
    return path


def test_what_is_beyond_the_checkpoint_gone_on_from_makes_room(tmp_path):
    """The highest steps are kept, complete or not: this run's own would go instead."""
    whole = checkpoint(tmp_path, 2, 5)
    checkpoint(tmp_path, 4, 5)
    begin_after(tmp_path, whole)
    assert list(tmp_path.glob("checkpoint-*")) == [whole]
    begin_after(tmp_path, None)
    assert list(tmp_path.glob("checkpoint-*")) == []


def test_a_removal_that_is_cut_short_leaves_nothing_to_go_on_from(tmp_path, monkeypatch):
    (checkpoint(tmp_path, 2, 5) / MARKER).write_text("{}")
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    remove_checkpoints(tmp_path)
    assert last(tmp_path) is None


def begin(directory: Path, free: int, monkeypatch: pytest.MonkeyPatch, step: int = 0) -> None:
    """Begin a run of 10 steps, 3 to a checkpoint of 72 bytes, of which two are kept."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 0, free))
    state = TrainerState(global_step=step, max_steps=10, save_steps=3)
    check_room(directory, torch.nn.Linear(2, 2), state)


def test_room_for_the_checkpoints_is_looked_for_before_the_first_step(tmp_path, monkeypatch):
    """Three lie there while the third is written; those that are there need no more room."""
    begin(tmp_path, 3 * 72, monkeypatch)
    with pytest.raises(ResourceError, match="215 bytes free, 3 checkpoints need about 216 bytes"):
        begin(tmp_path, 3 * 72 - 1, monkeypatch)
    begin(tmp_path, 72, monkeypatch, step=9)
    for step in (3, 6):
        checkpoint(tmp_path, step, 10)
    begin(tmp_path, 72, monkeypatch, step=6)
    with pytest.raises(ResourceError, match="71 bytes free, 1 checkpoints need about 72 bytes"):
        begin(tmp_path, 71, monkeypatch, step=6)
