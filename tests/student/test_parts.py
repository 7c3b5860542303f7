"""A student of the store of more text may train on the text there was before."""

import shutil

import pytest

from pipeline.errors import IncompatibleError
from pipeline.provenance import read_json
from pipeline.student.align.objective import Objective
from pipeline.student.vocabulary.vocabulary import corpus_vocabulary
from tests.captured import Captured, prepared, signal
from tests.grown import grown
from tests.student.runs import curve, equal, run, train

SIGNALS = [
    signal("hidden", 0, "bfloat16"),
    signal("hidden", 1, "bfloat16"),
    signal("logits", None, "topk", k=8),
]
GOAL = Objective.model_validate(
    {
        "feature": {"weight": 0.5},
        "output": {"weight": 1.0, "form": "topk"},
        "labels": {"weight": 0.5},
    }
)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Captured:
    found = prepared(tmp_path_factory.mktemp("small"), "llama", layers=1)
    found.capture(SIGNALS, blocks=[1])
    return found


@pytest.fixture(scope="module")
def large(small, tmp_path_factory) -> Captured:
    """The larger store alone, of which part is that of the smaller."""
    found = grown(small, tmp_path_factory.mktemp("large") / "p")
    (before,) = found.stores.iterdir()
    found.capture(SIGNALS, blocks=[1])
    shutil.rmtree(before)
    return found


def test_a_student_of_the_first_part_is_the_student_of_the_old_store(small, large, tmp_path):
    roots = [tmp_path / name for name in ("old", "first", "all")]
    settings = {"signals": SIGNALS, "objective": GOAL, "options": {"steps": 5}}
    old = train(small, roots[0], **settings)
    assert equal(train(large, roots[1], parts=1, **settings), old)
    assert curve(roots[1]) == curve(roots[0])
    run(large, roots[2], **settings)
    assert curve(roots[2]) != curve(roots[0])
    records = [read_json(root / "student" / "distillation.json") for root in roots]
    assert [record.get("parts") for record in records] == [None, 1, None]


def test_more_parts_than_there_are_are_refused_before_the_first_step(large, tmp_path):
    with pytest.raises(IncompatibleError, match="has 2 parts of training text, expected at least"):
        train(large, tmp_path, signals=SIGNALS, objective=GOAL, parts=3)


def test_the_vocabulary_is_that_of_the_parts(small, large):
    assert corpus_vocabulary(large.reader, 1).ids.equal(corpus_vocabulary(small.reader).ids)
