"""From raw sources to a prepared corpus: read, deal to splits, check labels, write whole.

Everything is checked before anything is written: a bad source leaves an earlier corpus as it was.
"""

import logging
from pathlib import Path
from typing import Annotated

from pydantic import Field

from pipeline.corpus.examples import (
    SPLITS,
    CorpusMeta,
    Example,
    Split,
    Task,
    corpus_digest,
    write_corpus,
)
from pipeline.corpus.files import directory_written_whole
from pipeline.corpus.sources.base import Reading
from pipeline.corpus.sources.python_docs import PythonDocsSource
from pipeline.corpus.sources.table import TableSource
from pipeline.corpus.sources.text import TextSource
from pipeline.corpus.splits import NO_LABEL, deal_splits, limit_rows
from pipeline.errors import ConfigError

logger = logging.getLogger(__name__)

CorpusSource = Annotated[PythonDocsSource | TextSource | TableSource, Field(discriminator="kind")]


def prepare_corpus(
    *,
    source: CorpusSource,
    task: Task,
    classes: list[str] | None,
    seed: int,
    validation_share: float,
    test_share: float,
    output: Path,
    root: Path,
) -> CorpusMeta:
    """Write the prepared corpus of a source to the directory `output`.

    Args:
        source: The section `corpus.source`.
        task: What the examples are for.
        classes: Class names in the order of their ids; None takes those of the training
            split, sorted (whole numbers by value).
        seed: Decides every carved split and limit.
        validation_share: Share of the training text to carve where the source has no
            validation split, between 0 and 0.5.
        test_share: The same for test.
        output: Directory to write, whole or not at all; what stood there is replaced.
        root: What the source's paths are relative to.

    Raises:
        ConfigError: If the source cannot be read, does not suit the task, is empty, or has a
            label outside the classes. Nothing has been written then.
        ResourceError: If the output cannot be written; what stood there stays.
    """
    for name, share in (("validation_share", validation_share), ("test_share", test_share)):
        if not 0 < share < 0.5:
            raise ConfigError(
                f"corpus.{name}: found {share}, expected more than 0 and less than 0.5; correct it"
            )
    _check_task(source, task, classes)
    reading = source.read(root)
    dealt = deal_splits(
        reading.examples,
        task=task,
        seed=seed,
        validation_share=validation_share,
        test_share=test_share,
        unit=reading.unit,
    )
    splits: dict[Split, list[Example]] = dealt.splits
    if source.limit is not None:
        splits = {
            split: limit_rows(rows, source.limit, seed=seed) for split, rows in splits.items()
        }
    names: tuple[str, ...] = ()
    if task == "classification":
        names = tuple(classes) if classes is not None else _classes(dealt.splits["train"])
        _check_labels(splits, names)
    meta = _describe(splits, reading, task, names, seed, dealt.origin, dealt.dropped)
    with directory_written_whole(output) as temporary:
        write_corpus(temporary, splits, meta)
    logger.info(
        "prepared %s: %s, left out %s",
        output,
        ", ".join(f"{meta.rows[split]} {split} ({meta.splits[split]})" for split in SPLITS),
        ", ".join(f"{count} {reason}" for reason, count in meta.dropped.items()) or "nothing",
    )
    return meta


def _check_task(source: CorpusSource, task: Task, classes: list[str] | None) -> None:
    label = source.label if isinstance(source, TableSource) else None
    pair = source.pair if isinstance(source, TableSource) else None
    if task == "classification" and label is None:
        raise ConfigError(
            f"corpus.task: classification needs labels and the source {source.kind} names none; "
            "use a table source with `label`, or task causal-lm"
        )
    if task == "causal-lm" and pair is not None:
        raise ConfigError(
            f"corpus.source.pair: {pair!r} makes pairs of texts, task causal-lm expects "
            "single texts; remove it, or use task classification"
        )
    if task == "causal-lm" and classes is not None:
        raise ConfigError(
            f"corpus.classes: {len(classes)} classes for task causal-lm, expected none; remove it"
        )
    if classes is not None and (len(set(classes)) != len(classes) or len(classes) < 2):
        raise ConfigError(
            f"corpus.classes: found {classes}, expected two or more different names; correct it"
        )


def _classes(train: list[Example]) -> tuple[str, ...]:
    """Return the labels of training in a fixed order: 2 before 10 where all are whole numbers."""
    found = {example.label or "" for example in train}
    _refuse_unlabelled("train", train)
    if len(found) < 2:
        raise ConfigError(
            f"corpus.source.label: the training split has the single class {found.pop()!r}, "
            "expected two or more; check the column"
        )
    try:
        return tuple(sorted(found, key=lambda name: (int(name), name)))
    except ValueError:
        return tuple(sorted(found))


def _refuse_unlabelled(split: Split, examples: list[Example]) -> None:
    for example in examples:
        if not example.label:
            raise ConfigError(
                f"{example.source}: no label in a {split} row, expected a class; "
                "label the row or remove it"
            )


def _check_labels(splits: dict[Split, list[Example]], classes: tuple[str, ...]) -> None:
    known = set(classes)
    for split, examples in splits.items():
        _refuse_unlabelled(split, examples)
        for example in examples:
            if example.label not in known:
                hint = " (which marks a row without answer)" if example.label in NO_LABEL else ""
                raise ConfigError(
                    f"{example.source}: label {example.label!r}{hint} in a {split} row, expected "
                    f"one of {', '.join(map(repr, classes))}; correct the row or corpus.classes"
                )


def _describe(
    splits: dict[Split, list[Example]],
    reading: Reading,
    task: Task,
    classes: tuple[str, ...],
    seed: int,
    origin: dict[Split, str],
    dropped: dict[str, int],
) -> CorpusMeta:
    # A causal language model's labels are its own tokens: a label column plays no part.
    return CorpusMeta(
        task=task,
        classes=classes,
        has_pairs=any(example.pair is not None for example in splits["train"]),
        rows={split: len(examples) for split, examples in splits.items()},
        text_bytes={split: sum(one.text_bytes for one in rows) for split, rows in splits.items()},
        dropped={reason: count for reason, count in (reading.dropped | dropped).items() if count},
        splits=origin,
        seed=seed,
        source=reading.provenance,
        digest=corpus_digest(splits),
    )
