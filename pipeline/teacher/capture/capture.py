"""Stage one: the teacher runs once over the corpus and its features go to the store.

What is whole is found from receipts; only missing (segment, signal) pairs are computed, a Dask task
a segment. A capture that has nothing to do needs neither teacher nor torch, see
`pipeline.teacher.capture.complete`.
"""

import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from pipeline.store.commit import SignalWriter
from pipeline.store.index import read_index, withdraw
from pipeline.store.layout import Layout
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
from pipeline.teacher.capture.assets import BLOCKS, write_blocks, write_descriptions
from pipeline.teacher.capture.batch_size import (
    Rehearsal,
    known_batch_tokens,
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
from pipeline.teacher.capture.finite import checked_batch
from pipeline.teacher.capture.forward import Batch, segment_batches
from pipeline.teacher.capture.reuse import Reuse
from pipeline.teacher.capture.segments import SegmentJob
from pipeline.teacher.capture.spec import SegmentOptions, store_fingerprint, store_spec
from pipeline.teacher.capture.statistics import sample_batches
from pipeline.teacher.capture.tap_check import check_signals
from pipeline.teacher.capture.token_rows import load_rows, longest_segment, plan_rows
from pipeline.teacher.source.load import load_teacher
from pipeline.teacher.source.placement import input_device
from pipeline.teacher.source.reference import TeacherReference
from pipeline.teacher.workers.schedule import Runtime, run_here

logger = logging.getLogger(__name__)
CHECK_EXAMPLES = 4


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
        IncompatibleError: If the teacher was trained with another tokenizer, or cannot be tapped as
            asked.
        IntegrityError: If features are not finite and `nonfinite` is `stop`.
        ResourceError: If disk space does not suffice, another process writes (`runtime.wait`
            false), or worker processes keep dying on a segment.
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
    # Worker processes load their own, so this is pickled.
    load = partial(
        load_teacher,
        teacher,
        reference.anywhere(),
        task=meta.task,
        device=torch.device(runtime.device),
        dtype=getattr(torch, options.dtype),
        placement=runtime.placement,
    )

    with writer_lock(layout.lock, wait=runtime.wait), _swept(layout):
        rows = load_rows(token_set, plan)
        device = torch.device(runtime.device)
        run = _Capture(layout, plan, list(signals), list(blocks), options, nonfinite, device, meta)
        description = run.description | {"spec": spec}
        run.batch_tokens = known_batch_tokens(layout, options.batch_tokens)
        run.reuse = Reuse(layout, plan, rows, description, takes_skipped=nonfinite == "skip")

        def lay_out() -> None:
            if not layout.plan.exists():
                write_descriptions(layout, reference.config, token_set.tokenizer_path)
            write_plan(layout, plan, rows, description | run.found())

        if layout.plan.exists() and run.batch_tokens is not None:
            run.reuse.keep_to(run.batch_tokens)
            lay_out()
            run.take_up()
            run.take_over()
        if run.is_incomplete():
            run.check_space(configured_sizes(reference.config, signals, task=meta.task))
            if runtime.is_cluster:
                # Before the teacher is loaded, which may take long.
                from pipeline.teacher.workers.remote import refuse_unfit

                refuse_unfit(runtime, layout)
            model = load()
            run.device = input_device(model, device)
            report = run.check(model, longest_segment(plan, rows))
            run.check_space(measured_sizes(model, report))
            run.settle_batches(model, report, rows)
            lay_out()
            run.declare(model, report)
            if run.take_over():
                run.check_space(measured_sizes(model, report), is_final=True)
            if todo := run.segments():
                job = run.job(report)
                if runtime.scheduler == "processes" or runtime.is_cluster:
                    # Here, because nobody else needs Dask's servers, which take a second to import.
                    from pipeline.teacher.workers.workers import run_in_workers

                    del model  # before the workers load theirs: one more might not fit
                    run_in_workers(job, load, todo, runtime)
                else:
                    with named_memory(job.batch_tokens):
                        run_here(job, model, todo, runtime)
        run.commit()
    return layout.root


@contextmanager
def _swept(layout: Layout) -> Iterator[None]:
    """Remove what killed captures left, and in the end what this one did, also when it fails."""
    refuse_links(layout.root)
    _end_attempts(layout)
    for left in unfinished_files(layout.root):
        left.unlink()
    try:
        yield
    finally:
        _end_attempts(layout)


def _end_attempts(layout: Layout) -> None:
    """Remove what unfinished attempts staged, and their directories from under their workers."""
    if layout.staging.is_dir():
        for attempt in layout.staging.iterdir():
            # Renamed first: a worker that still writes would fill it as fast as it is emptied.
            attempt.rename(layout.attempt(uuid4().hex))
    shutil.rmtree(layout.staging, ignore_errors=True)


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
        device: torch.device,
        meta: TokenMeta,
    ) -> None:
        self.layout = layout
        self.plan = plan
        self.signals = signals
        self.blocks = blocks
        self.options = options
        self.nonfinite: Literal["stop", "skip"] = nonfinite
        self.device = device
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
        self.reuse: Reuse | None = None
        self.batch_tokens: int | None = None

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
        name = declared.name
        writer = SignalWriter(self.layout, self.plan, self.options.chunk_tokens, declared)
        self.writers[name] = writer
        self.missing[name] = writer.missing()

    def take_over(self) -> bool:
        """Take what other stores have of the same rows; tell whether there are such stores."""
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
            found = file_digest(self.layout.assets / entry["file"], self.layout.root)
        except IntegrityError:
            return True
        return found != {key: entry[key] for key in found}

    def check(self, model: PreTrainedModel, segment: Segment) -> TapReport:
        """Compare taps with the model's own outputs on the longest training examples."""
        logger.info("checking the teacher's taps against its own outputs")
        require_room(model, self.description["max_length"], "the teacher")
        batch = checked_batch(model, segment, CHECK_EXAMPLES, self.pad_id, self.device)
        report = check_signals(
            model, batch, self.signals, max_length=self.description["max_length"]
        )
        logger.info("taps agree with the teacher's own outputs on %d examples", len(batch.members))
        return report

    def settle_batches(self, model: PreTrainedModel, report: TapReport, rows: Rows) -> None:
        """See that batches fit into memory, or find which do, before anything is written."""
        if self.batch_tokens is not None and not self.undeclared:
            return  # whoever declared the signals has seen to it
        wanted = [s for s in self.signals if s in self.undeclared or self.missing[s.name]]
        rehearsal = Rehearsal(model, report, wanted, self.plan, rows, self.pad_id, self.device)
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

    def found(self) -> dict[str, Any]:
        """Return what the plan's record says beyond its description."""
        if self.options.batch_tokens != "auto":
            return {}
        return {"batch_tokens": self.batch_tokens}

    def check_space(self, sizes: RowSizes, *, is_final: bool = False) -> None:
        """Refuse to start what the disk cannot hold, even if nothing compresses.

        Until it is final, what another store seems to have takes no room.
        """
        missing: Mapping[str, Sequence[int]] = self.missing
        if self.reuse and not is_final:
            missing = self.reuse.left_over(self.signals, missing)
        needed = needed_bytes(self.plan, self.signals, missing, sizes)
        require_space(self.layout.root, needed)

    def declare(self, model: PreTrainedModel, report: TapReport) -> None:
        """Declare what is new, and write the assets and receipts that need no segment."""
        reader = StoreReader(self.layout.root)
        options, batch_tokens = self.options, self.batch_tokens
        assert batch_tokens is not None  # settled before

        def sample() -> Iterator[Batch]:
            # Of the corpus as it was first: what is added later leaves the statistics alone.
            for number in reader.segments(TRAIN, parts=1):
                segment = reader.read_segment(number)
                yield from segment_batches(segment, batch_tokens, self.pad_id, self.device)

        for declared in declarations(self.layout, self.undeclared, model, report, sample):
            SignalWriter(self.layout, self.plan, options.chunk_tokens, declared).declare()
            self._take(declared)
        if self._lacks_blocks():
            batches = sample_batches(sample(), "inputs of matrices")
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
        """Return the signals that the teacher must run for, by segment."""
        found: dict[int, tuple[str, ...]] = {}
        for name, numbers in self.missing.items():
            if self.writers[name].is_stored:
                for number in numbers:
                    found[number] = (*found.get(number, ()), name)
        if found:
            logger.info("%d of %d segments to capture", len(found), self.plan.segments)
        return dict(sorted(found.items()))

    def job(self, report: TapReport) -> SegmentJob:
        """Return what a process needs to capture them."""
        assert self.batch_tokens is not None  # settled before anything was declared
        wanted = [signal for signal in self.signals if self.missing[signal.name]]
        return SegmentJob(
            layout=self.layout,
            writers={signal.name: self.writers[signal.name] for signal in wanted},
            signals=wanted,
            report=report,
            batch_tokens=self.batch_tokens,
            pad_id=self.pad_id,
            device=self.device,
            nonfinite=self.nonfinite,
        )

    def commit(self) -> None:
        """Let readers see every signal that is whole."""
        for writer in self.writers.values():
            writer.commit()
