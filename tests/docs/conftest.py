"""A project like the user's own, tiny: the code as it is here, a corpus, and git."""

import gzip
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

from tests.docs.pages import ROOT

PARAMS = """\
corpus: {source: {kind: text, files: "texts/*.txt"}, task: causal-lm}
teachers:
  main:
    tokens: {vocab: 300, max_length: 32}
    model:
      scratch:
        {model_type: llama, num_hidden_layers: 4, hidden_size: 32, intermediate_size: 64,
         num_attention_heads: 4, num_key_value_heads: 4, max_position_embeddings: 32}
    fit: {steps: 4, batch_size: 8}
    capture:
      hidden: {layers: {every: 2}, form: bfloat16}
      attention: {layers: {every: 2}, form: qk}
      logits: {form: topk, k: 8}
      segment_tokens: 1024
students:
  aligned: &student
    teacher: main
    model: {architecture: {num_hidden_layers: 2}}
    loss: {feature: {weight: 0.1}, attention: {weight: 0.1}, output: {weight: 1.0}}
    train: {steps: 4, batch_size: 8, log_every: 2}
evaluate: {}
"""
CODE = (
    "benchmarks",
    "pipeline",
    "presets",
    "stages",
    "dvc.yaml",
    ".dvc/config",
    ".dvc/.gitignore",
    ".dvcignore",
)
SETTINGS = ("dvc.yaml", ".dvc/config", ".dvc/.gitignore", ".dvcignore", ".gitignore")
PLAIN = ("data/raw/README.md", "data/.gitignore", "data/README.md", "pyproject.toml")
WORDS = ("teacher", "reads", "the", "store", "writes", "small", "signals", "students", "learn")


class Project:
    """A directory with the project in it, and a shell."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def shell(self, script: str) -> str:
        """Run lines of a page as they stand; the first that fails ends them."""
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "GIT_CONFIG_GLOBAL": os.devnull,
            **{f"GIT_{role}_NAME": "reader" for role in ("AUTHOR", "COMMITTER")},
            **{f"GIT_{role}_EMAIL": "reader@example.org" for role in ("AUTHOR", "COMMITTER")},
        }
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=self.root,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, f"{script}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout + done.stderr


@pytest.fixture(scope="session")
def project(tmp_path_factory) -> Project:
    """A fresh project, committed; nothing has run."""
    root = tmp_path_factory.mktemp("teacher") / "decant"
    for name in (*CODE, *SETTINGS, *PLAIN):
        source, target = ROOT / name, root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, target)
    (root / "params.yaml").write_text(PARAMS)
    generator = random.Random(0)
    (root / "texts").mkdir()
    for number in range(10):
        lines = [" ".join(generator.choices(WORDS, k=generator.randint(20, 60))) for _ in range(6)]
        (root / f"texts/{number}.txt").write_text(".\n".join(lines))
    fresh = Project(root)
    fresh.shell("git init -q && git add -A && git commit -qm Start")
    return fresh


def write_reviews(folder: Path) -> None:
    """Write the files that the preset sst2 names: lines of made-up opinion and a class."""
    generator = random.Random(1)
    folder.mkdir()
    for name, rows in {"train": 120, "dev": 30, "test": 30}.items():
        lines = ["sentence\tlabel"]
        for _ in range(rows):
            label = generator.randint(0, 1)
            words = [*generator.choices(WORDS, k=8), ("dull", "fine")[label]]
            generator.shuffle(words)
            lines.append(f"{' '.join(words)}\t{label}")
        with gzip.open(folder / f"{name}.tsv.gz", "wt") as file:
            file.write("\n".join(lines) + "\n")


def write_classifier(folder: Path) -> None:
    """Write a small encoder with its tokenizer, as one that lies on a reader's disk."""
    config = BertConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=32,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "dull", "fine"]
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n")
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
