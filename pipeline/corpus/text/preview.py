"""A look at the first rows of a corpus: what `prepare` would refuse there, before anything runs."""

from collections.abc import Sequence
from pathlib import Path

from pipeline.corpus.sources.base import SourceConfig
from pipeline.corpus.text.checks import WITH_CLASSES, check_labels, refuse_unanswered
from pipeline.corpus.text.examples import SPLITS, Example, Split
from pipeline.tasks import Task

ROWS = 20
"""Of each file or split."""


def preview(
    source: SourceConfig, task: Task, *, root: Path, classes: Sequence[str] | None, rows: int = ROWS
) -> list[Example]:
    """Read the first rows of a source, and refuse in them what `prepare` refuses.

    Args:
        source: The section `corpus.source`, or one of `corpus.added`.
        task: What the examples are for.
        root: What the source's paths are relative to.
        classes: The classes, where the parameters name them.
        rows: Most rows of each file or split that are read.

    Returns:
        The examples of these rows; none where the source is not at hand.

    Raises:
        ConfigError: If a file or a column is missing, a file or split is empty, or a row has no
            label that suits the task.
    """
    found = source.preview(root, task, rows)
    splits: dict[Split, list[Example]] = {
        split: [one for one in found if (one.split or "train") == split] for split in SPLITS
    }
    # Published test files often lack labels.
    splits["test"] = [one for one in splits["test"] if one.label or one.labels]
    if task == "regression" or (classes is not None and task in WITH_CLASSES):
        check_labels(task, splits, tuple(classes or ()))
    elif task in WITH_CLASSES:
        refuse_unanswered(task, "train", splits["train"])
    return found
