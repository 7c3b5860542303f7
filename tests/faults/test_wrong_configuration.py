"""A wrong configuration ends in exit code 2 and its key, before torch or a model is touched."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cases import LAYERS, ROOT, tiny_params, write_corpus, write_params

TEACHER, STUDENT = "teachers.main", "students.aligned"
CAPTURE, LOSS = f"{TEACHER}.capture", f"{STUDENT}.loss"
NAN, INF = float("nan"), float("inf")

KEYS = [
    # command, key, value, what the one line says
    ("check", "corpus.sources", {}, "corpus.sources: unknown key; did you mean 'source'?"),
    ("check", "student", {}, "student: unknown key; did you mean 'students'?"),
    ("check", f"{CAPTURE}.hidden.layers", [99], f"{CAPTURE}.hidden.layers: layer 99 asked for"),
    ("check", f"{CAPTURE}.attention.layers", [0], f"the teacher has 1 to {LAYERS}"),
    ("check", f"{CAPTURE}.hidden.layers", [1, 1], "repeats a layer; expected each layer once"),
    ("check", f"{CAPTURE}.hidden.layers", [-1], f"{CAPTURE}.hidden.layers: layer -1 asked for"),
    ("check", f"{LOSS}.output.weight", -1, f"{LOSS}.output.weight: found -1, expected"),
    ("check", f"{LOSS}.output.weight", NAN, f"{LOSS}.output.weight: found nan, expected a finite"),
    ("check", f"{LOSS}.output.weight", INF, f"{LOSS}.output.weight: found inf, expected a finite"),
    ("check", f"{LOSS}.output.temperature", 0, f"{LOSS}.output.temperature: found 0, expected"),
    ("check", f"{STUDENT}.train.learning_rate", 0, "learning_rate: found 0, expected a number gre"),
    ("check", f"{STUDENT}.teacher", "mian", f"{STUDENT}.teacher: found 'mian', expected one of"),
    ("check", "students.extra", {"teacher": "main"}, "students.extra.model: missing; add it"),
    ("check", "students.../up", tiny_params()["students"]["soft"], "students.../up: the name bec"),
    ("prepare", "corpus.source.fils", "x", "corpus.source.fils: unknown key; did you mean 'file"),
    ("prepare", "corpus.test_share", NAN, "corpus.test_share: found nan, expected a finite num"),
    ("prepare", "corpus.test_share", 0.7, "corpus.test_share: found 0.7, expected a number less"),
    ("tokenize main", f"{TEACHER}.tokens.vocab", -5, f"{TEACHER}.tokens.vocab: found -5, expect"),
    ("tokenize main", f"{TEACHER}.tokens.max_lenght", 5, "unknown key; did you mean 'max_length'?"),
    ("teach main", f"{TEACHER}.fit.epoch", 1, f"{TEACHER}.fit.epoch: unknown key; did you mean"),
    ("teach main", f"{TEACHER}.fit.warmup", 1.5, f"{TEACHER}.fit.warmup: found 1.5, expected"),
    ("teach main", f"{TEACHER}.model.path", "x", f"{TEACHER}.model: expected exactly one of path"),
    ("generate main", f"{TEACHER}.tokens.targets", "own", f"{TEACHER}.tokens.targets: found 'own'"),
    ("capture main", f"{CAPTURE}.hidden.form", "int9", f"{CAPTURE}: hidden.form: found 'int9'"),
    ("capture main", f"{CAPTURE}.logits.kk", 5, "the form topk has no such option; did you mean"),
    ("capture main", f"{CAPTURE}.logits.k", 0, "logits.k: found 0, expected"),
    ("capture main", f"{CAPTURE}.fraction", INF, f"{CAPTURE}.fraction: found inf, expected a fin"),
    ("capture main", f"{CAPTURE}.dtype", "object", f"{CAPTURE}.dtype: found 'object', expected"),
    ("select aligned", f"{LOSS}.feature.weight", -0.1, f"{LOSS}.feature.weight: found -0.1"),
    ("select aligned", f"{LOSS}.features", {}, f"{LOSS}.features: unknown key"),
    ("train aligned", f"{STUDENT}.train.batch_size", 0, "train.batch_size: found 0, expected"),
    ("train aligned", f"{STUDENT}.model.lora", {"r": NAN}, "model.lora.r: found nan, expected"),
    ("train algned", "unused", 1, "students has no 'algned', it has soft, aligned; add it"),
    ("evaluate aligned", "evaluate.scores", "x", "evaluate.scores: unknown key; did you mean 'sc"),
    ("evaluate-teacher main", "evaluate.samples", -1, "evaluate.samples: found -1, expected a num"),
    ("report", "evaluate.samples", NAN, "evaluate.samples: found nan, expected a finite number"),
    ("compare aligned soft", "evaluate.score", "best", "evaluate.score: found 'best', expected"),
]  # fmt: skip
TEXTS = [
    # command, all of params.yaml, what the one line says
    ("check", "corpus: !!python/object/apply:os.system ['touch executed']\n", "not YAML"),
    ("prepare", "corpus: !!python/name:os.system\n", "not YAML"),
    ("check", "students:\n  a: {}\n  a: {}\n", 'found duplicate key "a"'),
    ("train a", "students:\n  a: {}\n  a: {}\n", 'found duplicate key "a"'),
    ("prepare", "corpus: [1\n", "not YAML"),
    ("check", "- a list\n", "expected a mapping"),
    ("prepare", "", "the file has no 'corpus'"),
    ("prepare",
     "a: &a [x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\n"
     "d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d]\n"
     "f: &f [*e,*e,*e,*e,*e,*e,*e,*e,*e]\ng: &g [*f,*f,*f,*f,*f,*f,*f,*f,*f]\n"
     "h: &h [*g,*g,*g,*g,*g,*g,*g,*g,*g]\ni: &i [*h,*h,*h,*h,*h,*h,*h,*h,*h]\n"
     "corpus: [*i,*i,*i,*i,*i,*i,*i,*i,*i]\n", "aliases"),
    ("check", "a: &a\n  b: *a\n", "aliases"),
    ("check", "x: " + "[" * 3000 + "]" * 3000, "not YAML"),
]  # fmt: skip


def changed(key: str, value: Any) -> dict[str, Any]:
    """The tiny project with one key set; a name may have points in it."""
    params = copy.deepcopy(tiny_params())
    place = params
    while True:
        found = next((name for name in place if key.startswith(f"{name}.")), None)
        if found is None or not isinstance(place[found], dict):
            break
        place, key = place[found], key.removeprefix(f"{found}.")
    place[key] = value
    return params


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict[str, Any]]:
    """How every case ended, one after the other in a process that has not imported torch."""
    root = tmp_path_factory.mktemp("configurations")
    cases = []
    for number, (command, *case) in enumerate([*KEYS, *TEXTS]):
        folder = root / str(number)
        folder.mkdir()
        write_corpus(folder / "corpus.txt", lines=3)
        if len(case) == 3:
            write_params(folder, changed(*case[:2]))
        else:
            (folder / "params.yaml").write_text(case[0], encoding="utf-8")
        cases.append([str(folder), command.split()])
    (root / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.try_configurations", str(root / "cases.json")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert not list(root.rglob("executed"))
    assert not list(root.glob("*/data"))
    return json.loads(done.stdout)


def name_of(case: tuple[Any, ...]) -> str:
    return " ".join(str(part) for part in case[:-1])[:70].replace("\n", " ")


@pytest.mark.parametrize(
    ("number", "message"),
    [(number, case[-1]) for number, case in enumerate([*KEYS, *TEXTS])],
    ids=[f"{number} {name_of(case)}" for number, case in enumerate([*KEYS, *TEXTS])],
)
def test_it_is_named_before_anything_is_loaded(results, ledger, number, message):
    found = results[number]
    lines = [line for line in found["output"].splitlines() if line.startswith("error: params.yaml")]
    is_light = "heavy: False" in found["output"]
    is_right = found["code"] == 2 and len(lines) == 1 and message in lines[0] and is_light
    ledger.record("wrong configuration", detected=is_right)
    assert found["code"] == 2, found["output"][-2000:]
    assert len(lines) == 1, found["output"][-2000:]
    assert message in lines[0]
    assert is_light
    assert "Traceback" not in found["output"]


def test_a_hundred_megabytes_of_parameters_are_not_read(tmp_path: Path):
    from pipeline.errors import ConfigError
    from stages.parameters import read_yaml

    path = tmp_path / "params.yaml"
    path.touch()
    os.truncate(path, 100 * 2**20)
    with pytest.raises(ConfigError, match=r"104857600 bytes, expected at most .* parameters"):
        read_yaml(path)
