"""init: writes a new project: dvc.yaml, params.yaml, .dvc/config.

A preset is copied with its comments, and the options are written into the copy.
"""

import shutil
import subprocess
from importlib.resources import files
from pathlib import Path
from typing import Any

import click
from ruamel.yaml import YAML

from pipeline.errors import ConfigError, ResourceError
from pipeline.provenance import read_json
from pipeline.student.align.layer_maps import Layers, layer_map, layer_pairs
from pipeline.student.align.needs import depth_of
from stages.command import stage

DEFAULT = "python-docs"
RAW = "data/raw"
HUB = "hub.yaml"
PRETRAINED_FIT = {"epochs": 3, "batch_size": 16, "learning_rate": 5e-5}
"""How a pretrained teacher is fine-tuned; a preset's `fit` is for a teacher from scratch."""

PLAIN_FILES = {
    ".gitignore": "/.venv/\n/runtime.yaml\n__pycache__/\n",
    ".dvc/config": (
        "[core]\n    analytics = false\n    check_update = false\n"
        '[cache]\n    type = "reflink,hardlink,copy"\n'
    ),
    ".dvc/.gitignore": "/config.local\n/tmp\n/cache\n",
    "data/.gitignore": "".join(
        f"/{name}\n"
        for name in (
            *("checked.json", "code", "corpus/text", "corpus/tokens", "corpus/transfer"),
            *("metrics", "predictions", "reports", "selected", "stores", "students", "teachers"),
            "work",
        )
    ),
    f"{RAW}/README.md": (
        "# raw\n\nYour corpus files. Everything in here is a dependency of the prepare stage: "
        "edit a file, and `dvc repro`\nbegins there.\n"
    ),
}


def presets() -> list[str]:
    """Return the names of all presets."""
    names = [entry.name for entry in files("presets").iterdir() if entry.name.endswith(".yaml")]
    return sorted(name.removesuffix(".yaml") for name in names if name != HUB)


@click.command()
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--preset",
    metavar="NAME",
    type=click.Choice(presets()),
    default=DEFAULT,
    show_default=True,
    help=f"The task: {', '.join(presets())}.",
)
@click.option("--data", type=click.Path(path_type=Path), help="Directory of the corpus files.")
@click.option("--hub", is_flag=True, help="Take the preset's corpus and teacher from the hub.")
@click.option("--teacher", help="A model directory or hub id, instead of a teacher from scratch.")
@click.option("--sample", type=click.IntRange(min=1), help="At most so many examples a split.")
@stage
def init(
    directory: Path,
    preset: str,
    data: Path | None,
    hub: bool,
    teacher: str | None,
    sample: int | None,
) -> None:
    """Write a new project to DIRECTORY.

    `decant check && dvc repro` in that directory runs it.

    \b
    Example:
      decant init demo
      decant init reviews --preset sst2 --data ~/sst2 --teacher bert-base-uncased
    """
    params = _parameters(preset, data, hub, teacher, sample)
    wanted = ["dvc.yaml", "params.yaml", *PLAIN_FILES]
    for name in wanted[:2]:
        if (directory / name).exists():
            raise ConfigError(
                f"{directory / name}: is there already; name a directory without a project in it"
            )
    for name, text in PLAIN_FILES.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text(text, encoding="utf-8")
    pipeline = (files("stages") / "pipeline.yaml").read_text(encoding="utf-8")
    (directory / "dvc.yaml").write_text(pipeline, encoding="utf-8")
    with (directory / "params.yaml").open("w", encoding="utf-8") as file:
        _yaml().dump(params, file)
    _ensure_git(directory)
    click.echo(f"wrote {directory}: {', '.join(wanted[:2])}, .dvc/config\nnext: cd {directory}")
    if params["corpus"]["source"].get("files") and data is None:
        click.echo(f"      put your files into {RAW} and name them in params.yaml")
    click.echo("      decant check && dvc repro")
    click.echo("      git add -A && git commit -m Start   # before `dvc exp run`")


