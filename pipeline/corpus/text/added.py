"""Adds training text to an existing corpus without changing what is already there.

The corpus is read and split as before. Each added source becomes a *part* after the existing
training examples, so existing rows, splits, tokenizers and segments stay the same. Added text
that occurs in a held-out split is dropped.
"""

import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.corpus.sources.base import SourceConfig, Unit
from pipeline.corpus.sources.registry import provenance
from pipeline.corpus.text.checks import WITH_CLASSES, check_labels, check_task
from pipeline.corpus.text.duplicates import containment, paragraphs, runs
from pipeline.corpus.text.examples import Example, Split
from pipeline.corpus.text.splits import MAX_CONTAINMENT, input_key, limit_rows, text_of
from pipeline.errors import ConfigError
from pipeline.provenance import fingerprint
from pipeline.tasks import Task

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Added:
    """Training examples read from the added sources.

    Attributes:
        parts: Training examples of each source, in order; never empty.
        sources: Provenance of each source, as JSON values that do not depend on host or time.
        dropped: Number of examples or paragraphs dropped, by reason.
    """

    parts: list[list[Example]]
    sources: list[dict[str, Any]]
    dropped: dict[str, int]


def check_added(sources: Sequence[SourceConfig], task: Task) -> None:
    """Check that the added sources suit the task, without reading them.

    Raises:
        ConfigError: If a source does not.
    """
    for index, source in enumerate(sources):
        with _errors_name(f"corpus.added.{index}"):
            check_task(source, task, None)


@contextmanager
def _errors_name(key: str) -> Iterator[None]:
    """Replace `corpus.source` in errors by the key of an added source."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(str(error).replace("corpus.source", key)) from error


def read_added(
    sources: Sequence[SourceConfig],
    splits: Mapping[Split, list[Example]],
    *,
    first_row: int,
    task: Task,
    classes: tuple[str, ...],
    seed: int,
    root: Path,
) -> Added:
    """Read the added sources of a corpus whose splits are already assigned.

    Only training examples are used. Dropped and counted are: a source's own validation and test
    examples, texts (or paragraphs, depending on the source) that nearly occur in held-out text,
    and exact duplicates of earlier training examples.

    Args:
        sources: The section `corpus.added`.
        splits: The corpus without the added text.
        first_row: `source_row` of the first added example; above all existing ones.
        task: What the examples are for.
        classes: Class names, which added examples must have.
        seed: Decides limits.
        root: What the sources' paths are relative to.

    Raises:
        ConfigError: If a source cannot be read, does not suit the task, is of pairs where the
            corpus is not, has a label outside the classes, or has nothing new.
    """
    held_out = _HeldOut([*splits["test"], *splits["validation"]])
    has_pairs = _has_pairs(splits["train"])
    contents = {_content(example) for example in splits["train"]} if sources else set()
    added = Added([], [], {})
    dropped: Counter[str] = Counter()
    for index, source in enumerate(sources):
        key = f"corpus.added.{index}"
        with _errors_name(key):
            check_task(source, task, None)
            reading = source.read(root, task)
        dropped.update(reading.dropped)
        numbered = [
            replace(example, source_row=first_row + example.source_row)
            for example in reading.examples
        ]
        first_row = 1 + max((example.source_row for example in numbered), default=first_row - 1)
        rows = [example for example in numbered if example.split in (None, "train")]
        dropped["added_not_for_training"] += len(numbered) - len(rows)
        if task == "prompt-target":
            answered = [example for example in rows if example.target]
            dropped["no_target"] += len(rows) - len(answered)
            rows = answered
        new = [example for example in rows if _content(example) not in contents]
        dropped["added_before"] += len(rows) - len(new)
        fresh: list[Example] = []
        for example in new:
            kept, went = held_out.without(example, reading.unit)
            dropped["added_held_out"] += went
            fresh += [] if kept is None else [kept]
        if source.limit is not None:
            fresh = limit_rows(fresh, source.limit, seed=seed)
        if not fresh:
            raise ConfigError(
                f"{key}: found {len(reading.examples)} examples, none of them new training text "
                f"({_reasons(dropped)}); expected at least one, give other text or remove it"
            )
        if _has_pairs(fresh) != has_pairs:
            raise ConfigError(
                f"{key}: found {'pairs' if not has_pairs else 'single texts'}, expected "
                f"{'pairs' if has_pairs else 'single texts'} as in corpus.source; correct its pair"
            )
        if task in WITH_CLASSES or task == "regression":
            check_labels(task, {"train": fresh}, classes)
        contents |= {_content(example) for example in fresh}
        added.parts.append(fresh)
        added.sources.append(provenance(source, reading))
        logger.info("added %d training examples as part %d", len(fresh), index + 2)
    added.dropped.update(dropped)
    return added


class _HeldOut:
    """Index of the held-out text, which finds that text in other examples."""

    def __init__(self, examples: Iterable[Example]) -> None:
        self._inputs = set()
        self._owners: dict[int, list[int]] = defaultdict(list)
        self._runs: list[int] = []
        for number, example in enumerate(examples):
            self._inputs.add(input_key(example))
            own = runs(text_of(example))
            self._runs.append(len(own))
            for run in own:
                self._owners[run].append(number)
        self._known = set(self._owners)

    def without(self, example: Example, unit: Unit) -> tuple[Example | None, int]:
        """Remove held-out text; return the rest (None if empty) and the number of units removed."""
        if input_key(example) in self._inputs:
            return None, 1
        if unit == "example":
            return (None, 1) if self._has(text_of(example)) else (example, 0)
        parts = paragraphs(example.text)
        fresh = [part for part in parts if not self._has(part)]
        if len(fresh) == len(parts):
            return example, 0
        went = len(parts) - len(fresh)
        return (replace(example, text="\n\n".join(fresh)), went) if fresh else (None, went)

    def _has(self, text: str) -> bool:
        """Return whether a text overlaps held-out text, as a share of either of the two."""
        if containment(text, self._known) > MAX_CONTAINMENT:
            return True
        shared = Counter(number for run in runs(text) & self._known for number in self._owners[run])
        return any(count > MAX_CONTAINMENT * self._runs[n] for n, count in shared.items())


def _has_pairs(examples: Iterable[Example]) -> bool:
    return any(example.pair is not None for example in examples)


def _content(example: Example) -> bytes:
    """Return a digest of an example's content; 16 bytes, because all are kept in memory."""
    names = ("text", "pair", "label", "labels", "target", "references", "messages")
    return bytes.fromhex(fingerprint([getattr(example, name) for name in names])[:32])


def _reasons(dropped: Mapping[str, int]) -> str:
    left_out = ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count)
    return f"left out {left_out}" if left_out else "it is empty"
