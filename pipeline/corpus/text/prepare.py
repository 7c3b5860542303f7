"""From raw sources to a prepared corpus: read, deal to splits, check labels, write whole.

Everything is checked before anything is written: a bad source leaves an earlier corpus as it was.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.corpus.files import directory_written_whole
from pipeline.corpus.sources.base import SourceConfig
from pipeline.corpus.sources.registry import provenance
from pipeline.corpus.text.added import read_added
from pipeline.corpus.text.checks import WITH_CLASSES, check_labels, check_task, classes_of
from pipeline.corpus.text.examples import (
    SPLITS,
    CorpusMeta,
    Example,
    Split,
    corpus_digest,
    write_corpus,
)
from pipeline.corpus.text.splits import Dealt, deal_splits, limit_rows
from pipeline.errors import ConfigError
from pipeline.tasks import Task

logger = logging.getLogger(__name__)


def prepare_corpus(
    *,
    source: SourceConfig,
    task: Task,
    classes: list[str] | None,
    seed: int,
    validation_share: float,
    test_share: float,
    output: Path,
    root: Path,
    added: Sequence[SourceConfig] = (),
) -> CorpusMeta:
    """Write the prepared corpus of a source to the directory `output`.

    Args:
        source: The section `corpus.source`.
        task: What the examples are for.
        classes: Class names in the order of their ids, for the tasks that have some; None takes
            the source's own, where it gives an order, else those of the training split, sorted
            (whole numbers by value).
        seed: Decides every carved split and limit.
        validation_share: Share of the training text to carve where the source has no
            validation split, between 0 and 0.5.
        test_share: The same for test.
        output: Directory to write, whole or not at all; what stood there is replaced.
        root: What the source's paths are relative to.
        added: The section `corpus.added`: sources whose training text follows the corpus's own.

    Raises:
        ConfigError: If the source cannot be read, does not suit the task, is empty, or has a
            label outside the classes or, for a regression, that is no number. Nothing has been
            written then.
        ResourceError: If the output cannot be written; what stood there stays.
    """
    for name, share in (("validation_share", validation_share), ("test_share", test_share)):
        if not 0 < share < 0.5:
            raise ConfigError(
                f"corpus.{name}: found {share}, expected more than 0 and less than 0.5; correct it"
            )
    check_task(source, task, classes)
    reading = source.read(root, task)
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
    if task in WITH_CLASSES:
        known = reading.classes if classes is None else tuple(classes)
        names = known if len(known) > 1 else classes_of(task, dealt.splits["train"])
    if task in WITH_CLASSES or task == "regression":
        check_labels(task, splits, names)
    more = read_added(
        added,
        splits,
        first_row=1 + max(example.source_row for example in reading.examples),
        task=task,
        classes=names,
        seed=seed,
        root=root,
    )
    parts = [splits["train"], *more.parts]
    splits["train"] = [example for part in parts for example in part]
    meta = _describe(splits, reading.dropped, provenance(source, reading), task, names, seed, dealt)
    if added:
        meta = meta.model_copy(
            update={
                "parts": tuple(len(part) for part in parts),
                "added": more.sources,
                "dropped": _counted(meta.dropped, more.dropped),
            }
        )
    with directory_written_whole(output) as temporary:
        write_corpus(temporary, splits, meta)
    logger.info(
        "prepared %s, left out %s",
        ", ".join(f"{meta.rows[split]} {split} ({meta.splits[split]})" for split in SPLITS),
        ", ".join(f"{count} {reason}" for reason, count in meta.dropped.items()) or "nothing",
    )
    return meta


def _describe(
    splits: dict[Split, list[Example]],
    unread: Mapping[str, int],
    source: dict[str, Any],
    task: Task,
    classes: tuple[str, ...],
    seed: int,
    dealt: Dealt,
) -> CorpusMeta:
    return CorpusMeta(
        task=task,
        classes=classes,
        has_pairs=any(example.pair is not None for example in splits["train"]),
        rows={split: len(examples) for split, examples in splits.items()},
        text_bytes={split: sum(one.text_bytes for one in rows) for split, rows in splits.items()},
        dropped=_counted(unread, dealt.dropped),
        splits=dealt.origin,
        seed=seed,
        source=source,
        digest=corpus_digest(splits),
    )


def _counted(*dropped: Mapping[str, int]) -> dict[str, int]:
    """Return what was left out in all, by reason."""
    total: Counter[str] = Counter()
    for counts in dropped:
        total.update(counts)
    return {reason: count for reason, count in total.items() if count}
