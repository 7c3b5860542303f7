"""What each form takes in a store and how far its values are off, from real features.

A few hundred rows of the project are captured in every form. Bytes are those of the files, after
compression, checksums included, over those of dense float16: `2 · width` a token for hidden states,
`2 · heads · T` for attention maps, `2 · vocab` for logits, where T is the mean over tokens of their
row's length. A vocabulary of 128,256 is made up: ranks of a shuffled Zipf law, tilted by Gaussian
logits of rank 256; what is measured there is how ids and log-probabilities compress, not a teacher.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from pipeline.axes import TRAIN
from pipeline.corpus.tokens.tokens import TokenSet
from pipeline.runtime import Runtime
from pipeline.store.codec import encode_shard
from pipeline.store.forms.form import Geometry, options
from pipeline.store.forms.registry import build_form, forms_of
from pipeline.store.reader import StoreReader
from pipeline.store.signals import Signal
from pipeline.tasks import models_language
from pipeline.teacher.capture.capture import capture
from pipeline.teacher.capture.spec import SegmentOptions
from pipeline.teacher.source.reference import TeacherReference

ROWS = 256
LARGE_VOCAB = 128_256
LOGITS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("head", {"values": "int8"}),
    ("topk", {"k": 16}),
    ("topk", {"k": 64}),
    ("topk", {"k": 256}),
    ("sampled", {"n": 16}),
    ("sampled", {"n": 64}),
)
HIDDEN: tuple[tuple[str, dict[str, Any]], ...] = (
    ("float16", {}),
    ("bfloat16", {}),
    ("int8", {}),
    ("fp8", {}),
    ("int4", {"group": 16}),
    ("int4", {"group": 64}),
)
MAPS = tuple(forms_of("attention"))


def signals(layer: int, *, task: str, vocab: int) -> list[Signal]:
    """Return one layer in every form, and the logits in theirs."""
    hidden = [Signal(build_form("hidden", *form), layer) for form in HIDDEN]
    below = [Signal(build_form("hidden", "int8", {}), layer - 1)]
    attention = [Signal(build_form("attention", form, {}), layer) for form in MAPS]
    if not models_language(task):
        return [*hidden, *below, *attention]
    fits = [form for form in LOGITS if form[1].get("k", 1) < vocab]
    logits = [Signal(build_form("logits", *form), None) for form in fits]
    return [*hidden, *below, *attention, *logits]


def measure_bytes(*, tokens: Path, teacher: Path, stores: Path, layer: int) -> list[dict[str, Any]]:
    """Capture one layer in every form and return a row a signal.

    Args:
        tokens: Directory of the tokenized corpus.
        teacher: The teacher's directory.
        stores: Where the store goes.
        layer: The layer, from 1.
    """
    meta = TokenSet.load(tokens).meta
    chosen = signals(layer, task=meta.task, vocab=meta.vocab)
    store = capture(
        tokens=tokens,
        teacher=teacher,
        stores=stores,
        signals=chosen,
        blocks=[],
        options=SegmentOptions(limit=ROWS),
        nonfinite="stop",
        runtime=Runtime(device="cpu"),
    )
    reader = StoreReader(store)
    config = TeacherReference.load(teacher).config
    heads = int(config.get("num_attention_heads") or config.get("n_head") or config["n_heads"])
    lengths = reader.examples["length"][reader.examples["split"] == 0].astype(np.float64)
    keys = float((lengths**2).sum() / lengths.sum())
    exact = _decoded(reader, chosen[0])
    rows = []
    for signal in chosen:
        if signal.kind == "hidden" and signal.layer != layer:
            continue  # what attention `below` is rebuilt from
        stored = reader.signal(signal.name)
        geometry = stored.declaration.geometry
        each = stored.bytes / max(1, stored.tokens)
        dense = {
            "hidden": 2 * geometry.width,
            "attention": 2 * heads * keys,
            "logits": 2 * geometry.vocab,
        }[signal.kind]
        row = {
            "kind": signal.kind,
            "form": named(signal),
            "bytes_per_token": round(each, 2),
            "over_dense": each / dense,
        }
        if signal.kind == "hidden":
            found = _decoded(reader, signal)
            row["relative_error"] = float(np.linalg.norm(found - exact) / np.linalg.norm(exact))
        if signal.form.name == "qk":
            width = (1 + geometry.kv_heads / geometry.heads) * geometry.d_head
            row["target"] = 1.05 * width / (2 * keys)
        rows.append(row)
    return rows


def named(signal: Signal) -> str:
    """Return a form with its options, as in `topk k=64`."""
    given = {key: value for key, value in options(signal.form).items() if key != "temperatures"}
    return " ".join([signal.form.name, *(f"{key}={value}" for key, value in given.items())])


def _decoded(reader: StoreReader, signal: Signal) -> NDArray[np.float32]:
    """Return a hidden state's training rows."""
    found = []
    for number in reader.segments(TRAIN):
        segment = reader.read_segment(number, [signal.name])
        kept = np.concatenate([np.arange(*span) for span in segment.spans[signal.name]])
        decoded = signal.form.decode(segment.features[signal.name], reader.channels(signal.name))
        found.append(decoded["hidden"][kept])
    return np.concatenate(found)


def large_vocabulary(rows: int = 256, *, vocab: int = LARGE_VOCAB) -> list[dict[str, Any]]:
    """Return what `topk` and `sampled` take over dense at a vocabulary that is made up."""
    random = np.random.default_rng(0)
    ranks = (np.arange(vocab) + 1) * np.exp(random.normal(0, 1.2, vocab))
    state = random.standard_normal((rows, 256), dtype=np.float32)
    head = random.standard_normal((256, vocab), dtype=np.float32)
    logits = (2.5 / 16 * (state @ head) - np.log(ranks + 2.7)).astype(np.float32)
    found = []
    for name, given in LOGITS[1:]:
        form = build_form("logits", name, given)
        arrays = form.encode({"logits": logits}, None)
        assert arrays.keys() == form.arrays(Geometry(vocab=vocab)).keys()
        each = sum(len(encode_shard(np.asarray(array), rows)) for array in arrays.values()) / rows
        shown = named(Signal(form, None))
        found.append(
            {
                "kind": f"logits of {vocab:,}",
                "form": shown,
                "bytes_per_token": round(each, 2),
                "over_dense": each / (2 * vocab),
                "target": 0.003,
            }
        )
    return found


def show_bytes(rows: list[dict[str, Any]]) -> None:
    """Print the table for people."""
    table = Table(box=None, header_style="bold")
    for column in ("kind", "form"):
        table.add_column(column)
    for column in ("B/token", "/ dense float16", "target", "relative L2 error"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row["kind"],
            row["form"],
            f"{row['bytes_per_token']:,.1f}",
            f"{row['over_dense']:.4f}",
            *(f"{row[key]:.2g}" if key in row else "" for key in ("target", "relative_error")),
        )
    Console(width=120).print(table)


def byte_figures(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the JSON line's figures: bytes over dense, by kind and form."""
    return {f"{row['kind']} {row['form']}": round(row["over_dense"], 5) for row in rows}
