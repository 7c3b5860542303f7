"""generate@T: the corpus's targets are kept, or the teacher writes those that students learn."""

import shutil
from pathlib import Path

import pytest

from pipeline.corpus.tokens.tokens import TokenSet
from pipeline.evaluate.options import GenerateOptions
from pipeline.generation.options import GenerationOptions
from pipeline.provenance import read_json, write_json
from tests.cases import error_line, tiny_params, write_params

TRANSFER = Path("data/corpus/transfer/main")
TOKENS = Path("data/corpus/tokens/main")


def test_the_corpuss_own_targets_cost_nothing_and_load_nothing(decant, project):
    shutil.rmtree(TRANSFER)
    shutil.rmtree("data/teachers")
    assert decant("generate", "main").exit_code == 0
    assert [path.name for path in TRANSFER.iterdir()] == ["transfer.json"]
    assert read_json(TRANSFER / "transfer.json") == {"targets": "corpus"}


def test_evaluation_generates_with_the_defaults_of_every_generation():
    def defaults(section):
        return {
            name: (field.default, field.metadata) for name, field in section.model_fields.items()
        }

    library = defaults(GenerationOptions)
    evaluated = defaults(GenerateOptions)
    assert {name: library[name] for name in evaluated if name != "rows"} == {
        name: field for name, field in evaluated.items() if name != "rows"
    }


def test_a_task_without_prompts_is_refused(decant, project):
    params = tiny_params()
    params["teachers"]["main"]["tokens"]["targets"] = "teacher"
    write_params(project, params)
    result = decant("generate", "main")
    assert result.exit_code == 2
    assert "teachers.main.tokens.targets: teacher does not fit the task causal-lm" in error_line(
        result
    )


def test_capture_says_that_generate_has_not_run(decant, project):
    shutil.rmtree(TRANSFER)
    result = decant("capture", "main")
    assert result.exit_code == 3
    assert "data/corpus/transfer/main/transfer.json: missing" in error_line(result)


def write_pairs(path: Path) -> None:
    """Write prompts of letters and targets that say how each is pronounced."""
    letters = "abcdefghij"
    lines = ["prompt\ttarget"]
    for number in range(160):
        word = "".join(letters[(number * step + step) % 10] for step in (1, 3, 7))
        lines.append(f"{word}{number}\t{' '.join(word.upper())} {number}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def prompted(tmp_path, monkeypatch):
    params = tiny_params()
    params["corpus"] = {
        "source": {"kind": "table", "files": "pairs.tsv", "text": "prompt", "target": "target"},
        "task": "prompt-target",
    }
    params["teachers"]["main"]["tokens"] = {
        "vocab": 300,
        "max_length": 32,
        "targets": "teacher",
        "generation": {"max_new_tokens": 5, "batch_size": 32},
    }
    params["students"] = {"soft": params["students"]["soft"]}
    params["evaluate"] = {
        "intervals": {"resamples": 20},
        "generate": {"rows": 4, "max_new_tokens": 5},
    }
    write_pairs(tmp_path / "pairs.tsv")
    write_params(tmp_path, params)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_a_student_learns_from_the_teachers_text(decant, prompted):
    for arguments in (
        ("prepare",),
        ("tokenize", "main"),
        ("teach", "main"),
        ("generate", "main"),
        ("capture", "main"),
        ("select", "soft"),
        ("train", "soft"),
        ("evaluate-teacher", "main"),
        ("evaluate", "soft"),
        ("report",),
    ):
        result = decant(*arguments)
        assert result.exit_code == 0, result.output
    corpus, transfer = TokenSet.load(TOKENS).meta, TokenSet.load(TRANSFER).meta
    record = read_json(TRANSFER / "transfer.json")
    assert record["tokens"] == corpus.digest
    assert record["rows"] == corpus.rows["train"] == transfer.rows["train"]
    assert record["new_tokens"] == transfer.targets["train"] <= 5 * record["rows"]
    stored = read_json(next(Path("data/manifests/main").glob("logits*.json")))
    counted = ("validation", "test")
    assert stored["tokens"] == transfer.tokens["train"] + sum(corpus.tokens[s] for s in counted)
    page = Path("data/reports/index.html").read_text(encoding="utf-8")
    assert "Read side by side" in page
    assert "Generated text against the teacher" in page
    # Text of tokens that are no more is not captured as if nothing had happened.
    write_json(TRANSFER / "transfer.json", record | {"tokens": "0" * 64})
    result = decant("capture", "main")
    assert result.exit_code == 3
    assert "run `decant generate main`" in error_line(result)
