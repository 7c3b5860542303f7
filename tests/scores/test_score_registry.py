"""The table of scores: directions, tasks, GLUE's choice, and what is refused."""

import numpy as np
import pytest

from pipeline.errors import ConfigError
from pipeline.evaluate.predictions import score_rows
from pipeline.registry import Registry
from pipeline.report.measures import groups_of
from pipeline.scores import registry
from pipeline.scores.metric import values
from pipeline.scores.registry import GLUE, SCORES, headline, reported, scores_of
from pipeline.tasks import TASKS
from tests.installed import install_package


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_judged_by_a_score_that_it_has(task):
    score = headline(task, None)
    assert task in scores_of(task)[score].tasks
    assert reported(task, score)[0] == score
    assert len(set(reported(task, score))) == len(reported(task, score))


def test_glue_names_stand_for_glues_scores():
    assert headline("classification", "cola") == "matthews"
    assert headline("classification", "mrpc") == "accuracy_f1"
    assert headline("regression", "stsb") == "pearson_spearman"
    assert set(GLUE.values()) <= {score.name for score in SCORES.values()}


def test_a_combined_score_is_reported_where_it_is_asked_for():
    assert "accuracy_f1" in reported("classification", "accuracy_f1")
    assert "accuracy_f1" not in reported("classification", headline("classification", None))


@pytest.mark.parametrize(("task", "asked"), [("regression", "cola"), ("causal-lm", "bleu")])
def test_a_score_of_another_task_is_refused_with_those_there_are(task, asked):
    with pytest.raises(ConfigError, match=f"found '{asked}', the task {task} has .*; choose one"):
        headline(task, asked)


def test_a_score_that_nobody_knows_is_refused():
    with pytest.raises(ConfigError, match=r"classification has accuracy, f1, .*sst2"):
        headline("classification", "acuracy")


SCORE = """
import numpy as np

from pipeline.scores.metric import mean
from pipeline.scores.score import Score
from pipeline.scores.text import GeneratedText


def _length(answers):
    return mean(np.array([float(len(text)) for text in answers.texts]))


length = Score("length", GeneratedText, _length, heading="characters", lower_is_better=True)
"""


def test_a_score_of_another_package_is_computed_and_shown(monkeypatch, tmp_path):
    install_package(
        monkeypatch,
        tmp_path,
        name="length-score",
        code=SCORE,
        entries={"decant.scores": {"text.length": "length_score:length"}},
    )
    fresh = Registry(
        "score", package="pipeline.scores", group="decant.scores", name_of=SCORES._name_of
    )
    monkeypatch.setattr(registry, "SCORES", fresh)
    row = {"row": 0, "source_row": 0, "nats": 1.0, "targets": 2}
    rows = [row | {"text": text, "references": ["a"]} for text in ("a", "abc")]
    _, scored = score_rows(rows, "prompt-target")
    assert values(scored.metrics, 2)["length"] == np.mean([1, 3])
    assert "characters" in [m.heading for group in groups_of("messages") for m in group.measures]
    assert headline("messages", "length") == "length"
