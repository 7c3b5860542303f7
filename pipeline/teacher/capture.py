"""Stage one: the teacher runs once over the corpus and its features go to the store.

What is whole is found from receipts; only missing (segment, signal) pairs are computed, as one Dask
graph of segments. A capture that has nothing to do needs neither teacher nor torch, see
`pipeline.teacher.whole`.
"""

import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from dask.base import compute
from dask.callbacks import Callback
from dask.delayed import delayed
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import PreTrainedModel

from pipeline.axes import SPLITS, TRAIN
from pipeline.corpus.tokens import TokenMeta, TokenSet
from pipeline.errors import IntegrityError, ResourceError
from pipeline.store.background import BackgroundWriter
from pipeline.store.commit import SignalWriter
from pipeline.store.extent import example_rows
from pipeline.store.forms.form import Channels
from pipeline.store.index import read_index, withdraw
from pipeline.store.layout import Layout
from pipeline.store.lock import writer_lock
from pipeline.store.plan import Plan
from pipeline.store.planner import rows_digest, write_plan
from pipeline.store.reader import Segment, StoreReader
from pipeline.store.records import Declaration
from pipeline.store.shards import file_digest
from pipeline.store.signals import Signal
from pipeline.taps.check import TapReport, check_taps
from pipeline.taps.inputs import model_columns
from pipeline.taps.magnitudes import input_magnitudes
from pipeline.teacher.assets import BLOCKS, write_blocks, write_descriptions
from pipeline.teacher.declare import declarations, geometry_of, load_declaration, row_bytes
from pipeline.teacher.forward import Batch, TappedTeacher, collate, segment_batches
from pipeline.teacher.load import load_teacher
from pipeline.teacher.reference import TeacherReference
from pipeline.teacher.request import splits_of
from pipeline.teacher.rows import load_rows, longest_segment, plan_rows
from pipeline.teacher.segments import SegmentCapture
from pipeline.teacher.spec import SegmentOptions, store_fingerprint, store_spec
from pipeline.teacher.statistics import sample_batches

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
    meta = token_set.meta
    reference = TeacherReference.load(teacher)
    spec = store_spec(meta, reference, options)
    layout = Layout(stores / store_fingerprint(spec))
    plan = plan_rows(token_set, options)

    def load() -> PreTrainedModel:
        return load_teacher(
            teacher,
            reference,
            task=meta.task,
            device=torch.device(runtime.device),
            dtype=getattr(torch, options.dtype),
        )

    with writer_lock(layout.lock, wait=runtime.wait):
        shutil.rmtree(layout.staging, ignore_errors=True)
        rows = load_rows(token_set, plan)
        run = _Capture(layout, plan, list(signals), list(blocks), options, nonfinite, runtime, meta)

        def lay_out() -> None:
            if not layout.plan.exists():
                write_descriptions(layout, reference.config, token_set.tokenizer_path)
            write_plan(layout, plan, rows, run.description | {"spec": spec})

        if layout.plan.exists():
            lay_out()
            run.take_up()
        if run.is_incomplete():
            model = load()
            report = run.check(model, longest_segment(plan, rows))
            run.check_space(model, report)
            lay_out()
            run.fill(model, report)
        run.commit()
        shutil.rmtree(layout.staging, ignore_errors=True)
    return layout.root


