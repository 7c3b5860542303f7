"""A new project is whole, says what it took from the options, and overwrites nothing."""

import json
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from ruamel.yaml import YAML

from stages.cli import main
from stages.init import presets

ROOT = Path(__file__).parents[2]


def init(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["init", *map(str, arguments)], catch_exceptions=False)


def params_of(project: Path) -> dict:
    return YAML(typ="safe").load((project / "params.yaml").read_text())


def write_teacher(path: Path, layers: int) -> Path:
    path.mkdir()
    config = {"model_type": "bert", "num_hidden_layers": layers, "hidden_size": 64}
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_a_new_project_has_this_repositorys_pipeline(tmp_path):
    init(tmp_path)
    assert (tmp_path / "dvc.yaml").read_text() == (ROOT / "dvc.yaml").read_text()


def test_the_default_preset_is_this_repositorys_params():
    assert (ROOT / "presets/python-docs.yaml").read_text() == (ROOT / "params.yaml").read_text()


def test_git_and_dvc_ignore_in_a_new_project_what_they_ignore_here(tmp_path):
    init(tmp_path)
    for name in (".dvc/config", ".dvc/.gitignore", "data/.gitignore"):
        ours = {line.strip() for line in (ROOT / name).read_text().splitlines()}
        theirs = {line.strip() for line in (tmp_path / name).read_text().splitlines()}
        assert theirs == ours, name


@pytest.mark.parametrize("preset", presets())
def test_a_preset_keeps_its_comments(tmp_path, preset):
    assert init(tmp_path, "--preset", preset).exit_code == 0
    first = (ROOT / "presets" / f"{preset}.yaml").read_text().splitlines()[0]
    assert (tmp_path / "params.yaml").read_text().splitlines()[0] == first


def test_a_new_project_is_a_git_repository(tmp_path):
    init(tmp_path / "demo")
    done = subprocess.run(["git", "-C", str(tmp_path / "demo"), "rev-parse", "--git-dir"])
    assert done.returncode == 0


def test_files_come_from_the_directory_named(tmp_path):
    (tmp_path / "corpus").mkdir()
    wanted = ["--preset", "translation", "--data", tmp_path / "corpus"]
    result = init(tmp_path / "demo", *wanted)
    assert result.exit_code == 2
    assert "no train.en.gz, train.de.gz, val.en.gz" in result.output
    assert not (tmp_path / "demo").exists()
    for split in ("train", "val", "test_2016_flickr"):
        for language in ("en", "de"):
            (tmp_path / "corpus" / f"{split}.{language}.gz").touch()
    init(tmp_path / "demo", *wanted)
    files = params_of(tmp_path / "demo")["corpus"]["source"]["files"]
    assert files["train"]["text"] == str(tmp_path / "corpus/train.en.gz")


def test_a_teacher_with_weights_brings_its_tokenizer_and_its_sizes(tmp_path):
    teacher = write_teacher(tmp_path / "teacher", layers=12)
    init(tmp_path / "demo", "--preset", "sst2", "--teacher", teacher)
    params = params_of(tmp_path / "demo")
    main_teacher = params["teachers"]["main"]
    assert main_teacher["model"] == {"path": str(teacher)}
    assert "vocab" not in main_teacher["tokens"]
    assert main_teacher["capture"]["hidden"]["layers"] == [0, 6, 12]
    assert main_teacher["capture"]["attention"]["layers"] == [6, 12]
    for student in params["students"].values():
        assert student["model"] == {"architecture": {"num_hidden_layers": 2}}


def test_a_sample_is_a_limit(tmp_path):
    init(tmp_path, "--preset", "cola", "--sample", "50")
    assert params_of(tmp_path)["corpus"]["source"]["limit"] == 50


def test_the_hub_takes_the_place_of_files(tmp_path, monkeypatch):
    def unreachable(*_):
        raise OSError("the hub cannot be reached")

    monkeypatch.setattr("transformers.utils.hub.cached_file", unreachable)
    result = init(tmp_path, "--preset", "mrpc", "--hub")
    assert "no configuration (the hub cannot be reached)" in result.output
    params = params_of(tmp_path)
    assert params["corpus"]["source"]["kind"] == "hub"
    assert params["teachers"]["main"]["model"] == {"path": "google-bert/bert-base-uncased"}


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_a_teacher_of_the_hub_is_pinned_to_the_commit_that_is_there(tmp_path, monkeypatch):
    snapshot = tmp_path / "hub" / "snapshots" / COMMIT
    snapshot.parent.mkdir(parents=True)
    write_teacher(snapshot, layers=12)
    found = str(snapshot / "config.json")
    monkeypatch.setattr("transformers.utils.hub.cached_file", lambda *_: found)
    init(tmp_path / "demo", "--preset", "sst2", "--teacher", "someone/bert")
    main_teacher = params_of(tmp_path / "demo")["teachers"]["main"]
    assert main_teacher["model"] == {"path": "someone/bert", "revision": COMMIT}
    assert main_teacher["capture"]["hidden"]["layers"] == [0, 6, 12]
    # A directory has no revision, wherever it lies.
    init(tmp_path / "local", "--preset", "sst2", "--teacher", snapshot)
    model = params_of(tmp_path / "local")["teachers"]["main"]["model"]
    assert model == {"path": str(snapshot)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "sst2", "--data", "nowhere"], r"--data nowhere: no directory"),
        (["--data", "."], r"--data: preset python-docs reads no files"),
        (["--preset", "letter-to-phoneme", "--hub"], r"has no hub data set, expected one of"),
        (["--preset", "sst2", "--hub", "--data", "."], r"both say where the corpus is"),
    ],
)
def test_what_contradicts_itself_is_refused_and_nothing_written(tmp_path, arguments, message):
    result = init(tmp_path / "demo", *arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "demo").exists()


def test_a_project_is_never_overwritten(tmp_path):
    init(tmp_path)
    (tmp_path / "params.yaml").write_text("mine: true\n")
    (tmp_path / "dvc.yaml").unlink()
    result = init(tmp_path)
    assert result.exit_code == 2
    assert "params.yaml: is there already" in result.output
    assert (tmp_path / "params.yaml").read_text() == "mine: true\n"
    assert not (tmp_path / "dvc.yaml").exists()
