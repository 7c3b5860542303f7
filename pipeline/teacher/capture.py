"""Stage one: the teacher runs once over the corpus and its features go to the store.

What is whole is found from receipts; only missing (segment, signal) pairs are computed, as one Dask
graph of segments. A capture that has nothing to do needs neither teacher nor torch, see
`pipeline.teacher.whole`.
"""

import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow.compute as pc
import torch
from dask.base import compute
from dask.callbacks import Callback
from dask.delayed import delayed
from numpy.typing import NDArray
from tqdm import tqdm
from transformers import PreTrainedModel

from pipeline.axes import SPLITS, TRAIN
from pipeline.corpus.examples import Split
from pipeline.corpus.tokens import TokenSet
from pipeline.errors import ResourceError
from pipeline.store.background import BackgroundWriter
from pipeline.store.commit import SignalWriter
from pipeline.store.forms.form import Channels, Geometry
from pipeline.store.index import read_index
from pipeline.store.layout import Layout
from pipeline.store.lock import writer_lock
from pipeline.store.plan import Plan, make_plan
from pipeline.store.planner import Rows, write_plan
from pipeline.store.reader import StoreReader
from pipeline.store.records import Declaration
from pipeline.store.shards import file_digest
from pipeline.store.signals import Signal
from pipeline.taps.check import TapReport, check_taps
from pipeline.taps.head import head_parameters
from pipeline.teacher.assets import BLOCKS, HEAD, write_blocks, write_descriptions, write_head
from pipeline.teacher.forward import TappedTeacher, collate, segment_batches
from pipeline.teacher.load import load_teacher
from pipeline.teacher.reference import TeacherReference
from pipeline.teacher.request import splits_of
from pipeline.teacher.segments import SegmentCapture
from pipeline.teacher.spec import SegmentOptions, store_fingerprint, store_spec
from pipeline.teacher.statistics import measure_channels, save_channels

logger = logging.getLogger(__name__)
CHECK_EXAMPLES = 4
DISK_RESERVE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Runtime:
    """How, not what: none of this changes a stored value on the same hardware."""

    device: str = "cpu"
    scheduler: Literal["synchronous", "threads"] = "synchronous"
    workers: int = 1
    writers: int = 1
    wait: bool = True


def capture(
    *,
    tokens: Path,
    teacher: Path,
    stores: Path,
    signals: Sequence[Signal],
    blocks: Sequence[int],
    options: SegmentOptions,
    nonfinite: Literal["stop", "skip"],
    runtime: Runtime,
) -> Path:
    """Bring every signal asked for into the store, whole; return the store's directory.

    Raises:
        ConfigError: If the corpus does not fit the segments.
        IncompatibleError: If the teacher cannot be tapped as asked.
        IntegrityError: If features are not finite and `nonfinite` is `stop`.
        ResourceError: If disk space does not suffice, or another process writes (`runtime.wait`
            false).
    """
    token_set = TokenSet.load(tokens)
    reference = TeacherReference.load(teacher)
    spec = store_spec(token_set.meta, reference, options)
    layout = Layout(stores / store_fingerprint(spec))
    with writer_lock(layout.lock, wait=runtime.wait):
        shutil.rmtree(layout.staging, ignore_errors=True)
        plan = _plan(token_set, options)
        if not layout.plan.exists():
            write_descriptions(layout, reference.config, tokens / "tokenizer")
        meta = token_set.meta
        description = {
            "spec": spec,
            "chunk_tokens": options.chunk_tokens,
            "task": meta.task,
            "classes": list(meta.classes),
            "vocab": meta.vocab,
            "pad_id": meta.pad_id,
            "max_length": meta.max_length,
        }
        write_plan(layout, plan, _rows(token_set, plan), description)
        _Capture(layout, plan, signals, list(blocks), options, runtime).run(
            teacher, reference, meta.task, nonfinite
        )
        shutil.rmtree(layout.staging, ignore_errors=True)
    return layout.root


def _plan(token_set: TokenSet, options: SegmentOptions) -> Plan:
    lengths = {split: _lengths(token_set, split) for split in SPLITS}
    return make_plan(
        lengths,
        segment_tokens=options.segment_tokens,
        seed=options.seed,
        fraction=options.fraction,
        limit=options.limit,
    )


def _lengths(token_set: TokenSet, split: Split) -> NDArray[np.int64]:
    column = token_set.split(split).data.column("input_ids")
    return pc.call_function("list_value_length", [column]).to_numpy().astype(np.int64)


def _rows(token_set: TokenSet, plan: Plan) -> Rows:
    columns = ("input_ids", "loss_mask", *token_set.meta.columns)
    tokens: dict[str, list] = {column: [] for column in columns}
    others: dict[str, list] = {"label": [], "source_row": [], "piece": []}
    for code, split in enumerate(SPLITS):
        rows = plan.row[plan.split == code]
        if not len(rows):
            continue
        data = token_set.split(split).with_format("numpy")[rows.tolist()]
        for column in columns:
            tokens[column] += list(data[column])
        others["label"] += list(data.get("label", np.full(len(rows), -1)))
        others["source_row"] += list(data["source_row"])
        others["piece"] += list(data["piece"])
    return Rows(tokens, **{key: np.asarray(value, dtype=np.int64) for key, value in others.items()})


