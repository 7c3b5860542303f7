"""A small store of every form, from values that are a function of signal and segment alone."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from pipeline.axes import SPLITS, Axis
from pipeline.provenance import write_bytes_atomically, write_json
from pipeline.store.commit import SignalWriter
from pipeline.store.extent import example_rows
from pipeline.store.forms.below import Below
from pipeline.store.forms.bfloat16 import BFloat16
from pipeline.store.forms.dense import Dense
from pipeline.store.forms.float16 import Float16
from pipeline.store.forms.form import Channels, Geometry
from pipeline.store.forms.fp8 import Float8
from pipeline.store.forms.head import Head
from pipeline.store.forms.int4 import Int4
from pipeline.store.forms.int8 import Int8
from pipeline.store.forms.map import Map
from pipeline.store.forms.qk import QueryKey
from pipeline.store.forms.sampled import Sampled
from pipeline.store.forms.topk import TopK
from pipeline.store.forms.value_int8 import ValueInt8
from pipeline.store.index import index_asset
from pipeline.store.layout import Layout
from pipeline.store.lock import writer_lock
from pipeline.store.plan import Plan, make_plan
from pipeline.store.planner import Rows, row_digest, rows_digest, write_plan
from pipeline.store.records import Declaration
from pipeline.store.shards import file_digest
from pipeline.store.signals import Signal

LENGTHS = {
    "train": np.array([5, 3, 1, 8, 2, 6, 4]),
    "validation": np.array([4, 6, 2]),
    "test": np.array([8, 3]),
}
SEGMENT_TOKENS, CHUNK_TOKENS = 16, 4
RULE = "causal"
WIDTH, HEADS, KV_HEADS, D_HEAD, VOCAB, CLASSES = 6, 4, 2, 3, 50, 3
SIGNALS = {
    signal.name: signal
    for signal in (
        Signal(Float16(), 1),
        Signal(BFloat16(), 1),
        Signal(Int8(), 2),
        Signal(Int4(), 3),
        Signal(Float8(), 3),
        Signal(QueryKey(), 1),
        Signal(QueryKey(), 2),
        Signal(Map(), 2),
        Signal(Below(), 3),
        Signal(ValueInt8(), 1),
        Signal(TopK(k=5, temperatures=(1.0, 2.0)), None),
        Signal(Sampled(n=5), None),
        Signal(Head(), None),
        Signal(Dense(), None),
    )
}
GEOMETRY = {
    "hidden": Geometry(width=WIDTH),
    "attention": Geometry(heads=HEADS, kv_heads=KV_HEADS, d_head=D_HEAD),
    "value": Geometry(kv_heads=KV_HEADS, d_head=D_HEAD),
    "logits": Geometry(width=WIDTH, vocab=VOCAB),
}


def name_of(kind: str, layer: int | None, form: str) -> str:
    """The one signal of this kind, layer and form."""
    [name] = [
        name for name, s in SIGNALS.items() if (s.kind, s.layer, s.form.name) == (kind, layer, form)
    ]
    return name


@cache
def plan() -> Plan:
    return make_plan(LENGTHS, segment_tokens=SEGMENT_TOKENS, seed=0)


def rows() -> Rows:
    """Tokens that differ from row to row; an example's first token is its split and row."""
    placed = plan()
    tokens: dict[str, list[NDArray[Any]]] = {"input_ids": [], "loss_mask": []}
    for code, row, length in zip(placed.split, placed.row, placed.length, strict=True):
        ids = (np.arange(length) * 7 + code * 20 + row) % VOCAB
        tokens["input_ids"].append(ids.astype(np.int32))
        tokens["loss_mask"].append((np.arange(length) > 0).astype(np.uint8))
    return Rows(tokens, placed.row % CLASSES, placed.row.copy(), np.zeros_like(placed.row))


def identity(segment: int) -> str:
    """What a receipt says of a segment's examples."""
    all_rows = rows()
    members = range(*plan().in_segment(segment).indices(len(plan().row)))
    digests = [
        row_digest(
            {column: values[i] for column, values in all_rows.tokens.items()},
            int(all_rows.label[i]),
            int(all_rows.source_row[i]),
            int(all_rows.piece[i]),
        )
        for i in members
    ]
    return rows_digest(np.frombuffer(b"".join(digests), np.uint8))


def channels(signal: Signal) -> Channels | None:
    if signal.form.has_channels:
        steps = np.arange(WIDTH, dtype=np.float32)
        return Channels(steps - 2, (steps + 1) / 4)
    return None


