"""A bar on stderr for whoever waits: steps, ETA, the latest loss, tokens a second."""

import sys
import time

from tqdm import tqdm

PACE = "tokens_per_second"


class Progress:
    """The bar of one run.

    Args:
        description: What is trained.
    """

    def __init__(self, description: str) -> None:
        self._description = description
        self._bar: tqdm | None = None
        self._tokens = 0
        self._since = (time.perf_counter(), 0)

    def open(self, step: int, last: int, *, is_shown: bool) -> None:
        """Open the bar at the step that the run starts from."""
        self._since = (time.perf_counter(), self._tokens)
        if is_shown:
            self._bar = tqdm(
                total=last,
                initial=step,
                desc=self._description,
                unit="step",
                mininterval=1.0,
                # Those of several students stand below each other, which a file cannot show.
                position=None if sys.stderr.isatty() else 0,
            )

    def advance(self, step: int, tokens: int) -> None:
        """Show that a step is done, with the tokens that this process has trained on so far."""
        self._tokens = tokens
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def pace(self) -> float:
        """Return the tokens a second of this process since this was last asked."""
        now = (time.perf_counter(), self._tokens)
        seconds, tokens = (new - old for new, old in zip(now, self._since, strict=True))
        self._since = now
        return tokens / max(seconds, 1e-9)

    def show(self, loss: float, pace: float) -> None:
        """Show the latest loss and pace."""
        if self._bar is not None:
            shown = {"loss": f"{loss:.3g}", "tok/s": tqdm.format_sizeof(pace)}
            self._bar.set_postfix(shown, refresh=False)

    def close(self) -> None:
        """Close the bar, of a run that ended or failed."""
        if self._bar is not None:
            self._bar.close()
