"""The points of a student's training curve: taken, checked, shown and reported."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from accelerate import Accelerator
from torch import Tensor
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import speed_metrics

from pipeline.student.align.distiller import Distiller
from pipeline.student.loop.gradient import StepGradient
from pipeline.training.memory import peak_memory_bytes
from pipeline.training.progress import PACE, Progress
from pipeline.training.reporting import Reports
from pipeline.training.values import GRADIENT, LOSS, check_finite, check_scale, means

logger = logging.getLogger(__name__)


class Curve:
    """Logs each term's mean over the steps since the last point, as far as it was on.

    Args:
        description: What is trained, for the bar and for errors.
        distiller: What is trained.
        state: How far the run is; its log holds the points.
        gradient: Where the values come from.
        accelerator: What the run trains with.
        arguments: The optimisation.
        reporters: Where points go.

    Attributes:
        reports: Those reporters, as one.
    """

    def __init__(
        self,
        description: str,
        distiller: Distiller,
        state: TrainerState,
        gradient: StepGradient,
        accelerator: Accelerator,
        arguments: TrainingArguments,
        reporters: Sequence[TrainerCallback],
    ) -> None:
        self.reports = Reports(reporters, arguments, distiller)
        self._description, self._distiller, self._state = description, distiller, state
        self._gradient, self._accelerator, self._arguments = gradient, accelerator, arguments
        self._progress = Progress(description)
        self._tokens = 0
        self._losses: list[float] = []
        self._begun = 0.0, 0

    @contextmanager
    def open(self) -> Iterator[None]:
        """Show and report the run; bar and reports are closed however it ends."""
        state = self._state
        self._begun = time.time(), state.global_step
        self._progress.open(
            state.global_step, state.max_steps, is_shown=state.is_world_process_zero
        )
        try:
            with self.reports.open(state):
                yield
        finally:
            self._progress.close()

    def advance(self, tokens: int) -> None:
        """Show that another step is done, which trained on so many tokens of this process."""
        self._tokens += tokens
        self._progress.advance(self._state.global_step, self._tokens)
        self.reports.tell("on_step_end", self._state)

    def check(self) -> dict[int, dict[str, float]]:
        """Return the values of the steps since the last point.

        Raises:
            IntegrityError: If one is not finite.
        """
        values = self._gradient.values.read(self._gradient.over_ranks)
        check_finite(values, self._description)
        return values

    def add_point(self, norm: Tensor, rate: float) -> None:
        """Log the means, with the last step's gradient norm and learning rate.

        Raises:
            IntegrityError: If a value is not finite, or no scale holds float16's gradients.
        """
        state, balance = self._state, self._distiller.balance
        values = self.check()
        self._gradient.values.clear()
        check_scale(self._accelerator.scaler, self._description, state.global_step)
        self._losses += [row[LOSS] for row in values.values()]
        point = means(values) | {"grad_norm": norm.item(), "learning_rate": rate}
        point.pop(GRADIENT, None)
        norms = self._gradient.take_norms()
        point |= {f"gradient_{term}": value for term, value in norms.items()}
        if norms and state.is_world_process_zero:
            words = ", ".join(f"{term} {value:.3g}" for term, value in norms.items())
            logger.info("step %d, gradient norms: %s", state.global_step, words)
        if balance is not None:
            factors = {term: float(balance.factor(term)) for term in self._distiller.terms}
            point |= {f"factor_{term}": factor for term, factor in factors.items()}
        point[PACE] = self._progress.pace() * self._accelerator.num_processes
        self._progress.show(point[LOSS], point[PACE])
        self._log(point)

    def end(self) -> None:
        """Log the speed of the run and the peak of its memory."""
        begun, first = self._begun
        device, steps = self._accelerator.device, self._state.global_step - first
        a_step = self._arguments.train_batch_size * self._arguments.gradient_accumulation_steps
        samples = steps * a_step * self._accelerator.num_processes
        peak = peak_memory_bytes(device)
        self._progress.close()
        if self._state.is_world_process_zero:
            logger.info("%s: peak memory %.2f GB (%s)", self._description, peak / 1e9, device)
        self._log(
            speed_metrics("train", begun, num_samples=samples, num_steps=steps)
            | {"train_loss": sum(self._losses) / max(1, len(self._losses))}
            | {"peak_memory_bytes": peak}
        )

    def _log(self, row: dict[str, float]) -> None:
        row["epoch"] = self._state.epoch or 0.0
        self._state.log_history.append({**row, "step": self._state.global_step})
        self.reports.tell("on_log", self._state, logs=row)
