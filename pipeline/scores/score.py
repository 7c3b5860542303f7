"""What a score is: its metric, its direction, and how a report shows it.

A new score is a `Score` in the file of the answers that it judges, and nothing else. Another
package adds one by an entry point `<kind of answers>.<name>` of the group `decant.scores`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from pipeline.errors import IntegrityError
from pipeline.scores.metric import Floats, Metric

Row = dict[str, Any]
"""A prediction: the test row's number and what was asked and answered."""


class Answers(ABC):
    """Base of a model's answers of one sort, in arrays from which scores are computed.

    Attributes:
        kind: The sort's name, the first half of the name of a score's entry point.
        tasks: The tasks whose models give such answers.
    """

    kind: ClassVar[str]
    tasks: ClassVar[frozenset[str]]

    @classmethod
    @abstractmethod
    def of_rows(cls, rows: Sequence[Row], *, classes: int | None, tokenizer: str) -> "Answers":
        """Return the answers that the predictions hold.

        Args:
            rows: Predictions that have answers of this sort; at least one.
            classes: How many classes there are; None for as many as the rows show.
            tokenizer: Splits text into words for BLEU.

        Raises:
            IntegrityError: If a row lacks a key.
        """

    @classmethod
    def answered(cls, rows: Sequence[Row]) -> list[Row]:
        """Return the rows that have answers of this sort: by default all of them."""
        return list(rows)

    def signatures(self) -> dict[str, str]:
        """Return how scores were computed, where the package that computes them has words for it.

        Keys name scores or families of scores, such as `rouge`.
        """
        return {}


@dataclass(frozen=True, slots=True)
class Score:
    """One score of one sort of answers.

    Attributes:
        name: Its name in parameters and metrics files.
        answers: The answers that it judges.
        metric: Builds the metric from such answers; None where they lack what it needs.
        heading: What it is called in a report.
        short: The heading in a terminal's narrow columns; empty for the same.
        digits: Decimals shown.
        is_percent: Whether it is a share of one, shown in percent.
        lower_is_better: Whether a smaller value is better.
        is_default: Whether tasks are judged by it unless parameters name another score.
        is_optional: Whether it is reported only where it is asked for.
        in_terminal: The tasks whose summary in the terminal shows it.
        across_tokenizers: The score to compare models by in place of this one where their
            tokenizers differ; empty where this one is comparable.
    """

    name: str
    answers: type[Answers]
    metric: Callable[[Any], Metric | None]
    heading: str
    short: str = ""
    digits: int = 1
    is_percent: bool = False
    lower_is_better: bool = False
    is_default: bool = False
    is_optional: bool = False
    in_terminal: frozenset[str] = frozenset()
    across_tokenizers: str = ""

    @property
    def tasks(self) -> frozenset[str]:
        """The tasks that have it."""
        return self.answers.tasks


def column(rows: Sequence[Row], name: str) -> Floats:
    """Return one key of every row as an array.

    Raises:
        IntegrityError: If a row lacks it.
    """
    for row in rows:
        if name not in row:
            raise IntegrityError(
                f"predictions: row {row['row']} has no {name}, expected one in every row; evaluate "
                "the model again"
            )
    return np.array([row[name] for row in rows], dtype=np.float64)
