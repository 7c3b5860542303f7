"""What a task asks of a source: every key that is missing or too much is named."""

import pytest

from pipeline.corpus.sources.hub import HubSource
from pipeline.corpus.sources.parallel import ParallelSource
from pipeline.corpus.sources.python_docs import PythonDocsSource
from pipeline.corpus.sources.table import TableSource
from pipeline.corpus.sources.text import TextSource
from pipeline.corpus.text.checks import check_labels, check_task, classes_of
from pipeline.corpus.text.examples import Example
from pipeline.errors import ConfigError
from pipeline.tasks import TASKS

PARALLEL = ParallelSource(text="a", target="b")
GOOD = {
    "causal-lm": [{}, {"text": "t"}],
    "prompt-target": [
        {"target": "t"},
        {"target": ("t", "u"), "pair": "p"},
        {"target": "t", "alternatives": "|"},
    ],
    "messages": [{"messages": "m"}],
    "classification": [{"label": "y"}, {"text": "a", "pair": "b", "label": "y"}],
    "multi-label": [{"labels": "y"}, {"labels": "y", "separator": ";"}],
    "regression": [{"label": "y"}, {"pair": "b", "label": "y"}],
}


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_its_keys_whatever_the_source(task):
    for keys in GOOD[task]:
        check_task(TableSource(files="f", **keys), task, None)
        check_task(HubSource(id="i", **keys), task, None)


@pytest.mark.parametrize(
    ("task", "keys", "message"),
    [
        ("prompt-target", {}, "source.target: missing; task prompt-target needs it"),
        ("messages", {}, "source.messages: missing"),
        ("classification", {}, "source.label: missing"),
        ("multi-label", {"label": "y"}, "source.labels: missing"),
        ("regression", {"labels": "y"}, "source.label: missing"),
        ("causal-lm", {"target": "t"}, "'t' which task causal-lm does not use; remove it, or use "),
        ("causal-lm", {"pair": "p"}, "'p' makes pairs of texts, which task causal-lm"),
        ("classification", {"label": "y", "target": "t"}, "use task prompt-target"),
        ("messages", {"messages": "m", "text": "t"}, "source.text: 't' which task messages"),
        ("messages", {"messages": "m", "label": "y"}, "source.label: 'y'"),
        ("multi-label", {"labels": "y", "label": "y"}, "source.label: 'y'"),
        ("regression", {"label": "y", "separator": ";"}, "source.separator: ';'"),
    ],
)
def test_a_key_that_is_missing_or_too_much_is_named(task, keys, message):
    for source in (TableSource(files="f", **keys), HubSource(id="i", **keys)):
        with pytest.raises(ConfigError, match=message):
            check_task(source, task, None)


def test_sources_without_columns_serve_their_tasks_alone():
    served = {
        "causal-lm": (PythonDocsSource(), TextSource(files="f")),
        "prompt-target": (PythonDocsSource(), PARALLEL),
    }
    for task in TASKS:
        for source in (PythonDocsSource(), TextSource(files="f"), PARALLEL):
            if source in served.get(task, ()):
                check_task(source, task, None)
            else:
                with pytest.raises(ConfigError, match=rf"task: {task} needs .* names none"):
                    check_task(source, task, None)


@pytest.mark.parametrize("task", ["causal-lm", "prompt-target", "messages", "regression"])
def test_classes_of_a_task_without_any_are_refused(task):
    with pytest.raises(ConfigError, match=f"2 classes for task {task}, expected none"):
        check_task(TableSource(files="f", **GOOD[task][0]), task, ["a", "b"])


def test_classes_of_several_labels_are_those_of_any_training_row():
    rows = [Example("a", labels=("10", "2")), Example("b", labels=()), Example("c", labels=("1",))]
    assert classes_of("multi-label", rows) == ("1", "2", "10")
    check_labels("multi-label", {"train": rows}, ("1", "2", "10"))
    with pytest.raises(ConfigError, match="label '10' in a train row, expected one of '1', '2'"):
        check_labels("multi-label", {"train": rows}, ("1", "2"))
    with pytest.raises(ConfigError, match="here: no label in a train row, expected a class"):
        classes_of("multi-label", [*rows, Example("d", source="here")])
    with pytest.raises(ConfigError, match="the training split has no class"):
        classes_of("multi-label", rows[1:2])


@pytest.mark.parametrize("label", ["high", "nan", "inf", "-inf", "1,5", "-1e39"])
def test_a_regression_needs_finite_numbers(label):
    check_labels("regression", {"train": [Example("a", label="-1.5e3")]}, ())
    with pytest.raises(ConfigError, match=f"here: label '{label}' in a test row, expected a fin"):
        check_labels("regression", {"test": [Example("a", label=label, source="here")]}, ())
    with pytest.raises(ConfigError, match="no label in a test row, expected a number"):
        check_labels("regression", {"test": [Example("a", label="")]}, ())