def geometry(signal: Signal) -> Geometry:
    return Geometry(vocab=CLASSES) if signal.form.name == "dense" else GEOMETRY[signal.kind]


def values(signal: Signal, segment: int) -> dict[str, NDArray[np.float32]]:
    """Float values of the live rows of a segment, in the form's own words."""
    count = plan().in_segment(segment)
    examples = count.stop - count.start
    tokens = int(plan().length[count].sum())
    random = np.random.default_rng([segment, zlib.crc32(signal.name.encode())])
    if signal.form.name == "map":
        pairs = example_rows(signal.form.axis, plan().length[count], RULE).sum()
        return {"probability": random.random((pairs, HEADS)).astype(np.float32)}
    shapes = {
        "hidden": {"hidden": (tokens, WIDTH)},
        "attention": {"query": (tokens, HEADS, D_HEAD), "key": (tokens, KV_HEADS, D_HEAD)},
        "value": {"value": (tokens, KV_HEADS, D_HEAD)},
        "head": {"head_input": (tokens, WIDTH)},
        "topk": {"logits": (tokens, VOCAB)},
        "sampled": {"logits": (tokens, VOCAB)},
        "dense": {"logits": (examples, CLASSES)},
    }[signal.form.name if signal.kind == "logits" else signal.kind]
    return {
        key: (random.standard_normal(shape) * 3).astype(np.float32) for key, shape in shapes.items()
    }


@dataclass
class Synthetic:
    """Steps of a capture without a teacher; `at` is called between them, to kill or to look."""

    root: Path
    at: Callable[[str], None] = lambda _: None

    @property
    def layout(self) -> Layout:
        return Layout(self.root)

    def plan(self) -> None:
        write_json(self.layout.assets / "teacher" / "config.json", {"model_type": "llama"})
        write_bytes_atomically(self.layout.assets / "tokenizer" / "tokenizer.json", b"{}\n")
        description = {
            "spec": {"format": 1},
            "chunk_tokens": CHUNK_TOKENS,
            "task": "causal-lm",
            "classes": [],
            "vocab": VOCAB,
            "pad_id": 0,
            "max_length": 8,
        }
        write_plan(self.layout, plan(), rows(), description)

    def writer(self, name: str, splits: tuple[str, ...] = SPLITS) -> SignalWriter:
        signal = SIGNALS[name]
        statistics = channels(signal)
        digest = None
        if statistics is not None:
            path = self.layout.channels(signal.kind, signal.layer)
            if not path.exists():
                data = save({"mean": statistics.mean, "deviation": statistics.deviation})
                write_bytes_atomically(path, data)
            digest = file_digest(path, self.root)
        info = {"rule": RULE, "scaling": 0.5} if signal.kind == "attention" else {}
        declared = Declaration.of(signal, geometry(signal), splits, info, digest)
        return SignalWriter(self.layout, plan(), CHUNK_TOKENS, declared)

    def buffers(self, writer: SignalWriter, segment: int) -> dict[str, NDArray[Any]]:
        signal = SIGNALS[writer.declared.name]
        encoded = signal.form.encode(values(signal, segment), channels(signal))
        buffers = writer.buffers()
        where = plan().in_segment(segment)
        for part, array in encoded.items():
            rows_of = slice(len(array))
            if signal.form.axis == Axis.EXAMPLE:
                rows_of = plan().slot[where]
            buffers[part][rows_of] = array
        return buffers

    def signal(self, name: str, splits: tuple[str, ...] = SPLITS) -> None:
        """Bring one signal into the store, whatever is there already."""
        writer = self.writer(name, splits)
        writer.declare()
        self.at(f"declared {name}")
        for segment in writer.missing():
            buffers = self.buffers(writer, segment)
            writer.write_segment(segment, buffers, rows=identity(segment))
            self.at(f"segment {segment} {name}")
        writer.commit()
        self.at(f"committed {name}")

    def run(self, names: tuple[str, ...] = tuple(SIGNALS)) -> Path:
        """Bring plan, signals and one asset into the store."""
        with writer_lock(self.layout.lock):
            self.plan()
            self.at("planned")
            for name in names:
                self.signal(name)
            asset = self.layout.assets / "lm_head.safetensors"
            write_bytes_atomically(asset, save({"weight": np.eye(VOCAB, WIDTH, dtype=np.float32)}))
            index_asset(
                self.layout, "lm_head", {"file": asset.name, **file_digest(asset, self.root)}
            )
        return self.root
