"""Assigns examples to train, validation and test without training text in carved held-out splits.

Splits that a source publishes are kept. A missing split is carved by a seeded hash of the text:
equal texts always get the same split, whatever the order of the examples or the process's hash
salt.
"""

import hashlib
import logging
from collections import Counter
from dataclasses import dataclass, replace

from pipeline.corpus.sources.base import Unit
from pipeline.corpus.text.duplicates import containment, normalised, paragraphs, runs, shared_runs
from pipeline.corpus.text.examples import SPLITS, Example, Split
from pipeline.errors import ConfigError
from pipeline.tasks import Task, models_language

logger = logging.getLogger(__name__)

# Held-out text with more of its eight-word runs in training than this is dropped.
MAX_CONTAINMENT = 0.25

# Placeholders for the label in published test files without labels.
NO_LABEL = frozenset({"", "-1", "-1.0"})

# A group larger than this share of a split's budget would dominate the measurements on it.
MAX_GROUP_SHARE = 1 / 3


@dataclass(frozen=True, slots=True)
class Dealt:
    """Examples by split, each in reading order.

    Attributes:
        origin: official, carved, or the name of the published split used instead.
        dropped: Counts by reason: held-out examples or paragraphs that occur in training text,
            and examples without a target.
    """

    splits: dict[Split, list[Example]]
    origin: dict[Split, str]
    dropped: dict[str, int]


def deal_splits(
    examples: list[Example],
    *,
    task: Task,
    seed: int,
    validation_share: float,
    test_share: float,
    unit: Unit,
) -> Dealt:
    """Deal examples to three splits, none of them empty.

    A published test split that is absent or carries no answers is replaced by the published
    validation split; then, as always where validation is absent, validation is carved from
    training. Near-duplicates of training text are dropped from carved splits only: published
    ones stay comparable with other people's figures, and what they share is logged.

    Args:
        examples: All of a source, in reading order.
        task: Shares count bytes for causal-lm and rows for all others.
        seed: Decides what is carved.
        validation_share: Share of training to carve where there is no validation split.
        test_share: The same for test; counted of the same whole.
        unit: Whether near-duplicates are dropped as whole examples or by paragraph.

    Raises:
        ConfigError: If the source names splits but no train, or a split would be empty.
    """
    named: dict[Split, list[Example]] = {split: [] for split in SPLITS}
    for example in examples:
        named[example.split or "train"].append(example)
    if not examples:
        raise ConfigError("corpus.source: found no text, expected at least three examples")
    if not named["train"]:
        raise ConfigError(
            f"corpus.source: found {_counts(named)}, expected training examples; add files.train"
        )
    origin: dict[Split, str] = dict.fromkeys(SPLITS, "official")
    if named["test"] and _is_unanswered(task, named["test"], named["train"]):
        logger.warning("the test split has no answers, validation takes its place if there is one")
        named["test"] = []
    without_target = _drop_without_target(task, named)
    if not named["train"]:
        raise ConfigError(
            "corpus.source.target: no training row has a target, expected text in that column; "
            "correct its name, or fill it"
        )
    if not named["test"] and named["validation"]:
        named["test"], named["validation"] = named["validation"], []
        origin["test"] = "validation"
    shares: dict[Split, float] = {"test": test_share, "validation": validation_share}
    wanted: dict[Split, float] = {
        split: share for split, share in shares.items() if not named[split]
    }
    if wanted:
        carved = carve(named["train"], wanted, seed=seed, task=task)
        named.update(carved)
        origin.update(dict.fromkeys(carved, "carved"))
    dropped = _drop_overlaps(named, origin, unit)
    empty = [split for split in SPLITS if not named[split]]
    if empty:
        raise ConfigError(
            f"corpus.source: split {empty[0]} is empty after near-duplicates of training text were "
            "dropped, expected at least one example; give more text or another seed"
        )
    return Dealt(
        {split: named[split] for split in SPLITS}, origin, dropped | {"no_target": without_target}
    )


