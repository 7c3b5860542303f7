"""Real corpora and tokenizers that lie beside the repository, where they do."""

import csv
import gzip
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from pipeline.corpus.sources.registry import CorpusSource
from pipeline.corpus.text.examples import CorpusMeta
from pipeline.corpus.text.prepare import prepare_corpus
from pipeline.tasks import Task

REPOSITORY = Path(__file__).resolve().parents[2]


def _beside(folder: str) -> Path:
    path = REPOSITORY.parent / "shared" / folder
    if not path.is_dir():
        pytest.skip(f"no {folder} beside the repository")
    return path


@pytest.fixture(scope="session")
def real_corpora() -> Path:
    return _beside("corpora")


@pytest.fixture(scope="session")
def real_models() -> Path:
    return _beside("models")


@pytest.fixture
def write_table(tmp_path) -> Callable[..., Path]:
    """Write rows of cells, the first of them the header, as a file under tmp_path."""

    def write(name: str, rows: list[list[str]]) -> Path:
        path = tmp_path / name
        opener = gzip.open if name.endswith(".gz") else open
        delimiter = "," if ".csv" in name else "\t"
        with opener(path, "wt", encoding="utf-8", newline="") as file:
            csv.writer(file, delimiter=delimiter, lineterminator="\n").writerows(rows)
        return path

    return write


@pytest.fixture
def prepare(tmp_path) -> Callable[..., CorpusMeta]:
    """Prepare a source of tmp_path into tmp_path/text."""

    def run(
        source: CorpusSource,
        task: Task = "causal-lm",
        classes: list[str] | None = None,
        seed: int = 0,
        output: str = "text",
        share: float = 0.1,
        added: Sequence[CorpusSource] = (),
    ) -> CorpusMeta:
        return prepare_corpus(
            source=source,
            task=task,
            classes=classes,
            seed=seed,
            validation_share=share,
            test_share=share,
            output=tmp_path / output,
            root=tmp_path,
            added=added,
        )

    return run