class _Capture:
    """The steps of one capture, under the store's lock."""

    def __init__(
        self,
        layout: Layout,
        plan: Plan,
        signals: list[Signal],
        blocks: list[int],
        options: SegmentOptions,
        nonfinite: Literal["stop", "skip"],
        runtime: Runtime,
        meta: TokenMeta,
    ) -> None:
        self.layout = layout
        self.plan = plan
        self.signals = signals
        self.blocks = blocks
        self.options = options
        self.nonfinite: Literal["stop", "skip"] = nonfinite
        self.runtime = runtime
        self.device = torch.device(runtime.device)
        self.pad_id = meta.pad_id
        self.description: dict[str, Any] = {
            "chunk_tokens": options.chunk_tokens,
            "task": meta.task,
            "classes": list(meta.classes),
            "vocab": meta.vocab,
            "pad_id": meta.pad_id,
            "max_length": meta.max_length,
        }
        self.writers: dict[str, SignalWriter] = {}
        self.missing: dict[str, list[int]] = {}
        self.undeclared = list(signals)

    def take_up(self) -> None:
        """Find what earlier captures left; hide from readers what turns out to be damaged."""
        self.undeclared = []
        for signal in self.signals:
            declared = load_declaration(self.layout, signal)
            if declared is None:
                self.undeclared.append(signal)
                withdraw(self.layout, signal.name)
            else:
                self._take(declared)

    def _take(self, declared: Declaration) -> None:
        """Write a declared signal from here on; reads and checks every file it has."""
        name = declared.signal
        writer = SignalWriter(self.layout, self.plan, self.options.chunk_tokens, declared)
        self.writers[name] = writer
        self.missing[name] = writer.missing()

    def is_incomplete(self) -> bool:
        """Tell whether the teacher must run."""
        return bool(self.undeclared or any(self.missing.values()) or self._lacks_blocks())

    def _lacks_blocks(self) -> bool:
        if not self.blocks:
            return False
        entry = read_index(self.layout)["assets"].get(BLOCKS)
        if entry is None or entry["layers"] != self.blocks:
            return True
        try:
            found = file_digest(self.layout.assets / entry["file"], self.layout.root)
        except IntegrityError:
            return True
        return found != {key: entry[key] for key in found}

    def check(self, model: PreTrainedModel, segment: Segment) -> TapReport:
        """Compare taps with the model's own outputs on the longest training examples."""
        members = np.argsort(-segment.length, kind="stable")[:CHECK_EXAMPLES]
        # A shorter one beside the longest, so that padding is part of the check.
        members[-1] = np.argmin(segment.length)
        batch = collate(segment, np.unique(members), self.pad_id, self.device)
        report = check_taps(
            model,
            model_columns(model, batch.inputs),
            hidden=self._layers("hidden"),
            attention=self._layers("attention", "qk"),
            values=self._layers("value"),
            below=self._layers("attention", "below"),
            maps=self._layers("attention", "map"),
            head=any(s.form.name == "head" for s in self.signals),
            max_length=self.description["max_length"],
        )
        logger.info("taps agree with the teacher's own outputs on %d examples", len(batch.members))
        return report

    def _layers(self, kind: str, form: str | None = None) -> list[int]:
        """Return the layers asked for in a kind, and in one form of it."""
        return sorted(
            {
                signal.layer
                for signal in self.signals
                if signal.layer is not None
                and signal.kind == kind
                and form in (None, signal.form.name)
            }
        )

    def check_space(self, model: PreTrainedModel, report: TapReport) -> None:
        """Refuse to start what the disk cannot hold, even if nothing compresses."""
        needed = DISK_RESERVE_BYTES
        for signal in self.signals:
            split_codes = [SPLITS.index(split) for split in splits_of(signal)]
            every = np.flatnonzero(np.isin(self.plan.segment_split, split_codes))
            segments = self.missing.get(signal.name, every)
            here = np.isin(self.plan.segment, segments)
            rule = None if signal.layer is None else report.rule.get(signal.layer)
            count = example_rows(signal.form.axis, self.plan.length[here], rule).sum()
            needed += int(count) * row_bytes(signal, geometry_of(signal, model, report))
        free = shutil.disk_usage(self.layout.root).free
        if needed > free:
            raise ResourceError(
                f"{self.layout.root}: {free / 1e9:.2f} GB free, the missing features need up to "
                f"{needed / 1e9:.2f} GB; free space, capture fewer layers, or a smaller fraction"
            )

    def fill(self, model: PreTrainedModel, report: TapReport) -> None:
        """Declare what is new and capture every missing segment."""
        reader = StoreReader(self.layout.root)
        options = self.options

        def sample() -> Iterator[Batch]:
            for number in reader.segments(TRAIN):
                segment = reader.read_segment(number)
                yield from segment_batches(segment, options.batch_tokens, self.pad_id, self.device)

        for declared in declarations(self.layout, self.undeclared, model, report, sample):
            SignalWriter(self.layout, self.plan, options.chunk_tokens, declared).declare()
            self._take(declared)
        if self._lacks_blocks():
            batches = (batch.inputs for batch in sample_batches(sample()))
            magnitudes = input_magnitudes(model, batches, is_causal=report.causal)
            write_blocks(self.layout, model, self.blocks, magnitudes)
        by_segment: dict[int, list[str]] = {}
        for name, segments in self.missing.items():
            writer = self.writers[name]
            for number in segments:
                if writer.is_stored:
                    by_segment.setdefault(number, []).append(name)
                else:
                    digests = reader.examples["digest"][reader.examples_in(number)]
                    writer.write_segment(number, {}, rows=rows_digest(digests))
        if not by_segment:
            return
        logger.info("%d of %d segments to capture", len(by_segment), self.plan.segments)
        wanted = [signal for signal in self.signals if self.missing[signal.name]]
        with BackgroundWriter(threads=self.runtime.writers) as background:
            run = SegmentCapture(
                TappedTeacher(model, report, wanted),
                reader,
                self.writers,
                {name: self._channels(writer.declared) for name, writer in self.writers.items()},
                batch_tokens=options.batch_tokens,
                pad_id=self.pad_id,
                device=self.device,
                nonfinite=self.nonfinite,
                background=background,
            )
            tasks = [
                delayed(run, pure=False)(number, tuple(names), dask_key_name=f"segment-{number}")
                for number, names in sorted(by_segment.items())
            ]
            with _Progress(len(tasks)):
                compute(
                    *tasks,
                    scheduler=self.runtime.scheduler,
                    num_workers=min(self.runtime.workers, os.cpu_count() or 1),
                )

    def _channels(self, declared: Declaration) -> Channels | None:
        if declared.channels is None:
            return None
        tensors = load_file(self.layout.channels(declared.kind, declared.layer))
        return Channels(tensors["mean"].to(self.device), tensors["deviation"].to(self.device))

    def commit(self) -> None:
        """Let readers see every signal that is whole."""
        for writer in self.writers.values():
            writer.commit()


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
