"""The capture stage: run the teacher once over the corpus and write its features to the store.

Receipts show which (segment, signal) pairs exist; only missing ones are computed, with one Dask
task per segment. If the store is complete, neither teacher nor torch is loaded, see
`pipeline.teacher.capture.complete`.
"""

import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import torch
from transformers import PreTrainedModel

from pipeline.axes import TRAIN
from pipeline.corpus.tokens.tokens import TokenMeta, TokenSet
from pipeline.errors import IntegrityError
from pipeline.provenance import unfinished_files
from pipeline.runtime import Runtime
from pipeline.store.commit import SignalWriter
from pipeline.store.index import read_index, withdraw
from pipeline.store.layout import BLOCKS, Layout
from pipeline.store.links import refuse_links
from pipeline.store.lock import writer_lock
from pipeline.store.plan import Plan
from pipeline.store.planner import Rows, rows_digest, write_plan
from pipeline.store.reader import Segment, StoreReader
from pipeline.store.records import Declaration
from pipeline.store.shards import file_digest
from pipeline.store.signals import Signal
from pipeline.taps.check import TapReport
from pipeline.taps.magnitudes import input_magnitudes
from pipeline.taps.row_length import require_room
from pipeline.teacher.capture.assets import write_blocks, write_descriptions
from pipeline.teacher.capture.batch_size import (
    Rehearsal,
    known_batch_tokens,
    named_check_memory,
    named_memory,
    settle_batch_tokens,
)
from pipeline.teacher.capture.declare import declarations, load_declaration
from pipeline.teacher.capture.disk_space import (
    RowSizes,
    configured_sizes,
    measured_sizes,
    needed_bytes,
    require_space,
)
from pipeline.teacher.capture.forward import Batch, segment_batches
from pipeline.teacher.capture.reuse import Reuse
from pipeline.teacher.capture.segments import SegmentJob
from pipeline.teacher.capture.spec import SegmentOptions, store_fingerprint, store_spec
from pipeline.teacher.capture.statistics import sample_batches
from pipeline.teacher.capture.tap_check import CHECK_EXAMPLES, check_signals, checked_batch
from pipeline.teacher.capture.token_rows import load_rows, longest_segment, plan_rows
from pipeline.teacher.source.load import load_teacher
from pipeline.teacher.source.placement import Placement, input_device
from pipeline.teacher.source.reference import TeacherReference
from pipeline.teacher.workers.schedule import run_here

logger = logging.getLogger(__name__)


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
    wait: bool = True,
) -> Path:
    """Complete every requested signal in the store; return the store's directory.

    With `wait`, it waits for another process that writes the store, instead of failing.

    Raises:
        ConfigError: If an example is longer than a segment.
        IncompatibleError: If the teacher was trained with another tokenizer, or a tap differs from
            the model.
        IntegrityError: If features are not finite and `nonfinite` is `stop`.
        ResourceError: If disk space or memory does not suffice, another process writes the store
            (without `wait`), or worker processes keep dying on a segment.
    """
    # Workers have other working directories.
    teacher, stores = teacher.absolute(), stores.absolute()
    token_set = TokenSet.load(tokens)
    token_set.check_tokenizer()
    meta = token_set.meta
    reference = TeacherReference.load(teacher)
    meta.refuse_others(str(teacher), tokenizer=(reference.made_of or {}).get("tokenizer"))
    spec = store_spec(meta, reference, options)
    layout = Layout(stores / store_fingerprint(spec))
    plan = plan_rows(token_set, options)
    device = torch.device(runtime.torch_device())
    # Pickled, because worker processes load their own teacher.
    load = partial(
        load_teacher,
        teacher,
        reference.anywhere(),
        task=meta.task,
        device=device,
        dtype=getattr(torch, options.dtype),
        placement=Placement.of(runtime),
    )

    with writer_lock(layout.lock, wait=wait), _swept(layout):
        rows = load_rows(token_set, plan)
        run = _Capture(layout, plan, list(signals), list(blocks), options, nonfinite, device, meta)
        description = run.description | {"spec": spec}
        run.batch_tokens = known_batch_tokens(layout, options.batch_tokens)
        run.reuse = Reuse(layout, plan, rows, description, takes_skipped=nonfinite == "skip")

        def write_records() -> None:
            if not layout.plan.exists():
                write_descriptions(layout, reference.config, token_set.tokenizer_path)
            write_plan(layout, plan, rows, description | run.batch_record())

        if layout.plan.exists() and run.batch_tokens is not None:
            run.reuse.keep_to(run.batch_tokens)
            write_records()
            run.find_existing()
            run.reuse_segments()
        if run.is_incomplete():
            run.check_space(configured_sizes(reference.config, signals, task=meta.task))
            if runtime.is_cluster:
                # Before the teacher is loaded, which can take long.
                from pipeline.teacher.workers.remote import refuse_unfit

                refuse_unfit(runtime, layout)
            model = load()
            run.device = input_device(model, device)
            report = run.check(model, longest_segment(plan, rows))
            run.check_space(measured_sizes(model, report))
            run.settle_batches(model, report, rows)
            write_records()
            run.declare(model, report)
            if run.reuse_segments():
                run.check_space(measured_sizes(model, report), is_final=True)
            if todo := run.segments():
                job = run.job(report)
                if runtime.scheduler == "processes" or runtime.is_cluster:
                    # Imported here, because Dask's servers take a second to import.
                    from pipeline.teacher.workers.workers import run_in_workers

                    del model  # its memory is needed for the workers' teachers
                    run_in_workers(job, load, todo, runtime)
                else:
                    with named_memory(job.batch_tokens):
                        run_here(job, model, todo, runtime)
        run.commit()
    return layout.root


