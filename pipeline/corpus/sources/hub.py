"""A data set of the Hugging Face hub, or a directory of one, read by the `datasets` library.

Offline (`HF_HUB_OFFLINE`) it comes from the local cache. No code of a repository is ever run.
"""

import contextlib
import hashlib
import itertools
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import datasets
import pyarrow as pa
from datasets.exceptions import DatasetsError

from pipeline.corpus.sources.base import Reading
from pipeline.corpus.sources.columns import ColumnSource
from pipeline.corpus.text.examples import SPLITS, Example, Split
from pipeline.errors import ConfigError, in_short
from pipeline.provenance import canonical_json
from pipeline.tasks import Task

logger = logging.getLogger(__name__)

Rows = datasets.Dataset | datasets.IterableDataset


class HubSource(ColumnSource):
    """Section `corpus.source` of kind `hub`.

    Attributes:
        id: Name on the hub, or a directory that holds Parquet, Arrow, JSON or csv files, or what
            `save_to_disk` wrote.
        config: Configuration of the data set, where it has several.
        revision: Commit, tag or branch; without one the data set may change under its name.
        splits: Which split of the data set is train, validation and test. None takes those of these
            names.
        streaming: Read row by row without a copy on disk; with a limit, only the first rows of each
            split are read at all.
    """

    kind: Literal["hub"] = "hub"
    id: str
    config: str | None = None
    revision: str | None = None
    splits: dict[Split, str] | None = None
    streaming: bool = False

    def read(self, root: Path, task: Task = "causal-lm") -> Reading:
        """Read the splits in the order train, validation, test; rows without text are left out."""
        found, commit = self._open(root)
        examples: list[Example] = []
        digest = hashlib.sha256()
        empty = 0
        chosen = self._chosen(found)
        for split, name in chosen.items():
            wanted = self.wanted(split)
            rows = _selected(found[name], wanted)
            count = 0
            for number, cells in enumerate(self._iterate(rows), start=1):
                digest.update(canonical_json([name, {key: str(cells[key]) for key in cells}]))
                where = f"{name}:{number}"
                example = self.example(
                    cells, f"{self.id} {where}", split=split, source=where, row=len(examples)
                )
                if example is None:
                    empty += 1
                    continue
                examples.append(example)
                count += 1
                if self.streaming and count == self.limit:
                    break
            if not count:
                raise ConfigError(
                    f"corpus.source: split {name} of {self.id} holds no text, expected at least "
                    "one example; correct splits or the column names"
                )
        provenance = {
            "kind": self.kind,
            "id": self.id,
            "config": self.config,
            "revision": commit or self.revision,
            "digest": digest.hexdigest(),
            **self.column_settings(),
        }
        classes = _class_names(found[chosen["train"]], self.label or self.labels)
        return Reading(examples, provenance, {"empty": empty}, classes=classes)

    def preview(self, root: Path, task: Task, rows: int) -> list[Example]:
        """Read the first rows of each split of a directory; the hub is not asked."""
        if not (root / self.id).is_dir():
            return []
        found, _ = self.model_copy(update={"streaming": True})._open(root)
        examples: list[Example] = []
        for split, name in self._chosen(found).items():
            head = itertools.islice(self._iterate(_selected(found[name], self.wanted(split))), rows)
            for number, cells in enumerate(head, start=1):
                where = f"{name}:{number}"
                example = self.example(
                    cells, f"{self.id} {where}", split=split, source=where, row=len(examples)
                )
                examples += [] if example is None else [example]
        return examples

    def _open(self, root: Path) -> tuple[Mapping[str, Rows], str | None]:
        """Open all splits; also return the commit where the data set came from the hub."""
        local = root / self.id
        datasets.disable_progress_bars()
        with self._reported():
            if (local / "dataset_dict.json").is_file() or (local / "state.json").is_file():
                loaded = datasets.load_from_disk(str(local))
                if isinstance(loaded, datasets.Dataset):
                    loaded = datasets.DatasetDict({"train": loaded})
                if self.streaming:
                    return {str(k): rows.to_iterable_dataset() for k, rows in loaded.items()}, None
                return {str(name): rows for name, rows in loaded.items()}, None
            if not local.is_dir() and self.revision is None:
                logger.warning(
                    "corpus.source: %s is not pinned to a revision: what stands under its name may "
                    "change", self.id,
                )  # fmt: skip
            builder = self._builder(local)
            commit = self._pinned(builder.hash)
            if self.streaming:
                opened = builder.as_streaming_dataset()
            else:
                builder.download_and_prepare()
                opened = builder.as_dataset()
            assert isinstance(opened, dict)
            return {str(name): rows for name, rows in opened.items()}, commit

    def _builder(self, local: Path) -> datasets.DatasetBuilder:
        """Return the library's builder; `NA` and `null` in a csv are text, as in a table."""
        place = str(local) if local.is_dir() else self.id
        found = datasets.load_dataset_builder(place, self.config, revision=self.revision)
        if hasattr(found.config, "keep_default_na"):
            found = datasets.load_dataset_builder(
                place, self.config, revision=self.revision, keep_default_na=False
            )
        return found

    def _pinned(self, found: str | None) -> str | None:
        """Return the commit, and refuse another than was asked for.

        Offline the library takes the latest that the cache has, whatever the revision.
        """
        commit = found if _is_commit(found) else None
        if commit is not None and _is_commit(self.revision) and commit != self.revision:
            raise ConfigError(
                f"corpus.source.revision: the cache has {self.id} at {commit}, expected "
                f"{self.revision}; fetch it once online, or correct the revision"
            )
        return commit

    def _chosen(self, found: Mapping[str, Rows]) -> dict[Split, str]:
        """Return the data set's split for each of ours."""
        chosen = self.splits or {split: split for split in SPLITS if split in found}
        for split in ("train", *chosen):
            if chosen.get(split) not in found:
                raise ConfigError(
                    f"corpus.source.splits.{split}: {self.id} has no split "
                    f"{chosen.get(split, split)!r}, it has {', '.join(found)}; name one of them"
                )
        return {split: chosen[split] for split in SPLITS if split in chosen}

    def _iterate(self, rows: Rows) -> Iterator[dict[str, Any]]:
        """Yield rows with classes by name; errors in mid-stream are the data set's too."""
        named = _namers(rows)
        iterator = iter(rows)
        while True:
            with self._reported():
                batch = list(itertools.islice(iterator, 1))
            if not batch:
                return
            cells = dict(batch[0])
            for column, name in named.items():
                if column in cells:
                    cells[column] = name(cells[column])
            yield cells

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        """Report what the library raises as one line that names the data set."""
        try:
            yield
        except (OSError, ValueError, RuntimeError, DatasetsError, pa.ArrowException) as error:
            reason = in_short(error)
            raise ConfigError(
                f"corpus.source: {self.id} cannot be read ({reason}); expected a directory, or a "
                "data set of the hub or the local cache: correct id, config or revision"
            ) from error