class _Capture:
    """The steps of one capture, under the store's lock."""

    def __init__(
        self,
        layout: Layout,
        plan: Plan,
        signals: Sequence[Signal],
        blocks: list[int],
        options: SegmentOptions,
        runtime: Runtime,
    ) -> None:
        self.layout = layout
        self.plan = plan
        self.signals = list(signals)
        self.blocks = blocks
        self.options = options
        self.runtime = runtime
        self.reader = StoreReader(layout.root)
        self.writers: dict[str, SignalWriter] = {}

    def _writer(self, declared: Declaration) -> SignalWriter:
        return SignalWriter(self.layout, self.plan, self.options.chunk_tokens, declared)

    def _missing(self) -> dict[int, tuple[str, ...]]:
        """Return the signals each segment still lacks; reads and checks every file there is."""
        missing: dict[int, list[str]] = {}
        for name, writer in self.writers.items():
            done = writer.receipts(verify=True)
            for segment in writer.segments:
                if segment not in done:
                    missing.setdefault(segment, []).append(name)
        return {segment: tuple(names) for segment, names in sorted(missing.items())}

    def _load_declared(self) -> list[Signal]:
        """Take up signals declared before; return those not declared, or without statistics."""
        undeclared = []
        for signal in self.signals:
            writer = declared_writer(self.layout, self.plan, self.options.chunk_tokens, signal)
            if writer is None:
                undeclared.append(signal)
            else:
                self.writers[signal.name] = writer
        return undeclared

    def run(
        self,
        teacher: Path,
        reference: TeacherReference,
        task: str,
        nonfinite: Literal["stop", "skip"],
    ) -> None:
        undeclared = self._load_declared()
        missing = self._missing()
        blocks_missing = bool(self.blocks) and not self._blocks_are_there()
        if undeclared or missing or blocks_missing:
            device = torch.device(self.runtime.device)
            model = load_teacher(
                teacher,
                reference,
                task=task,
                device=device,
                dtype=getattr(torch, self.options.dtype),
            )
            report = self._check(model, device)
            self._declare(model, report, undeclared, device)
            if blocks_missing:
                write_blocks(self.layout, model, self.blocks)
            missing = self._missing()
            self._check_space(missing)
            self._run_segments(model, report, missing, device, nonfinite)
        for writer in self.writers.values():
            writer.commit()

    def _blocks_are_there(self) -> bool:
        entry = read_index(self.layout)["assets"].get(BLOCKS)
        return (
            entry is not None
            and entry["layers"] == self.blocks
            and (self.layout.assets / entry["file"]).exists()
        )

    def _check(self, model: PreTrainedModel, device: torch.device) -> TapReport:
        """Compare taps with the model's own outputs on the longest training examples."""
        examples = self.reader.examples
        train = np.flatnonzero(examples["split"] == SPLITS.index(TRAIN))
        longest = train[np.argmax(examples["length"][train])]
        segment = self.reader.read_segment(int(examples["segment"][longest]))
        members = np.argsort(-segment.length, kind="stable")[:CHECK_EXAMPLES]
        # A shorter one beside the longest, so that padding is part of the check.
        members[-1] = np.argmin(segment.length)
        batch = collate(segment, np.unique(members), self.reader.plan["pad_id"], device)
        report = check_taps(
            model,
            batch.inputs,
            hidden=sorted(s.layer for s in self.signals if s.kind == "hidden"),  # pyright: ignore
            attention=sorted(s.layer for s in self.signals if s.kind == "attention"),  # pyright: ignore
            head=any(s.form.name == "head" for s in self.signals),
            max_length=self.reader.plan["max_length"],
        )
        logger.info("taps agree with the teacher's own outputs on %d examples", len(batch.members))
        return report

    def _declare(
        self,
        model: PreTrainedModel,
        report: TapReport,
        undeclared: Sequence[Signal],
        device: torch.device,
    ) -> None:
        with_channels = [s for s in undeclared if s.kind == "hidden" or s.form.needs_channels]
        if with_channels:
            batches = (
                batch
                for segment in self.reader.segments(TRAIN)
                for batch in segment_batches(
                    self.reader.read_segment(segment),
                    self.options.batch_tokens,
                    self.reader.plan["pad_id"],
                    device,
                )
            )
            teacher = TappedTeacher(model, report, with_channels)
            for name, statistics in measure_channels(teacher, batches, with_channels).items():
                signal = next(s for s in with_channels if s.name == name)
                save_channels(self.layout.channels(signal.kind, signal.layer), statistics)
        for signal in undeclared:
            channels = (
                file_digest(self.layout.channels(signal.kind, signal.layer), self.layout.root)
                if signal in with_channels
                else None
            )
            info = self._info(model, report, signal)
            declared = Declaration.of(
                signal, self._geometry(model, report, signal), splits_of(signal), info, channels
            )
            self.writers[signal.name] = self._writer(declared)
            self.writers[signal.name].declare()

    def _info(self, model: PreTrainedModel, report: TapReport, signal: Signal) -> dict:
        if signal.kind == "attention":
            assert signal.layer is not None
            return {"rule": report.rule[signal.layer], "scaling": report.scaling[signal.layer]}
        if signal.form.name == "head":
            assert report.head is not None
            return {
                "scale": report.head.scale,
                "softcap": report.head.softcap,
                HEAD: write_head(self.layout, model),
            }
        return {}

    def _geometry(self, model: PreTrainedModel, report: TapReport, signal: Signal) -> Geometry:
        if signal.kind == "attention":
            return Geometry(heads=report.heads, kv_heads=report.kv_heads, d_head=report.d_head)
        if signal.form.name == "dense":
            return Geometry(vocab=int(model.config.num_labels or 0))
        if signal.kind == "logits":
            rows, width = head_parameters(model)[0].shape
            return Geometry(width=int(width), vocab=int(rows))
        return Geometry(width=report.d_teacher)

    def _check_space(self, missing: dict[int, tuple[str, ...]]) -> None:
        row_bytes = {
            name: sum(
                np.dtype(part.dtype).itemsize * int(np.prod(part.row_shape))
                for part in writer.declared.parts().values()
            )
            * writer.shard_rows
            for name, writer in self.writers.items()
        }
        needed = sum(row_bytes[name] for names in missing.values() for name in names)
        free = shutil.disk_usage(self.layout.root).free
        if needed + DISK_RESERVE_BYTES > free:
            raise ResourceError(
                f"{self.layout.root}: {free / 1e9:.2f} GB free, the missing features need up to "
                f"{needed / 1e9:.2f} GB; free space, capture fewer layers, or a smaller fraction"
            )

    def _run_segments(
        self,
        model: PreTrainedModel,
        report: TapReport,
        missing: dict[int, tuple[str, ...]],
        device: torch.device,
        nonfinite: Literal["stop", "skip"],
    ) -> None:
        wanted = [s for s in self.signals if any(s.name in names for names in missing.values())]
        if not wanted:
            return
        total = sum(self.plan.in_segment(s).stop - self.plan.in_segment(s).start for s in missing)
        logger.info(
            "%d of %d segments to capture, %d examples", len(missing), self.plan.segments, total
        )
        with BackgroundWriter(threads=self.runtime.writers) as background:
            run = SegmentCapture(
                TappedTeacher(model, report, wanted),
                self.reader,
                self.writers,
                {name: self._channels(name, device) for name in self.writers},
                batch_tokens=self.options.batch_tokens,
                pad_id=self.reader.plan["pad_id"],
                device=device,
                nonfinite=nonfinite,
                background=background,
            )
            graph = {
                ("segment", number): delayed(run, pure=False)(
                    number, names, dask_key_name=f"segment-{number}"
                )
                for number, names in missing.items()
            }
            with _Progress(len(graph)):
                compute(
                    *graph.values(),
                    scheduler=self.runtime.scheduler,
                    num_workers=min(self.runtime.workers, os.cpu_count() or 1),
                )

    def _channels(self, name: str, device: torch.device) -> Channels | None:
        declared = self.writers[name].declared
        if declared.channels is None:
            return None
        from safetensors.torch import load_file

        tensors = load_file(self.layout.channels(declared.kind, declared.layer))
        return Channels(tensors["mean"].to(device), tensors["deviation"].to(device))


class _Progress(Callback):
    """A bar of segments with an ETA, on stderr, whatever the local scheduler."""

    def __init__(self, segments: int) -> None:
        super().__init__()
        self._bar = tqdm(total=segments, desc="capture", unit="segment")

    def _posttask(self, key, result, dsk, state, worker_id) -> None:  # noqa: ANN001
        if str(key).startswith("segment-"):
            self._bar.update()

    def _finish(self, dsk, state, failed) -> None:  # noqa: ANN001
        self._bar.close()


def declared_writer(
    layout: Layout, plan: Plan, chunk_tokens: int, signal: Signal
) -> SignalWriter | None:
    """Return the writer of a signal that was declared before and whose statistics are intact."""
    from pipeline.errors import IntegrityError
    from pipeline.provenance import read_json

    path = layout.receipt(signal.name, 0).parent / "declaration.json"
    try:
        declared = Declaration.from_json(read_json(path))
        if declared.channels is not None:
            channels = layout.channels(signal.kind, signal.layer)
            if file_digest(channels, layout.root) != declared.channels:
                return None
    except IntegrityError:
        return None
    return SignalWriter(layout, plan, chunk_tokens, declared)
