"""Base class of the corpus sources: a section of the parameters that reads its own examples.

A new source is one file here with one subclass of `SourceConfig` that has a field `kind`. Another
package adds one by an entry point of the group `decant.sources`, named by the kind.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from pipeline.corpus.text.examples import Example
from pipeline.tasks import TASKS, Task

# Unit in which near-duplicates are dropped: complete examples, or single paragraphs of a text.
Unit = Literal["example", "paragraph"]


@dataclass(frozen=True, slots=True)
class Reading:
    """Everything that was read from a source.

    Attributes:
        examples: In reading order; `source_row` counts them.
        provenance: What was read, as JSON values that do not depend on host or time.
        dropped: Number of examples dropped while reading, by reason.
        unit: Unit in which near-duplicates are dropped.
        classes: Class names in the source's own order; empty if it has none.
    """

    examples: list[Example]
    provenance: dict[str, Any]
    dropped: dict[str, int]
    unit: Unit = "example"
    classes: tuple[str, ...] = ()


class SourceConfig(BaseModel, ABC):
    """Base of the `corpus.source` sections.

    Attributes:
        tasks: Tasks that the source has examples for.
        limit: Maximum number of examples per split, sampled with the seed; for quick trials.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    tasks: ClassVar[tuple[Task, ...]] = TASKS

    limit: int | None = Field(default=None, gt=0)

    @abstractmethod
    def read(self, root: Path, task: Task = "causal-lm") -> Reading:
        """Read all examples; paths are relative to `root`.

        Most sources return the same examples for every task.

        Raises:
            ConfigError: If a file cannot be read or is not what the section says.
        """

    def preview(self, root: Path, task: Task, rows: int) -> list[Example]:
        """Read at most `rows` rows of each file or split, without downloading anything.

        Returns an empty list if the source is not available locally or cannot be read in part.

        Raises:
            ConfigError: As in `read`.
        """
        return []
