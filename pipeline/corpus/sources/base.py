"""What every corpus source is: a section of parameters that can read itself.

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

# What near-duplicates are dropped by: whole examples, or paragraphs where a text is a list of them.
Unit = Literal["example", "paragraph"]


@dataclass(frozen=True, slots=True)
class Reading:
    """All a source gave.

    Attributes:
        examples: In reading order; `source_row` counts them.
        provenance: What was read, as JSON values that do not depend on host or time.
        dropped: What was left out while reading, by reason.
        unit: What may be dropped from an example as a near-duplicate.
        classes: Names of the classes in the source's own order; empty where it gives none.
    """

    examples: list[Example]
    provenance: dict[str, Any]
    dropped: dict[str, int]
    unit: Unit = "example"
    classes: tuple[str, ...] = ()


class SourceConfig(BaseModel, ABC):
    """Base of the `corpus.source` sections.

    Attributes:
        tasks: The tasks that it has examples for.
        limit: At most so many examples of each split, chosen by the seed; for quick tries.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    tasks: ClassVar[tuple[Task, ...]] = TASKS

    limit: int | None = Field(default=None, gt=0)

    @abstractmethod
    def read(self, root: Path, task: Task = "causal-lm") -> Reading:
        """Read everything; paths are relative to `root`.

        Most sources give the same for every task: what their section names.

        Raises:
            ConfigError: If a file cannot be read or is not what the section says.
        """

    def preview(self, root: Path, task: Task, rows: int) -> list[Example]:
        """Read at most so many rows of each file or split; nothing is downloaded.

        A source that is not at hand, or cannot be read in part, has none to show.

        Raises:
            ConfigError: As in `read`.
        """
        return []