def _parameters(
    preset: str, data: Path | None, hub: bool, teacher: str | None, sample: int | None
) -> Any:
    """Return a preset's parameters with its comments and with the options applied."""
    params = _yaml().load((files("presets") / f"{preset}.yaml").read_text(encoding="utf-8"))
    if hub:
        if data is not None:
            raise ConfigError("--hub and --data both say where the corpus is; give one")
        known = _yaml().load((files("presets") / HUB).read_text(encoding="utf-8"))
        if preset not in known:
            raise ConfigError(
                f"--hub: preset {preset} has no hub data set, expected one of {', '.join(known)}"
            )
        params["corpus"]["source"] = known[preset]["source"]
        teacher = teacher or known[preset]["teacher"]
    if data is not None:
        source = params["corpus"]["source"]
        if "files" not in source:
            raise ConfigError(f"--data: preset {preset} reads no files; leave it out")
        if not data.is_dir():
            raise ConfigError(f"--data {data}: no directory; name the one with the corpus files")
        _move(source["files"], data.resolve())
        missing = [path for path in _paths(source["files"]) if not Path(path).is_file()]
        if missing:
            names = ", ".join(Path(path).name for path in missing)
            raise ConfigError(
                f"--data {data}: no {names}, which preset {preset} reads; rename your files, or "
                "leave --data out and name them in params.yaml"
            )
    if sample is not None:
        params["corpus"]["source"]["limit"] = sample
    if teacher is not None:
        _take_teacher(params, teacher)
    return params


def _move(values: Any, folder: Path) -> None:
    """Move every file path from data/raw to `folder`, in place."""
    keys = values if isinstance(values, dict) else range(len(values))
    for key in keys:
        value = values[key]
        if isinstance(value, str):
            values[key] = value.replace(RAW, str(folder), 1)
        else:
            _move(value, folder)


def _paths(values: Any) -> list[str]:
    """Return every file of a preset's source."""
    if isinstance(values, str):
        return [values]
    inner = values.values() if isinstance(values, dict) else values
    return [path for value in inner for path in _paths(value)]


def _take_teacher(params: Any, teacher: str) -> None:
    """Use a teacher that has weights; students have its width and fewer layers."""
    path = Path(teacher).expanduser()
    section = params["teachers"]["main"]
    section["model"] = {"path": str(path.resolve()) if path.is_dir() else teacher}
    config, commit = _configuration(section["model"]["path"])
    if commit is not None and not path.is_dir():
        # Weights under a hub id may change, so a teacher needs a revision.
        section["model"]["revision"] = commit
    section["tokens"].pop("vocab", None)
    section["fit"] = dict(PRETRAINED_FIT)
    depths = set()
    for student in params["students"].values():
        depth = student["model"]["architecture"]["num_hidden_layers"]
        student["model"]["architecture"] = {"num_hidden_layers": depth}
        depths.add(depth)
    _capture_aligned(section["capture"], depth_of(config), depths)


def _configuration(teacher: str) -> tuple[dict[str, Any], str | None]:
    """Return a teacher's configuration and its commit on the hub; {} if it is not at hand."""
    from transformers.utils.hub import cached_file, extract_commit_hash

    try:
        path = cached_file(teacher, "config.json")
    except (OSError, ValueError) as error:
        click.echo(
            f"note: {teacher}: no configuration ({str(error).splitlines()[0]}); see that "
            "capture.layers suit its depth, and give a hub id its model.revision"
        )
        return {}, None
    assert path is not None  # a missing file is an error
    return read_json(Path(path)), extract_commit_hash(path, None)


def _capture_aligned(capture: Any, depth: int | None, students: set[int]) -> None:
    """Capture only the layers with which students of these depths are aligned."""
    if depth is None:
        return
    layers: set[int] = set()
    for own in students:
        pairs = layer_map("uniform", Layers(own, depth, has_embeddings=True))
        layers |= {teacher for _, teacher in layer_pairs(pairs)}
    capture["hidden"]["layers"] = sorted(layers)
    capture["attention"]["layers"] = sorted(layers - {0})


def _ensure_git(directory: Path) -> None:
    """Create a git repository if there is none: DVC needs one."""
    git = shutil.which("git")
    if git is None:
        raise ResourceError("git is not on PATH and DVC needs it; install git, then `git init`")
    inside = [git, "-C", str(directory), "rev-parse", "--git-dir"]
    if subprocess.run(inside, capture_output=True).returncode:
        subprocess.run([git, "-C", str(directory), "init", "--quiet"], check=True)


def _yaml() -> YAML:
    yaml = YAML()
    yaml.width = 110
    yaml.indent(mapping=2, sequence=4, offset=2)
    return yaml


if __name__ == "__main__":
    init()
