"""Services that a training reports to, by the names of `report_to` in `transformers.Trainer`.

What is written goes into a directory that is no output of DVC and in no record of it: watching a
run changes neither the run nor what `dvc status` says of it.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    DVCLiveCallback,
    TensorBoardCallback,
    get_reporting_integration_callbacks,
    rewrite_logs,
)

from pipeline.errors import ConfigError, in_short

logger = logging.getLogger(__name__)
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


class Reports:
    """The reporters of one run, which are told of it as `Trainer` would tell them.

    Args:
        reporters: See `reporters`.
        arguments: The optimisation.
        model: What is trained.
    """

    def __init__(
        self, reporters: Sequence[TrainerCallback], arguments: TrainingArguments, model: nn.Module
    ) -> None:
        self._reporters, self._arguments, self._model = reporters, arguments, model

    @contextmanager
    def open(self, state: TrainerState) -> Iterator[None]:
        """Begin the reports; they are closed however the run ends.

        A run that stops because it diverged is the one whose curve is looked at.
        """
        try:
            self.tell("on_init_end", state)
            self.tell("on_train_begin", state)
            yield
        except BaseException:
            for reporter in self._reporters:
                try:
                    self._tell(reporter, "on_train_end", state)
                except Exception as error:  # noqa: BLE001 (the run's own is the one to tell)
                    name = type(reporter).__name__
                    logger.warning("%s: not closed (%s)", name, in_short(error))
            raise
        self.tell("on_train_end", state)

    def tell(self, event: str, state: TrainerState, **more: Any) -> None:
        """Call a method of `TrainerCallback` on each reporter."""
        for reporter in self._reporters:
            self._tell(reporter, event, state, **more)

    def _tell(
        self, reporter: TrainerCallback, event: str, state: TrainerState, **more: Any
    ) -> None:
        more["model"] = self._model
        getattr(reporter, event)(self._arguments, state, TrainerControl(), **more)


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
