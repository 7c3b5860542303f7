"""Who watches a run gets every value at its step, and nothing of the project is touched."""

import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pipeline.errors import ConfigError, IntegrityError
from pipeline.training.reporting import Reports, reporters

ROOT = Path(__file__).parents[2]


def report(name: str, directory: Path, first: int, last: int) -> None:
    """Report a run that begins at step `first` and logs each step until `last`."""
    (reporter,) = reporters([name], directory, "students.a")
    arguments = TrainingArguments(output_dir=str(directory / "checkpoints"), use_cpu=True)
    state, control = TrainerState(global_step=first), TrainerControl()
    reporter.on_train_begin(arguments, state, control)
    for step in range(first + 1, last + 1):
        state.global_step = step
        logs = {"loss": 1.0 / step, "feature": 0.5, "gradient_feature": 2.0, "learning_rate": 1e-3}
        reporter.on_log(arguments, state, control, logs=logs)
    reporter.on_train_end(arguments, state, control)


def test_none_is_nobody(tmp_path):
    assert reporters([], tmp_path, "students.a") == []
    assert reporters(["none"], tmp_path, "students.a") == []


def test_a_name_that_nobody_has_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"report_to of students.a: 'tensorbord', expected none"):
        reporters(["tensorbord"], tmp_path, "students.a")


@pytest.mark.parametrize(
    ("name", "install"),
    [("dvclive", r"pip install 'decant-kd\[dvclive\]'"), ("swanlab", "pip install swanlab")],
)
def test_one_that_is_not_installed_is_refused(name, install, tmp_path, monkeypatch):
    place = "transformers.integrations.integration_utils"
    monkeypatch.setattr(f"{place}.is_{name}_available", lambda: False)
    with pytest.raises(ConfigError, match=rf"{name} is not to be had .*; run {install}, or"):
        reporters([name], tmp_path, "students.a")


def test_tensorboard_has_every_value_at_its_step(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    report("tensorboard", tmp_path, 0, 3)
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert {"train/loss", "train/feature", "train/gradient_feature", "train/learning_rate"} <= set(
        found.Tags()["scalars"]
    )
    assert [event.step for event in found.Scalars("train/loss")] == [1, 2, 3]


def dvclive_rows(directory: Path) -> list[str]:
    table = directory / "dvclive" / "plots" / "metrics" / "train" / "loss.tsv"
    return [line.split("\t")[0] for line in table.read_text().splitlines()[1:]]


@pytest.mark.slow
def test_dvclive_goes_on_where_the_run_does_and_begins_anew_with_it(tmp_path, monkeypatch):
    pytest.importorskip("dvclive")
    monkeypatch.chdir(tmp_path)
    report("dvclive", tmp_path, 0, 2)
    report("dvclive", tmp_path, 2, 4)
    assert dvclive_rows(tmp_path) == ["1", "2", "3", "4"]
    report("dvclive", tmp_path, 0, 2)
    assert dvclive_rows(tmp_path) == ["1", "2"]
    assert not list(tmp_path.rglob("dvc.yaml"))


@pytest.mark.slow
def test_dvclive_within_a_stage_leaves_the_pipeline_as_it_is(tmp_path):
    """Its own callback would write its metrics and plots into dvc.yaml."""
    pytest.importorskip("dvclive")
    pipeline = tmp_path / "dvc.yaml"
    pipeline.write_text("stages:\n  a:\n    cmd: python stage.py\n    outs: [out.txt]\n")
    (tmp_path / "stage.py").write_text(
        "from pathlib import Path\n"
        "from tests.training.test_reporting import report\n"
        "report('dvclive', Path('work'), 0, 2)\n"
        "Path('out.txt').write_text('done')\n"
    )
    before = pipeline.read_bytes()
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    environment = {"PATH": path, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    dvc = [sys.executable, "-m", "dvc"]
    for command in (["init", "-q", "--no-scm"], ["repro", "-q"]):
        subprocess.run([*dvc, *command], cwd=tmp_path, env=environment, check=True, timeout=120)
    assert pipeline.read_bytes() == before
    assert dvclive_rows(tmp_path / "work") == ["1", "2"]


class Rows(TrainerCallback):
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.events.append("begin")

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.events.append(f"log {logs}")

    def on_train_end(self, args, state, control, **kwargs):
        self.events.append("end")


def reports(directory: Path, *those: TrainerCallback) -> Reports:
    arguments = TrainingArguments(output_dir=str(directory), use_cpu=True)
    return Reports(those, arguments, torch.nn.Linear(2, 2))


@pytest.mark.parametrize("error", [None, IntegrityError("nan"), KeyboardInterrupt()])
def test_reports_are_closed_however_a_run_ends(error, tmp_path):
    rows = Rows()
    told = reports(tmp_path, rows)
    caught = nullcontext() if error is None else pytest.raises(type(error))
    with caught, told.open(TrainerState()):
        told.tell("on_log", TrainerState(), logs={"loss": 1.0})
        if error is not None:
            raise error
    assert rows.events == ["begin", "log {'loss': 1.0}", "end"]


def test_a_report_that_cannot_be_closed_does_not_hide_why_a_run_ended(tmp_path, caplog):
    broken, rows = Rows(), Rows()
    broken.on_train_end = Mock(side_effect=OSError("no route to host"))
    told = reports(tmp_path, broken, rows)
    with pytest.raises(IntegrityError, match="at step 1"), told.open(TrainerState()):
        raise IntegrityError("the loss is nan at step 1")
    assert any("not closed (no route to host)" in line for line in caplog.messages)
    assert rows.events == ["begin", "end"]
