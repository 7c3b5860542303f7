"""The table of scores: directions, tasks, GLUE's choice, and what is refused."""

import pytest

from pipeline.errors import ConfigError
from pipeline.scores.registry import GLUE, SCORES, headline, reported, scores_of
from pipeline.tasks import TASKS


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