def _is_commit(name: str | None) -> bool:
    """Tell a commit's full name, as a data set's hash is where it came from the hub."""
    return name is not None and re.fullmatch(r"[0-9a-f]{40}", name) is not None


def _selected(rows: Rows, wanted: list[str]) -> Rows:
    """Leave out columns that nothing is read from: images and sounds would be decoded."""
    there = rows.column_names
    if there is None or not set(wanted) <= set(there):
        return rows
    return rows.select_columns(list(dict.fromkeys(wanted)))


def _class_feature(feature: Any) -> tuple[datasets.ClassLabel | None, bool]:
    """Return the classes of a column, where it has some, and whether a cell is a list of them."""
    items = getattr(feature, "feature", None)
    if isinstance(items, datasets.ClassLabel):
        return items, True
    return (feature if isinstance(feature, datasets.ClassLabel) else None), False


def _class_names(rows: Rows, column: str | None) -> tuple[str, ...]:
    """Return the names of a column's classes in the data set's order, which models of it share.

    F1 of two classes is that of the second: GLUE's paraphrases, not what sorting makes of them.
    """
    names, _ = _class_feature((rows.features or {}).get(column))
    return () if names is None else tuple(str(name).strip() for name in names.names)


def _namers(rows: Rows) -> dict[str, Callable[[Any], Any]]:
    """Return, by column, what turns a class's number into its name; a list's item by item."""
    found: dict[str, Callable[[Any], Any]] = {}
    for column, feature in (rows.features or {}).items():
        names, is_list = _class_feature(feature)
        if names is None:
            continue
        if is_list:
            found[column] = lambda values, names=names: (
                None if values is None else [_name(names, value) for value in values]
            )
        else:
            found[column] = lambda value, names=names: _name(names, value)
    return found


def _name(names: datasets.ClassLabel, number: int | None) -> str | None:
    """Return a class's name; published test splits without answers hold -1."""
    return None if number is None or number < 0 else str(names.int2str(number))