def carve(
    examples: list[Example], shares: dict[Split, float], *, seed: int, task: Task
) -> dict[Split, list[Example]]:
    """Deal examples to the splits of `shares` and the rest to train, group by group.

    Groups are taken in the order of a seeded hash until a split has its share, large groups
    last, so that a split is a mix. Every split gets at least one group.

    Raises:
        ConfigError: If there are fewer groups than splits.
    """
    weights: Counter[str] = Counter()
    keys = [example.group or input_key(example) for example in examples]
    for key, example in zip(keys, examples, strict=True):
        weights[key] += example.text_bytes if task == "causal-lm" else 1
    if len(weights) <= len(shares):
        raise ConfigError(
            f"corpus.source: found {len(weights)} different examples, expected at least "
            f"{len(shares) + 1} to carve {' and '.join(shares)} from train; give more text, "
            "name files for each split, or cut files with examples: paragraph"
        )
    order = sorted(weights, key=lambda key: hashlib.sha256(f"{seed}\0{key}".encode()).digest())
    total = weights.total()
    chosen: dict[str, Split] = {}
    for later, (split, share) in enumerate(shares.items(), start=1):
        budget, taken, groups = share * total, 0, 0
        # What must stay: one group for train and for each split that is still to come.
        spare = len(weights) - len(chosen) - (len(shares) - later) - 1
        for largest in (MAX_GROUP_SHARE * budget, budget):
            for key in order:
                fits = weights[key] <= largest and taken + weights[key] <= budget
                if key not in chosen and fits and groups < spare:
                    chosen[key] = split
                    taken += weights[key]
                    groups += 1
        if not groups:
            free = [key for key in order if key not in chosen]
            chosen[min(free, key=lambda key: weights[key])] = split
    dealt: dict[Split, list[Example]] = {"train": [], **{split: [] for split in shares}}
    for key, example in zip(keys, examples, strict=True):
        dealt[chosen.get(key, "train")].append(example)
    return dealt


def input_key(example: Example) -> str:
    """Return the input of an example without its answer: equal inputs must share a split.

    Otherwise a training example could reveal a held-out answer: two translations of one sentence,
    or two answers to the same chat questions.
    """
    if example.messages:
        asks = [turn for turn in example.messages if turn["role"] == "user"]
        turns = [turn["content"] or turn.get("more") or "" for turn in asks]
        return normalised("\n".join(turns))
    return f"{normalised(example.text)}\n{normalised(example.pair or '')}"


def text_of(example: Example) -> str:
    """Return all texts of an example joined, for the near-duplicate search."""
    return "\n".join(example.texts)


def limit_rows(examples: list[Example], limit: int, *, seed: int) -> list[Example]:
    """Keep at most `limit` examples, chosen by a seeded hash, in reading order."""
    ranked = sorted(
        examples, key=lambda each: hashlib.sha256(f"{seed}\0{each.source_row}".encode()).digest()
    )
    return sorted(ranked[:limit], key=lambda example: example.source_row)


def _drop_overlaps(
    named: dict[Split, list[Example]], origin: dict[Split, str], unit: Unit
) -> dict[str, int]:
    """Drop from carved held-out splits, in place, what occurs in train or in the other one."""
    dropped = {"held_out_near_duplicates": 0}
    kept = _texts(named["train"])
    held_out: tuple[Split, ...] = ("test", "validation")
    for split in held_out:
        own: set[int] = set()
        for text in _texts(named[split]):
            own |= runs(text)
        known = shared_runs(own, kept)
        if origin[split] == "carved":
            cleaned = [_without(example, known, unit) for example in named[split]]
            named[split] = [example for example, _ in cleaned if example is not None]
            dropped["held_out_near_duplicates"] += sum(count for _, count in cleaned)
        else:
            common = sum(containment(text_of(one), known) > MAX_CONTAINMENT for one in named[split])
            if common:
                logger.warning(
                    "%d of %d published %s examples nearly occur in training text; they are kept",
                    common, len(named[split]), split,
                )  # fmt: skip
        kept += _texts(named[split])
    return dropped


def _without(example: Example, known: set[int], unit: Unit) -> tuple[Example | None, int]:
    """Return an example without its known text, None where nothing stays, and how much went."""
    if unit == "example":
        is_known = containment(text_of(example), known) > MAX_CONTAINMENT
        return (None, 1) if is_known else (example, 0)
    parts = paragraphs(example.text)
    fresh = [part for part in parts if containment(part, known) <= MAX_CONTAINMENT]
    if len(fresh) == len(parts):
        return example, 0
    went = len(parts) - len(fresh)
    return (replace(example, text="\n\n".join(fresh)), went) if fresh else (None, went)


def _drop_without_target(task: Task, named: dict[Split, list[Example]]) -> int:
    """Leave out, in place, examples of prompt-target that have nothing to learn or compare."""
    if task != "prompt-target":
        return 0
    before = sum(map(len, named.values()))
    for split, examples in named.items():
        named[split] = [example for example in examples if example.target]
    return before - sum(map(len, named.values()))


def _is_unanswered(task: Task, examples: list[Example], train: list[Example]) -> bool:
    """Tell whether a split has no answers: only placeholders that are no class of training."""
    if task == "prompt-target":
        return not any(example.target for example in examples)
    if task == "multi-label":
        return not any(example.labels for example in examples)
    if models_language(task):
        return False
    labels = {example.label or "" for example in examples}
    return labels <= NO_LABEL and not labels & ({one.label or "" for one in train} - {""})


def _texts(examples: list[Example]) -> list[str]:
    return [text_of(example) for example in examples]


def _counts(named: dict[Split, list[Example]]) -> str:
    return ", ".join(f"{len(examples)} {split}" for split, examples in named.items())
