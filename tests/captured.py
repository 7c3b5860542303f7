"""Tiny captured stores, made by the real `capture` from a random teacher and ragged random rows."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers import PreTrainedTokenizerFast as FastTokenizer

from pipeline.corpus.text.examples import SPLITS, Split
from pipeline.corpus.tokens.tokens import (
    TokenColumns,
    TokenMeta,
    TokenSet,
    token_digest,
    write_tokens,
)
from pipeline.runtime import Runtime
from pipeline.store.forms.registry import build_form
from pipeline.store.index import read_index
from pipeline.store.layout import Layout
from pipeline.store.reader import StoreReader
from pipeline.store.signals import Signal
from pipeline.tasks import generates, models_language
from pipeline.teacher.capture.capture import capture
from pipeline.teacher.capture.complete import write_manifests
from pipeline.teacher.capture.spec import SegmentOptions
from pipeline.teacher.source.reference import TeacherReference, weights_sha256
from pipeline.teacher.source.teach import _plain_config
from tests.tiny import CAUSAL, PAD_ID, Kind, tiny_model

VOCAB = 64
LENGTHS: dict[Split, Sequence[int]] = {
    "train": (9, 20, 3, 14, 7, 17, 5, 11, 20, 8, 13, 4, 16, 6),
    "validation": (6, 12),
    "test": (10, 4, 15, 7),
}
OPTIONS = SegmentOptions(segment_tokens=64, chunk_tokens=16, batch_tokens=60)


def signal(kind: str, layer: int | None, form: str, **options: Any) -> Signal:
    return Signal(build_form(kind, form, options), layer)


def write_rows(
    path: Path,
    *,
    task: str = "causal-lm",
    lengths: Mapping[Split, Sequence[int]] = LENGTHS,
    token_types: bool = False,
    max_length: int = 32,
    seed: int = 0,
) -> TokenSet:
    """Random ids (3 and up), random loss masks, and a tokenizer of single words."""
    generator = np.random.default_rng(seed)
    language = models_language(task)
    outputs = {"classification": 2, "multi-label": 3, "regression": 1}.get(task, 0)
    splits: dict[Split, TokenColumns] = {}
    for code, split in enumerate(SPLITS):
        counts = lengths[split]
        total = sum(counts)
        mask = generator.random(total) < 0.8
        prompts = np.array([count // 2 for count in counts], np.int32)
        if generates(task):
            # The target is the end of a row, as tokenising leaves it.
            mask = np.concatenate([np.arange(n) >= p for n, p in zip(counts, prompts, strict=True)])
        splits[split] = TokenColumns(
            offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            input_ids=generator.integers(3, VOCAB, total).astype(np.int32),
            loss_mask=mask,
            source_row=np.arange(len(counts)) + 100 * code,
            piece=np.zeros(len(counts), np.int32),
            token_type_ids=(generator.random(total) < 0.5).astype(np.int8) if token_types else None,
            label=generator.integers(0, 2, len(counts)) if task == "classification" else None,
            targets=_targets(task, (len(counts), outputs), generator),
            target_bytes=np.array([3 * n for n in counts], np.int32) if language else None,
            target_words=np.array(counts, np.int32) if language else None,
            prompt_tokens=prompts if generates(task) else None,
            references=[[f"w{3 + n}"] for n in range(len(counts))] if generates(task) else None,
        )
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCAB)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    FastTokenizer(tokenizer_object=backend, pad_token="<pad>").save_pretrained(path / "tokenizer")
    ragged = {split: list(lengths[split]) for split in SPLITS}
    meta = TokenMeta(
        task=task,  # pyright: ignore[reportArgumentType]
        classes={2: ("no", "yes"), 3: ("a", "b", "c")}.get(outputs, ()),
        outputs=outputs,
        vocab=VOCAB,
        max_length=max_length,
        pad_id=PAD_ID,
        columns=("token_type_ids",) if token_types else (),
        rows={split: len(rows) for split, rows in ragged.items()},
        tokens={split: sum(rows) for split, rows in ragged.items()},
        targets={split: columns.count_targets() for split, columns in splits.items()},
        target_bytes={split: 3 * sum(rows) for split, rows in ragged.items()} if language else {},
        target_words={split: sum(rows) for split, rows in ragged.items()} if language else {},
        text_bytes=dict.fromkeys(SPLITS, 1),
        overlong=dict.fromkeys(SPLITS, 0),
        dropped=dict.fromkeys(SPLITS, 0),
        digest=token_digest(splits),
        tokenizer_digest="tiny",
        corpus_digest="tiny",
    )
    write_tokens(path, splits, meta)
    return TokenSet.load(path)


def _targets(task: str, shape: tuple[int, int], generator: np.random.Generator) -> Any:
    """Return numbers around 2 for a regression, 0 and 1 for multi-label, None else."""
    if task == "regression":
        return generator.normal(2.0, 1.0, shape).astype(np.float32)
    if task == "multi-label":
        return (generator.random(shape) < 0.4).astype(np.float32)
    return None


def write_teacher(path: Path, model: PreTrainedModel) -> TeacherReference:
    """Save a model as a teacher that was trained here."""
    model.save_pretrained(path / "model")
    reference = TeacherReference(
        "model",
        None,
        False,
        weights_sha256(path / "model"),
        int(model.config.num_hidden_layers),
        _plain_config(model),
        trained=True,
    )
    reference.save(path)
    return reference


@dataclass(frozen=True)
class Captured:
    """A corpus, a teacher, and what is captured of it below one directory."""

    root: Path
    task: str
    options: SegmentOptions = OPTIONS

    @property
    def tokens(self) -> Path:
        return self.root / "tokens"

    @property
    def teacher(self) -> Path:
        return self.root / "teacher"

    @property
    def stores(self) -> Path:
        return self.root / "stores"

    @property
    def store(self) -> Path:
        (path,) = self.stores.iterdir()
        return path

    @property
    def layout(self) -> Layout:
        return Layout(self.store)

    @cached_property
    def reader(self) -> StoreReader:
        return StoreReader(self.store)

    def digests(self) -> dict[str, str]:
        return {name: entry["digest"] for name, entry in self.index["signals"].items()}

    @property
    def index(self) -> dict[str, Any]:
        return read_index(self.layout)

    def load_teacher(self, *, attention: str = "eager", **options: Any) -> PreTrainedModel:
        """The teacher by plain transformers."""
        factory = (
            AutoModelForCausalLM
            if models_language(self.task)
            else AutoModelForSequenceClassification
        )
        options["attn_implementation"] = attention
        return factory.from_pretrained(self.teacher / "model", **options).eval()

    def capture(
        self,
        signals: Sequence[Signal],
        *,
        blocks: Sequence[int] = (),
        nonfinite: Any = "stop",
        options: SegmentOptions | None = None,
        wait: bool = True,
        **runtime: Any,
    ) -> Path:
        return capture(
            tokens=self.tokens,
            teacher=self.teacher,
            stores=self.stores,
            signals=signals,
            blocks=blocks,
            options=options or self.options,
            nonfinite=nonfinite,
            runtime=Runtime(**{"device": "cpu", "workers": 1} | runtime),
            wait=wait,
        )

    def manifests(self, signals: Sequence[Signal], blocks: Sequence[int] = ()) -> Path:
        """Write what DVC keeps, and return its directory."""
        output = self.root / "manifests"
        reference = TeacherReference.load(self.teacher)
        write_manifests(self.layout, output, reference, signals, blocks)
        return output

    def pinned(self, signals: Sequence[Signal]) -> StoreReader:
        digests = self.digests()
        return StoreReader(self.store, {s.name: digests[s.name] for s in signals})


def prepared(
    root: Path,
    kind: Kind,
    *,
    task: str | None = None,
    options: SegmentOptions = OPTIONS,
    rows: Mapping[str, Any] | None = None,
    **model: Any,
) -> Captured:
    """Corpus and teacher, nothing captured yet."""
    task = task or ("causal-lm" if kind in CAUSAL else "classification")
    write_rows(root / "tokens", task=task, token_types=kind == "bert", **(rows or {}))
    heads = {"regression": {"num_labels": 1}, "multi-label": {"num_labels": 3}}.get(task, {})
    write_teacher(root / "teacher", tiny_model(kind, task=task, **{"layers": 3, **heads, **model}))
    return Captured(root, task, options)


def copied(captured: Captured, root: Path) -> Captured:
    """A copy to damage."""
    shutil.copytree(captured.root, root)
    return replace(captured, root=root)


def tree_of_values(captured: Captured, name: str) -> dict[str, np.ndarray]:
    """Every stored part of a signal, live rows only, over all its segments."""
    found: dict[str, list[np.ndarray]] = {}
    stored = captured.reader.signal(name)
    for number in stored.receipts:
        segment = captured.reader.read_segment(number, [name])
        chosen = np.concatenate([np.arange(*span) for span in segment.spans[name]])
        for part, values in segment.features[name].items():
            found.setdefault(part, []).append(values[chosen])
    return {part: np.concatenate(values) for part, values in found.items()}


def receipts_mtimes(captured: Captured) -> dict[Path, int]:
    """When every shard, receipt and declaration was written."""
    return {
        path: path.stat().st_mtime_ns
        for folder in ("features.zarr", "receipts")
        for path in sorted((captured.store / folder).rglob("*"))
        if path.is_file()
    }


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


DAMAGES: dict[str, Callable[[Path], None]] = {
    "flipped byte": _flip,
    "short": _cut,
    "missing": Path.unlink,
}
"""What may happen to a file of a store, by name."""