@contextmanager
def _swept(layout: Layout) -> Iterator[None]:
    """Remove the leftovers of killed captures, and of this one at its end, even if it fails."""
    refuse_links(layout.root)
    _end_attempts(layout)
    for leftover in unfinished_files(layout.root):
        leftover.unlink()
    try:
        yield
    finally:
        _end_attempts(layout)


def _end_attempts(layout: Layout) -> None:
    """Remove the staging directories of unfinished attempts, which stops their workers."""
    if layout.staging.is_dir():
        for attempt in layout.staging.iterdir():
            # Renamed first, because a running worker could write faster than files are removed.
            attempt.rename(layout.attempt(uuid4().hex))
    shutil.rmtree(layout.staging, ignore_errors=True)


@dataclass(eq=False)
class _Capture:
    """The steps and the state of one capture, under the store's lock."""

    layout: Layout
    plan: Plan
    signals: list[Signal]
    blocks: list[int]
    options: SegmentOptions
    nonfinite: Literal["stop", "skip"]
    device: torch.device
    meta: TokenMeta
    writers: dict[str, SignalWriter] = field(default_factory=dict)
    missing: dict[str, list[int]] = field(default_factory=dict)
    undeclared: list[Signal] = field(init=False)
    reuse: Reuse | None = None
    batch_tokens: int | None = None

    def __post_init__(self) -> None:
        self.undeclared = list(self.signals)

    @property
    def description(self) -> dict[str, Any]:
        """The fields of the plan's record that follow from corpus and parameters."""
        return {
            "chunk_tokens": self.options.chunk_tokens,
            "task": self.meta.task,
            "classes": list(self.meta.classes),
            "vocab": self.meta.vocab,
            "pad_id": self.meta.pad_id,
            "max_length": self.meta.max_length,
        }

    def find_existing(self) -> None:
        """Find what earlier captures wrote; hide damaged signals from readers."""
        self.undeclared = []
        for signal in self.signals:
            declared = load_declaration(self.layout, signal)
            if declared is None:
                self.undeclared.append(signal)
                withdraw(self.layout, signal.name)
            else:
                self._add_writer(declared)

    def _add_writer(self, declared: Declaration) -> None:
        """Prepare to write a declared signal; reads and checks all its existing files."""
        name = declared.name
        writer = SignalWriter(self.layout, self.plan, self.options.chunk_tokens, declared)
        self.writers[name] = writer
        self.missing[name] = writer.missing()

    def reuse_segments(self) -> bool:
        """Copy segments of the same rows from other stores; tell whether there are any."""
        if not self.reuse:
            return False
        self.missing = self.reuse.take(self.writers, self.missing)
        return True

    def is_incomplete(self) -> bool:
        """Tell whether the teacher must run."""
        return bool(
            self.undeclared
            or any(self.missing.values())
            or self._lacks_blocks()
            or self.batch_tokens is None
        )

    def _lacks_blocks(self) -> bool:
        if not self.blocks:
            return False
        if not self.layout.index.exists():
            return True
        entry = read_index(self.layout)["assets"].get(BLOCKS)
        if entry is None or entry.get("layers") != self.blocks:
            return True
        try:
            digest = file_digest(self.layout.assets / entry["file"], self.layout.root)
        except IntegrityError:
            return True
        return digest != {key: entry[key] for key in digest}

    def check(self, model: PreTrainedModel, segment: Segment) -> TapReport:
        """Compare taps with the teacher's own outputs on the longest training examples."""
        logger.info("checking the teacher's taps against its own outputs")
        require_room(model, self.meta.max_length, "the teacher")
        with named_check_memory():
            batch = checked_batch(model, segment, CHECK_EXAMPLES, self.meta.pad_id, self.device)
            report = check_signals(model, batch, self.signals, max_length=self.meta.max_length)
        logger.info("taps agree with the teacher's own outputs on %d examples", len(batch.members))
        return report

    def settle_batches(self, model: PreTrainedModel, report: TapReport, rows: Rows) -> None:
        """Check that batches fit into memory, or determine their size; nothing is written yet."""
        if self.batch_tokens is not None and not self.undeclared:
            return  # checked when the signals were declared
        to_capture = [s for s in self.signals if s in self.undeclared or self.missing[s.name]]
        rehearsal = Rehearsal(
            model, report, to_capture, self.plan, rows, self.meta.pad_id, self.device
        )
        self.batch_tokens = settle_batch_tokens(
            self.batch_tokens,
            rehearsal.fits,
            is_stored=self.layout.plan.exists(),
            nearby=self.reuse.batch_tokens if self.reuse else None,
            device=self.device,
            longest=int(self.plan.length.max()),
        )
        if self.reuse:
            self.reuse.keep_to(self.batch_tokens)

    def batch_record(self) -> dict[str, Any]:
        """Return the field of the plan's record for the number that `auto` became."""
        if self.options.batch_tokens != "auto":
            return {}
        return {"batch_tokens": self.batch_tokens}

    def check_space(self, sizes: RowSizes, *, is_final: bool = False) -> None:
        """Refuse a capture that does not fit on the disk if nothing compresses.

        Unless it is final, segments that other stores have count as zero.
        """
        missing: Mapping[str, Sequence[int]] = self.missing
        if self.reuse and not is_final:
            missing = self.reuse.left_over(self.signals, missing)
        needed = needed_bytes(self.plan, self.signals, missing, sizes)
        require_space(self.layout.root, needed)

    def declare(self, model: PreTrainedModel, report: TapReport) -> None:
        """Declare new signals; write the assets, and receipts of signals without arrays."""
        reader = StoreReader(self.layout.root)
        options, batch_tokens = self.options, self.batch_tokens
        assert batch_tokens is not None  # from settle_batches

        def sample() -> Iterator[Batch]:
            # Only of the first part: text added later must not change the statistics.
            for number in reader.segments(TRAIN, parts=1):
                segment = reader.read_segment(number)
                yield from segment_batches(segment, batch_tokens, self.meta.pad_id, self.device)

        for declared in declarations(self.layout, self.undeclared, model, report, sample):
            SignalWriter(self.layout, self.plan, options.chunk_tokens, declared).declare()
            self._add_writer(declared)
        if self._lacks_blocks():
            batches = sample_batches(sample(), "matrix inputs")
            inputs = (batch.inputs for batch in batches)
            magnitudes = input_magnitudes(model, inputs, is_causal=report.causal)
            logger.info("writing blocks %s of the teacher", ", ".join(map(str, self.blocks)))
            write_blocks(self.layout, model, self.blocks, magnitudes)
        for name, writer in self.writers.items():
            if not writer.is_stored:
                for number in self.missing[name]:
                    digests = reader.examples["digest"][reader.examples_in(number)]
                    writer.write_segment(number, {}, rows=rows_digest(digests))

    def segments(self) -> dict[int, tuple[str, ...]]:
        """Return, by segment, the signals that the teacher must run for."""
        todo: dict[int, tuple[str, ...]] = {}
        for name, numbers in self.missing.items():
            if self.writers[name].is_stored:
                for number in numbers:
                    todo[number] = (*todo.get(number, ()), name)
        if todo:
            logger.info("%d of %d segments to capture", len(todo), self.plan.segments)
        return dict(sorted(todo.items()))

    def job(self, report: TapReport) -> SegmentJob:
        """Return what a process needs to capture the missing segments."""
        assert self.batch_tokens is not None  # from settle_batches
        to_capture = [signal for signal in self.signals if self.missing[signal.name]]
        return SegmentJob(
            layout=self.layout,
            writers={signal.name: self.writers[signal.name] for signal in to_capture},
            signals=to_capture,
            report=report,
            batch_tokens=self.batch_tokens,
            pad_id=self.meta.pad_id,
            device=self.device,
            nonfinite=self.nonfinite,
        )

    def commit(self) -> None:
        """Make every complete signal visible to readers."""
        for writer in self.writers.values():
            writer.commit()
