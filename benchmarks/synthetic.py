"""A corpus of random ragged rows and a random teacher: the shapes of real work, built in code."""

import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from pipeline.corpus.text.examples import SPLITS, Split
from pipeline.corpus.tokens.tokens import TokenColumns, TokenMeta, token_digest, write_tokens
from pipeline.provenance import software
from pipeline.store.forms.registry import build_form
from pipeline.store.signals import Signal
from pipeline.teacher.source.reference import TeacherReference, weights_sha256

VOCAB = 2048
MAX_LENGTH = 128
PAD_ID = 0


@dataclass
class Stopwatch:
    """Seconds of a block, by the clock and of all threads' CPU."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0


@contextmanager
def stopwatch() -> Iterator[Stopwatch]:
    """Measure a block."""
    watch = Stopwatch()
    clock, cpu = time.perf_counter(), time.process_time()
    yield watch
    watch.seconds, watch.cpu_seconds = time.perf_counter() - clock, time.process_time() - cpu


def machine() -> dict[str, str | int]:
    """Say where and with what a measurement was made."""
    found: dict[str, str | int] = {
        "processor": _processor(),
        "cores": os.cpu_count() or 0,
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30),
        "torch_threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found | software()


def _processor() -> str:
    """Return the name that Linux knows, elsewhere what Python knows."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def quiet() -> None:
    """Leave standard error to progress bars."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def write_corpus(
    path: Path,
    *,
    train_tokens: int,
    seed: int = 0,
    vocab: int = VOCAB,
    shortest: int = 8,
    longest: int = MAX_LENGTH,
) -> None:
    """Write random rows of some lengths; validation and test are a twentieth each."""
    generator = np.random.default_rng(seed)
    splits: dict[Split, TokenColumns] = {}
    for split in SPLITS:
        wanted = train_tokens if split == "train" else train_tokens // 20
        lengths = generator.integers(shortest, longest + 1, 2 * wanted // longest + 1)
        lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), wanted)) + 1]
        total = int(lengths.sum())
        splits[split] = TokenColumns(
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            input_ids=generator.integers(1, vocab, total).astype(np.int32),
            loss_mask=np.ones(total, bool),
            source_row=np.arange(len(lengths)),
            piece=np.zeros(len(lengths), np.int32),
            token_type_ids=None,
            label=None,
        )
    words = {"<pad>": PAD_ID, **{f"w{number}": number for number in range(1, vocab)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>")
    tokenizer.save_pretrained(path / "tokenizer")
    meta = TokenMeta(
        task="causal-lm",
        classes=(),
        vocab=vocab,
        max_length=longest,
        pad_id=PAD_ID,
        columns=(),
        rows={split: len(columns.piece) for split, columns in splits.items()},
        tokens={split: len(columns.input_ids) for split, columns in splits.items()},
        targets={split: columns.count_targets() for split, columns in splits.items()},
        text_bytes=dict.fromkeys(SPLITS, 0),
        overlong=dict.fromkeys(SPLITS, 0),
        dropped=dict.fromkeys(SPLITS, 0),
        digest=token_digest(splits),
        tokenizer_digest="synthetic",
        corpus_digest="synthetic",
    )
    write_tokens(path, splits, meta)


def write_teacher(
    path: Path,
    *,
    layers: int,
    width: int,
    seed: int = 0,
    vocab: int = VOCAB,
    heads: int = 8,
    longest: int = MAX_LENGTH,
    dtype: torch.dtype = torch.float32,
) -> TeacherReference:
    """Save a random Llama as a teacher, its weights in `dtype`."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=longest,
            pad_token_id=PAD_ID,
            tie_word_embeddings=True,
        )
    )
    model.to(dtype).save_pretrained(path / "model")
    config = model.config.to_dict()
    weights = weights_sha256(path / "model")
    reference = TeacherReference("model", None, False, weights, layers, config, trained=True)
    reference.save(path)
    return reference


def default_signals(layers: int) -> list[Signal]:
    """Every second layer as the default pipeline captures it."""
    chosen = range(2, layers + 1, 2)
    bfloat16, qk = build_form("hidden", "bfloat16", {}), build_form("attention", "qk", {})
    return [
        *(Signal(bfloat16, layer) for layer in (0, *chosen)),
        *(Signal(qk, layer) for layer in chosen),
        Signal(build_form("logits", "topk", {"k": 64}), None),
    ]
