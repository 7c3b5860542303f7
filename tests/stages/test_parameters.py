"""A parameter that does not fit is one line: file, key, what was found, what was expected."""

import copy
import datetime as dt
from pathlib import Path
from typing import Any

import dvc.utils.serialize
import pytest

from pipeline.corpus.text.parameters import CorpusParams
from pipeline.errors import ConfigError, DecantError
from pipeline.evaluate.options import EvaluateParams
from pipeline.section import Section
from pipeline.student.parameters import StudentParams
from pipeline.teacher.parameters.teacher import TeacherParams
from stages.parameters import read_yaml, section, validate
from tests.cases import tiny_params, write_params


class ProjectParams(Section):
    """All of a file of parameters."""

    corpus: CorpusParams
    teachers: dict[str, TeacherParams]
    students: dict[str, StudentParams]
    evaluate: EvaluateParams


ROOT = Path(__file__).parents[2]
MISSING = object()
CAPTURE = "teachers.main.capture"
ALIGNED = "students.aligned"

CASES = [
    ("student", {}, "params.yaml: student: unknown key; did you mean 'students'?"),
    ("students", MISSING, "params.yaml: students: missing; add it"),
    ("corpus", None, "params.yaml: corpus: found None, expected a mapping"),
    ("corpus.source.kind", "txt", "found 'txt', expected 'hub', 'parallel', 'python-docs'"),
    ("corpus.source.files", 3, "corpus.source.files: found 3, expected a text or a list or a"),
    ("corpus.source.fils", "x", "corpus.source.fils: unknown key; did you mean 'files'?"),
    ("corpus.seed", dt.date(2020, 1, 1), "corpus.seed: YAML reads 2020-01-01 as date; put"),
    ("teachers.main.fit", MISSING, "teachers.main: fit is missing; say how to train the teacher"),
    ("teachers.main.model.path", "x", "teachers.main.model: expected exactly one of path and"),
    ("teachers.main.tokens.vocab", 3, "vocab: found 3, expected a number greater than or equal to"),
    (f"{CAPTURE}.hiden", {}, f"{CAPTURE}.hiden: unknown key; did you mean 'hidden'?"),
    (f"{CAPTURE}.hidden.layers", 7, f"{CAPTURE}.hidden.layers: found 7, expected 'all' or a"),
    (f"{CAPTURE}.hidden.layers", [0, "x"], "layers.1: found 'x', expected a whole number"),
    (f"{CAPTURE}.hidden.layers", {"evry": 2}, "evry: unknown key; did you mean 'every'?"),
    (f"{CAPTURE}.hidden.layer", [1], "hidden.layer: the form bfloat16 has no such option; did"),
    (
        f"{CAPTURE}.hidden.form",
        "int9",
        "hidden.form: found 'int9', expected one of bfloat16, fl",
    ),
    (f"{CAPTURE}.logits.k", "64", "logits.k: found '64', expected a valid integer"),
    (f"{CAPTURE}.logits.kk", 64, "logits.kk: the form topk has no such option; did you mean 'k'?"),
    (f"{CAPTURE}.segment_tokens", 1000, "segment_tokens is 1000, expected a multiple of chunk_"),
    (f"{ALIGNED}.loss.output.weight", "1e-4", "found '1e-4', expected a number; remove the quotes"),
    (f"{ALIGNED}.loss.output.weight", "x", "weight: found 'x', expected a number"),
    (
        f"{ALIGNED}.loss.output.weight",
        {"value": 1, "from": 0.5, "to": 0.2},
        "output.weight: from 0.5, to 0.2: expected from below to; correct it",
    ),
    (f"{ALIGNED}.loss.output.weight", {"value": 1, "form": 0.5}, "weight.form: unknown key here,"),
    (f"{ALIGNED}.loss.output.weight", {"start": 1, "untill": 1}, "did you mean 'until'?"),
    (f"{ALIGNED}.loss.output.weight", float("nan"), "weight: found nan, expected a finite number"),
    (f"{ALIGNED}.loss.outputs", {}, "loss.outputs: unknown key; did you mean 'output'?"),
    (f"{ALIGNED}.train.epochs", True, "train.epochs: found True, expected a whole number"),
    (f"{ALIGNED}.train.learning_rate", "1e-4", "found '1e-4', expected a number; remove the quote"),
    (f"{ALIGNED}.train.learning_rte", 1e-4, "unknown key; did you mean 'learning_rate'?"),
    (f"{ALIGNED}.model", {}, f"{ALIGNED}.model: expected exactly one of architecture and checkpoi"),
    (
        f"{ALIGNED}.align",
        {"layers": 7},
        "align.layers: found 7, expected uniform, last, emd or a mapping from student",
    ),
]


