"""Text that is added to a corpus later: more to train on, and nothing that was there changes.

The corpus is read and dealt as without it. What is added follows its training examples as a *part*
of its own, so rows, splits, tokenizers and segments of what was there stay what they were. Nothing
that is held out is trained on: where added text has it, the added text goes.
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
from pipeline.corpus.text.splits import MAX_CONTAINMENT, asked, limit_rows, text_of
from pipeline.errors import ConfigError
from pipeline.provenance import fingerprint
from pipeline.tasks import Task

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Added:
    """What was added.

    Attributes:
        parts: The training examples of each source, in order; none of them is empty.
        sources: What was read of each, as JSON values that do not depend on host or time.
        dropped: What was left out, by reason.
    """

    parts: list[list[Example]]
    sources: list[dict[str, Any]]
    dropped: dict[str, int]


def check_added(sources: Sequence[SourceConfig], task: Task) -> None:
    """Check, without reading any, that the sources of added text suit the task.

    Raises:
        ConfigError: If one does not.
    """
    for place, source in enumerate(sources):
        with _called(f"corpus.added.{place}"):
            check_task(source, task, None)


@contextmanager
def _called(key: str) -> Iterator[None]:
    """Name a source of added text in errors that take it for the first one."""
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
    """Read what is to be added to a corpus that is dealt.

    Only training examples are taken; a source's own validation and test examples are left out and
    counted. So are texts, or paragraphs where a text is a list of them, that occur in held-out
    text, as splits are dealt, and examples that earlier training text has just so.

    Args:
        sources: The section `corpus.added`.
        splits: The corpus without it.
        first_row: The `source_row` of the first example; later than all there are.
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
    known = {_content(example) for example in splits["train"]} if sources else set()
    found = Added([], [], {})
    dropped: Counter[str] = Counter()
    for place, source in enumerate(sources):
        key = f"corpus.added.{place}"
        with _called(key):
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
        new = [example for example in rows if _content(example) not in known]
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
        known |= {_content(example) for example in fresh}
        found.parts.append(fresh)
        found.sources.append(provenance(source, reading))
        logger.info("added %d training examples as part %d", len(fresh), place + 2)
    found.dropped.update(dropped)
    return found


class _HeldOut:
    """The text that is not to be trained on, found again inside other text."""

    def __init__(self, examples: Iterable[Example]) -> None:
        self._asked = set()
        self._owners: dict[int, list[int]] = defaultdict(list)
        self._runs: list[int] = []
        for number, example in enumerate(examples):
            self._asked.add(asked(example))
            own = runs(text_of(example))
            self._runs.append(len(own))
            for run in own:
                self._owners[run].append(number)
        self._known = set(self._owners)

    def without(self, example: Example, unit: Unit) -> tuple[Example | None, int]:
        """Return an example without held-out text, None where nothing stays, and what went."""
        if asked(example) in self._asked:
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
        """Tell whether much of a text is held out, or much of one held-out example is in it."""
        if containment(text, self._known) > MAX_CONTAINMENT:
            return True
        shared = Counter(number for run in runs(text) & self._known for number in self._owners[run])
        return any(count > MAX_CONTAINMENT * self._runs[n] for n, count in shared.items())


def _has_pairs(examples: Iterable[Example]) -> bool:
    return any(example.pair is not None for example in examples)


def _content(example: Example) -> bytes:
    """Return what makes two examples the same, wherever they stand; short, for there are many."""
    names = ("text", "pair", "label", "labels", "target", "references", "messages")
    return bytes.fromhex(fingerprint([getattr(example, name) for name in names])[:32])


def _reasons(dropped: Mapping[str, int]) -> str:
    left_out = ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count)
    return f"left out {left_out}" if left_out else "it is empty"
