"""Unlike families keep what `check` promises, and the page of all families is the last run's."""

from pathlib import Path

import pytest
import transformers

from tests.captured import Captured
from tests.families.configs import TASKS, families
from tests.families.lifecycle import as_row, foreign_teacher, live
from tests.families.page import PAGE, cells, read_page

UNLIKE = [
    ("llama", "causal-lm"),
    ("gemma3", "causal-lm"),  # reads images too
    ("mamba", "causal-lm"),  # no attention
    ("bloom", "causal-lm"),  # attention outside the interface
    ("falcon", "causal-lm"),  # computed keys
    ("gpt_oss", "causal-lm"),  # attention sinks
    ("mixtral", "causal-lm"),  # experts
    ("bart", "causal-lm"),  # encoder-decoder
    ("roberta", "classification"),  # positions behind the padding id
    ("albert", "classification"),  # one block for all layers
    ("fnet", "classification"),  # ignores the attention mask
    ("deberta-v2", "classification"),  # attention of its own
    ("squeezebert", "classification"),  # blocks that no hook sees
]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory):
    made: dict[str, Captured] = {}

    def teacher(task: str) -> Captured:
        if task not in made:
            made[task] = foreign_teacher(task, tmp_path_factory.mktemp("foreign"))
        return made[task]

    return teacher


@pytest.mark.parametrize(("family", "task"), UNLIKE)
@pytest.mark.filterwarnings("ignore")
def test_a_family_keeps_what_check_promises(family: str, task: str, teachers, tmp_path: Path):
    row = as_row(live(family, task, tmp_path, teachers))
    assert row["broken"] == []
    assert cells(row) == read_page()[task][family]


def test_the_page_is_of_the_installed_version_and_of_all_families():
    assert f"The last run: transformers {transformers.__version__}." in PAGE.read_text()
    page = read_page()
    assert {task: sorted(rows) for task, rows in page.items()} == {
        task: families(task) for task in TASKS
    }
    assert "broken" not in {cell for rows in page.values() for row in rows.values() for cell in row}
