"""A project small enough to be killed two hundred times: what capture, select and train need."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.corpus.tokens.transfer import RECORD
from pipeline.errors import IntegrityError
from pipeline.provenance import read_json, unfinished_files, write_json
from pipeline.store.layout import Layout
from pipeline.store.reader import StoreReader
from tests.captured import LENGTHS, write_rows, write_teacher
from tests.cases import write_params
from tests.tiny import tiny_model

SEGMENTS = {"segment_tokens": 64, "chunk_tokens": 16, "batch_tokens": 60}
CAPTURE: dict[str, Any] = {
    "hidden": {"layers": [0, 2], "form": "int8"},
    "attention": {"layers": [2], "form": "qk"},
    "logits": {"form": "head"},
    "blocks": [1],
    **SEGMENTS,
}
STUDENT: dict[str, Any] = {
    "teacher": "main",
    "model": {
        "architecture": {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "intermediate_size": 16,
            "head_dim": 4,
            "attention_dropout": 0.3,
        }
    },
    "loss": {
        "feature": {"weight": {"start": 0.5, "end": 0.1}},
        "attention": {"weight": 0.3},
        "output": {"weight": 1.0, "form": "head"},
        "labels": {"weight": 0.5},
    },
    "train": {
        "steps": 5,
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.01,
        "schedule": "constant_with_warmup",
        "log_every": 1,
        "save_every": 2,
    },
    "pool_segments": 2,
}
UNFINISHED = ("stores/*/staging/*/*", "students/.*", "work/*/*")
Values = dict[str, dict[int, dict[str, NDArray[Any]]]]


@dataclass(frozen=True)
class SmallProject:
    """Tokens of nonsense, a random teacher of two blocks, and parameters, below one directory."""

    root: Path

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def teacher(self) -> Path:
        return self.data / "teachers" / "main"

    @property
    def stores(self) -> Path:
        return self.data / "stores"

    @property
    def store(self) -> Path:
        (path,) = self.stores.iterdir()
        return path

    @property
    def layout(self) -> Layout:
        return Layout(self.store)

    @property
    def student(self) -> Path:
        return self.data / "students" / "small"

    @property
    def curve(self) -> Path:
        return self.data / "metrics" / "curves" / "small.csv"

    def parameters(
        self, capture: Mapping[str, Any] = CAPTURE, student: Mapping[str, Any] = STUDENT
    ) -> None:
        """Write `params.yaml`."""
        write_params(
            self.root,
            {
                "corpus": {
                    "source": {"kind": "text", "files": "corpus.txt", "examples": "line"},
                    "task": "causal-lm",
                },
                "teachers": {"main": {"model": {"path": "unused"}, "capture": dict(capture)}},
                "students": {"small": dict(student)},
            },
        )

    def copy(self, root: Path) -> "SmallProject":
        """Return a copy to do harm to."""
        shutil.copytree(self.root, root, symlinks=True)
        return SmallProject(root)

    def manifests(self) -> dict[str, bytes]:
        """What DVC would keep: it ignores the unfinished file of a record."""
        folder = self.data / "manifests" / "main"
        return {path.name: path.read_bytes() for path in folder.glob("*.json")}

    def digests(self) -> dict[str, str]:
        """The content digests of the signals that readers see."""
        reader = StoreReader(self.store)
        return {name: reader.signal(name).digest for name in reader.signals}

    def values(self) -> Values:
        """Return every value that a reader sees, each file checked; none without a store."""
        stores = list(self.stores.glob("*"))
        if not stores or not Layout(stores[0]).index.exists():
            return {}
        reader = StoreReader(stores[0])
        found: Values = {name: {} for name in reader.signals}
        for name in reader.signals:
            for number in reader.signal(name).receipts:
                found[name][number] = reader.read_segment(number, [name]).features[name]
        return found

    @cached_property
    def whole(self) -> Values:
        """The same, read once."""
        return self.values()

    def receipts(self) -> dict[Path, int]:
        """When each receipt, and each file that one speaks of, was written."""
        found: dict[Path, int] = {}
        for receipt in self.stores.glob("*/receipts/*/0*.json"):
            store = receipt.parents[2]
            files = [store / name for name in read_json(receipt)["files"]]
            found |= {path: path.stat().st_mtime_ns for path in (receipt, *files)}
        return found

    def unfinished(self) -> list[Path]:
        """Files and directories that a process had begun and that nobody will finish."""
        begun = [path for folder in UNFINISHED for path in self.data.glob(folder)]
        return [*begun, *unfinished_files(self.stores)]


def small_project(root: Path, *, lengths: Mapping[Any, Sequence[int]] = LENGTHS) -> SmallProject:
    """Make the project; nothing is captured yet."""
    project = SmallProject(root)
    tokens = project.data / "corpus" / "tokens" / "main"
    write_rows(tokens, lengths=lengths)
    write_json(project.data / "corpus" / "transfer" / "main" / RECORD, {"targets": "corpus"})
    write_teacher(project.teacher, tiny_model("llama"))
    project.parameters()
    return project


def differ(found: Values, whole: Values) -> bool:
    """Tell whether a signal that readers see is not whole, or has another value anywhere."""
    return any(
        found[name].keys() != whole[name].keys()
        or any(
            not np.array_equal(values[part], whole[name][number][part])
            for number, values in found[name].items()
            for part in whole[name][number]
        )
        for name in found
    )


def read_or_refuse(project: SmallProject) -> Values | None:
    """Return what readers see; None if what they see is damaged, which an error says."""
    try:
        return project.values()
    except IntegrityError:
        return None
