"""Checks the first examples of a corpus for what `prepare` would refuse, before it runs."""

from collections.abc import Sequence
from pathlib import Path

from pipeline.corpus.sources.base import SourceConfig
from pipeline.corpus.text.checks import WITH_CLASSES, check_labels, refuse_unanswered
from pipeline.corpus.text.examples import SPLITS, Example, Split
from pipeline.tasks import Task

ROWS = 20
"""Default number of rows previewed per file or split."""


def preview(
    source: SourceConfig, task: Task, *, root: Path, classes: Sequence[str] | None, rows: int = ROWS
) -> list[Example]:
    """Read the first rows of a source and check them as `prepare` does.

    Args:
        source: The section `corpus.source`, or one of `corpus.added`.
        task: What the examples are for.
        root: Directory that the source's paths are relative to.
        classes: Class names, if the parameters list them.
        rows: Maximum number of rows read per file or split.

    Returns:
        The examples of these rows; empty if the source is not available locally.

    Raises:
        ConfigError: If a file or a column is missing, a file or split is empty, or a row has no
            label that suits the task.
    """
    examples = source.preview(root, task, rows)
    splits: dict[Split, list[Example]] = {
        split: [example for example in examples if (example.split or "train") == split]
        for split in SPLITS
    }
    # Published test files often lack labels.
    splits["test"] = [example for example in splits["test"] if example.label or example.labels]
    if task == "regression" or (classes is not None and task in WITH_CLASSES):
        check_labels(task, splits, tuple(classes or ()))
    elif task in WITH_CLASSES:
        refuse_unanswered(task, "train", splits["train"])
    return examples
