"""A bar on stderr for whoever waits: steps, ETA, the latest loss, tokens a second."""

import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

PACE = "tokens_per_second"


class Progress(TrainerCallback):
    """One bar a run.

    Args:
        description: What is trained.
        tokens: Tokens that this process has trained on so far.
    """

    def __init__(self, description: str, tokens: Callable[[], int]) -> None:
        self._description = description
        self._tokens = tokens
        self._bar: tqdm | None = None
        self._since = (time.perf_counter(), 0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar at the step the run starts from."""
        self._since = (time.perf_counter(), self._tokens())
        if state.is_world_process_zero:
            self._bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc=self._description,
                unit="step",
                mininterval=1.0,
                # Those of several students stand below each other, which a file cannot show.
                position=None if sys.stderr.isatty() else 0,
            )

    def pace(self) -> float:
        """Return the tokens a second of this process since this was last asked."""
        now = (time.perf_counter(), self._tokens())
        seconds, tokens = (new - old for new, old in zip(now, self._since, strict=True))
        self._since = now
        return tokens / max(seconds, 1e-9)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Advance; the last step is always logged, so that a short run has a curve too."""
        if state.global_step >= state.max_steps:
            control.should_log = True
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the loss and the pace."""
        if self._bar is None or logs is None or "loss" not in logs:
            return
        shown = {"loss": f"{logs['loss']:.3g}", "tok/s": tqdm.format_sizeof(logs[PACE])}
        self._bar.set_postfix(shown, refresh=False)

    def close(self) -> None:
        """Close the bar, of a run that ended or failed."""
        if self._bar is not None:
            self._bar.close()
