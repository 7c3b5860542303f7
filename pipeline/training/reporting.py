"""Where a training can be watched from outside, by the names of `Trainer`'s `report_to`.

What is written goes into a directory that is no output of DVC and in no record of it: watching a
run changes neither the run nor what `dvc status` says of it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    DVCLiveCallback,
    TensorBoardCallback,
    get_reporting_integration_callbacks,
    rewrite_logs,
)

from pipeline.errors import ConfigError, in_short

EXTRAS = ("dvclive", "tensorboard")
"""Those that the project's own extras install."""


def reporters(names: Sequence[str], directory: Path, run: str) -> list[TrainerCallback]:
    """Return the callbacks that report a run.

    TensorBoard's and DVCLive's files go to `directory`; the others write where they always do.

    Args:
        names: As `Trainer` knows them, `tensorboard`, `dvclive`, `wandb`, `mlflow` among them;
            `none` is nothing.
        directory: Where files of this run go.
        run: What is trained, for the message.

    Raises:
        ConfigError: If a name is unknown or its package is not installed.
    """
    return [_reporter(name, directory, run) for name in names if name != "none"]


def _reporter(name: str, directory: Path, run: str) -> TrainerCallback:
    if name not in INTEGRATION_TO_CALLBACK:
        known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
        raise ConfigError(f"report_to of {run}: {name!r}, expected none or of {known}")
    try:
        if name == "tensorboard":
            reporter = TensorBoardCallback()
            # Beside the checkpoints, its choice, it would go when they go.
            reporter.logging_dir = str(directory / name)
            return reporter
        if name == "dvclive":
            return LiveCallback(directory / name)
        (factory,) = get_reporting_integration_callbacks([name])
        return factory()
    except (ImportError, RuntimeError, AssertionError) as error:
        package = f"'decant-kd[{name}]'" if name in EXTRAS else name.replace("_", "-")
        raise ConfigError(
            f"report_to of {run}: {name} is not to be had ({in_short(error)}); run pip install "
            f"{package}, or take it out"
        ) from error


class LiveCallback(DVCLiveCallback):
    """Writes DVCLive's files and nothing else: no dvc.yaml, no experiment, no commit.

    Its own callback rewrites dvc.yaml, which is the pipeline's, and counts logs for steps.

    Args:
        directory: Where metrics and plots go.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__(log_model=False)
        self._directory = directory

    def setup(self, args: TrainingArguments, state: TrainerState, model: Any) -> None:
        """Begin anew, or go on after the last point if the run does."""
        from dvclive.live import Live

        class FilesAlone(Live):
            def _init_dvc(self) -> None:
                """Look for no repository: one without a commit is an error to it."""
                self._dvc_file = "dvc.yaml"

        self._initialized = True
        if state.is_world_process_zero:
            self.live = FilesAlone(
                str(self._directory),
                save_dvc_exp=False,
                dvcyaml=None,
                resume=state.global_step > 0,
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write what is logged, at the step it belongs to, by the names TensorBoard has."""
        if self.live is not None:
            self.live.step = state.global_step
            for name, value in rewrite_logs(logs or {}).items():
                self.live.log_metric(name, value)
            self.live.next_step()