def changed(key: str, value: Any) -> dict[str, Any]:
    params = copy.deepcopy(tiny_params())
    *parents, last = key.split(".")
    place = params
    for part in parents:
        place = place[part]
    if value is MISSING:
        del place[last]
    else:
        place[last] = value
    return params


@pytest.mark.parametrize(("key", "value", "message"), CASES)
def test_what_does_not_fit_is_named(key, value, message):
    with pytest.raises(ConfigError) as caught:
        validate(changed(key, value), ProjectParams, file="params.yaml")
    text = str(caught.value)
    assert text.startswith("params.yaml: ")
    assert message in text
    assert "\n" not in text
    for noise in ("Input should", "Value error", "pydantic", "literal[", "tuple[", "LayersIn"):
        assert noise not in text


def test_a_misspelt_key_is_named_before_the_one_that_is_therefore_missing():
    params = changed("corpus.source", {"kind": "text", "fils": "corpus.txt"})
    with pytest.raises(ConfigError, match=r"fils: unknown key; did you mean 'files'\?"):
        validate(params, ProjectParams, file="params.yaml")


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", '"1e-4"', "0o17", "017", "yes", "on", "1_000"])
def test_yaml_means_what_dvc_means_by_it(tmp_path, text):
    path = tmp_path / "params.yaml"
    path.write_text(f"value: {text}\n")
    assert read_yaml(path) == dvc.utils.serialize.load_yaml(path)


def test_a_plain_exponent_is_a_number_and_a_quoted_one_is_refused(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text('plain: 1e-4\nquoted: "1e-4"\n')
    assert section(path, "plain", float) == 1e-4
    with pytest.raises(ConfigError, match="quoted: found '1e-4', expected a number; remove"):
        section(path, "quoted", float)


@pytest.mark.parametrize("text", ["a: [1", "a: 1\na: 2", "\x00", b"\xff\xfe\x00".decode("latin1")])
def test_a_file_that_is_no_yaml_is_one_line(tmp_path, text):
    path = tmp_path / "params.yaml"
    path.write_bytes(text.encode("latin1"))
    with pytest.raises(ConfigError, match=r"params.yaml: not YAML \(.*\); correct the file") as e:
        read_yaml(path)
    assert "\n" not in str(e.value)


def test_a_missing_file_or_section_is_named(tmp_path):
    with pytest.raises(ConfigError, match="No such file or directory; run the command in the dir"):
        section(tmp_path / "params.yaml", "corpus", dict)
    path = write_params(tmp_path, tiny_params())
    with pytest.raises(ConfigError, match=r"students has no 'wide', it has soft, aligned; add it"):
        section(path, "students.wide", dict)


def test_any_value_at_any_key_is_accepted_or_refused_in_one_line():
    values = [None, True, -1, 0.5, "x", [], {}, [1], {"a": 1}, {1: 2}, [[1]], {1: {"b": []}}]

    def keys(value: Any, path: str = "") -> list[str]:
        if not isinstance(value, dict):
            return [path]
        below = [k for name in value for k in keys(value[name], f"{path}.{name}".strip("."))]
        return [path, *below] if path else below

    for key in keys(tiny_params()):
        for value in values:
            try:
                validate(changed(key, value), ProjectParams, file="params.yaml")
            except DecantError as error:
                assert "\n" not in str(error)  # noqa: PT017
                assert str(error).startswith("params.yaml: ")  # noqa: PT017
