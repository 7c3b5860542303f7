"""Every preset fits together, and runs to its report on a small sample of real data."""

import contextlib
import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from ruamel.yaml import YAML

from stages.cli import main
from stages.init import presets

CORPORA = {
    "sst2": "sst2-sentence",
    "cola": "cola",
    "mrpc": "mrpc",
    "stsb": "sick",
    "translation": "multi30k",
    "summarisation": "dialogsum",
    "letter-to-phoneme": "cmudict-g2p",
    "language-modelling": "wikitext-2",
}
"""The folder of real data that each preset was written for."""
SHORT = {"steps": 4, "batch_size": 4}
HEADLINE = {
    "sst2": "accuracy",
    "cola": "matthews",
    "mrpc": "f1",
    "stsb": "pearson",
    "language-modelling": "perplexity_per_byte",
    "translation": "bleu",
    "summarisation": "rougeL",
    "letter-to-phoneme": "cer",
    "signature-to-summary": "chrf",
}
"""A score that the preset's task must show."""


def decant(*arguments: str | Path) -> None:
    result = CliRunner().invoke(main, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output


def test_every_preset_is_tried_here():
    assert set(presets()) - set(CORPORA) == {"python-docs", "signature-to-summary"}


@pytest.mark.parametrize("preset", presets())
def test_a_preset_passes_the_check(tmp_path, preset, monkeypatch):
    # Its files are the user's to bring.
    monkeypatch.setattr("stages.check.preview", lambda *_, **__: [])
    decant("init", tmp_path, "--preset", preset)
    with contextlib.chdir(tmp_path):
        decant("check")


@pytest.mark.parametrize("preset", ["sst2", "cola", "mrpc", "stsb", "language-modelling"])
def test_a_preset_from_the_hub_passes_the_check_once_its_teacher_is_pinned(
    tmp_path, monkeypatch, preset
):
    def unreachable(*_):
        raise OSError("the hub cannot be reached")

    monkeypatch.setattr("transformers.utils.hub.cached_file", unreachable)
    decant("init", tmp_path, "--preset", preset, "--hub")
    yaml = YAML()
    params = yaml.load((tmp_path / "params.yaml").read_text())
    # Where the hub can be reached, init has pinned it.
    params["teachers"]["main"]["model"]["revision"] = "main"
    with (tmp_path / "params.yaml").open("w") as file:
        yaml.dump(params, file)
    with contextlib.chdir(tmp_path):
        decant("check")


def shrink(project: Path) -> dict:
    """Leave everything as it is but how long and how wide."""
    yaml = YAML()
    params = yaml.load((project / "params.yaml").read_text())
    teacher = params["teachers"]["main"]
    scratch = teacher["model"]["scratch"]
    scratch |= {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    if "num_key_value_heads" in scratch:
        scratch["num_key_value_heads"] = 4
    teacher["tokens"]["vocab"] = 300
    teacher["fit"] = dict(SHORT)
    for student in params["students"].values():
        student["model"]["architecture"] |= {"hidden_size": 16, "intermediate_size": 32}
        student["train"] = dict(SHORT)
    if "generate" in params["evaluate"]:
        params["evaluate"]["generate"] |= {"rows": 4, "max_new_tokens": 4}
    with (project / "params.yaml").open("w") as file:
        yaml.dump(params, file)
    return params


def sample_of(folder: Path, preset: str, tmp_path: Path) -> Path:
    """Return the directory of a preset's files; of WikiText-2 there is no training part."""
    if preset != "language-modelling":
        return folder
    copy = tmp_path / "wikitext"
    copy.mkdir()
    shutil.copyfile(folder / "test.txt.gz", copy / "train.txt.gz")
    shutil.copyfile(folder / "valid.txt.gz", copy / "test.txt.gz")
    return copy


@pytest.mark.slow
@pytest.mark.parametrize("preset", [*CORPORA, "signature-to-summary"])
def test_a_preset_runs_on_a_sample_to_its_report(tmp_path, shared, preset):
    project = tmp_path / "project"
    arguments = ["--preset", preset, "--sample", "24"]
    if preset in CORPORA:
        folder = shared / "corpora" / CORPORA[preset]
        arguments += ["--data", str(sample_of(folder, preset, tmp_path))]
    decant("init", project, *arguments)
    params = shrink(project)
    with contextlib.chdir(project):
        for stage in ("check", "prepare"):
            decant(stage)
        for stage in ("tokenize", "teach", "generate", "capture", "evaluate-teacher"):
            decant(stage, "main")
        for student in params["students"]:
            for stage in ("select", "train", "evaluate"):
                decant(stage, student)
        decant("report")
        metrics = json.loads(Path("data/reports/metrics.json").read_text())
        page = Path("data/reports/index.html").read_text()
    for name in params["students"]:
        assert name in page
        assert f"test_{HEADLINE[preset]}" in metrics["students"][name]
