"""A whole project in miniature: a corpus of nonsense, a teacher of two blocks, two students."""

import random
import shutil
from pathlib import Path
from typing import Any

from click.testing import Result
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]
FILES = (
    "data/raw/README.md",
    "dvc.yaml",
    "Makefile",
    "pyproject.toml",
    ".gitignore",
    ".dvcignore",
    "data/.gitignore",
)
FOLDERS = ("pipeline", "presets", "stages")
LAYERS = 2
CONTEXT = 32


def write_corpus(path: Path, lines: int = 160, seed: int = 0) -> None:
    """Write lines of made-up words: enough of them that none is another's near-duplicate."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 7))) for _ in range(200)]
    text = (" ".join(draw.choices(words, k=draw.randint(5, 30))) for _ in range(lines))
    path.write_text("\n".join(text) + "\n", encoding="utf-8")


def tiny_params() -> dict[str, Any]:
    """Return parameters with which every stage takes seconds, as new values at each call."""
    training = {"epochs": 1, "batch_size": 16, "learning_rate": 0.001, "log_every": 2}
    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    return {
        "corpus": {
            "source": {"kind": "text", "files": "corpus.txt", "examples": "line"},
            "task": "causal-lm",
        },
        "teachers": {
            "main": {
                "tokens": {"vocab": 300, "max_length": CONTEXT},
                "model": {
                    "scratch": {
                        "model_type": "llama",
                        "num_hidden_layers": LAYERS,
                        "max_position_embeddings": CONTEXT,
                        **size,
                    }
                },
                "fit": {**training},
                "capture": {
                    "hidden": {"layers": [0, 2], "form": "bfloat16"},
                    "attention": {"layers": [2], "form": "qk"},
                    "logits": {"form": "topk", "k": 16, "temperatures": [1.0]},
                    "segment_tokens": 2048,
                },
            }
        },
        "students": {
            "soft": {
                "teacher": "main",
                "model": {"architecture": {"num_hidden_layers": 1}},
                "loss": {"output": {"weight": 1.0}},
                "train": {**training},
            },
            "aligned": {
                "teacher": "main",
                "model": {"architecture": {"num_hidden_layers": 1}},
                "loss": {
                    "feature": {"weight": 0.1},
                    "attention": {"weight": 0.1},
                    "output": {"weight": 1.0},
                },
                "train": {**training},
            },
        },
        "evaluate": {"intervals": {"resamples": 50}},
    }


def write_params(folder: Path, params: dict[str, Any]) -> Path:
    """Write `params.yaml` into a project."""
    path = folder / "params.yaml"
    with path.open("w", encoding="utf-8") as file:
        YAML().dump(params, file)
    return path


def write_project(folder: Path) -> None:
    """Make `folder` a project: this checkout's code and pipeline, tiny parameters and corpus."""
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    for name in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    (folder / ".dvc").mkdir()
    for name in ("config", ".gitignore"):
        shutil.copyfile(ROOT / ".dvc" / name, folder / ".dvc" / name)
    write_corpus(folder / "corpus.txt")
    write_params(folder, tiny_params())


def error_line(result: Result) -> str:
    """Return the one line on stderr; progress bars and log lines are not errors."""
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.output
    assert "Traceback" not in result.output
    return lines[0]
