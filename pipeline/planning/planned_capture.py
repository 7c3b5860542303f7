"""The estimate of one capture, from its teacher's configuration and, if one ran, a probe."""

import dataclasses
import shutil
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.axes import SPLITS, TRAIN
from pipeline.errors import ConfigError, IncompatibleError
from pipeline.planning.project import Project
from pipeline.planning.rehearsal import rehearse
from pipeline.store.layout import Layout
from pipeline.store.plan import Plan
from pipeline.store.reader import StoreReader
from pipeline.store.signals import Signal
from pipeline.store.upkeep.gc import store_bytes
from pipeline.student.parameters import StudentParams
from pipeline.tasks import models_language
from pipeline.teacher.capture.complete import is_complete
from pipeline.teacher.capture.spec import store_fingerprint, store_spec

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from pipeline.planning.estimate import SignalEstimate
    from pipeline.planning.probe import Probe
    from pipeline.planning.token_count import TokenCount
    from pipeline.taps.check import TapReport
    from pipeline.teacher.source.placement import Placement

AUTO_BATCH_TOKENS = 8192
"""Assumed batch size if capture finds the size itself."""


class PlannedCapture:
    """Estimates of one capture: from the configuration, and from `probe` once it is set."""

    probe: "Probe | None" = None
    is_trained: bool = True
    model: "PreTrainedModel"
    outlined: "TapReport"

    def __init__(self, project: Project, count: "TokenCount") -> None:
        import torch

        from pipeline.planning.estimate import SegmentRows
        from pipeline.taps.anatomy import find_anatomy
        from pipeline.teacher.capture.outline import outline, outlined_report

        self.project, self.count = project, count
        self.task = count.meta.task
        self.dtype = getattr(torch, project.options.dtype)
        self.config = self._config()
        self.model = outline(self.config, task=self.task, dtype=self.dtype)
        self.depth = find_anatomy(self.model).depth
        self.signals = project.signals(self.depth, self.task)
        self.blocks = project.blocks(self.depth)
        self.plan: Plan = count.plan(project.options)
        self.segments = SegmentRows(self.plan, project.options.chunk_tokens)
        self.outlined = outlined_report(self.model, self.signals)

    @property
    def report(self) -> "TapReport":
        """The teacher's sizes."""
        return self.outlined if self.probe is None else self.probe.report

    def _config(self) -> "PreTrainedConfig":
        from pipeline.teacher.capture.outline import known_config, pretrained_config
        from pipeline.teacher.source.load import head_options
        from pipeline.teacher.source.scratch import scratch_config

        meta, model, reference = self.count.meta, self.project.model, self.project.reference
        trusts = model.trust_remote_code
        if reference is not None and not trusts:
            return known_config(reference.config)
        if model.path is not None:
            head = head_options(self.task, meta.classes) if self.project.is_fit else None
            return pretrained_config(
                model.path, revision=model.revision, trust_remote_code=trusts, head=head
            )
        return scratch_config(
            model.scratch or {},
            task=self.task,
            classes=meta.classes,
            vocab=meta.vocab,
            pad_id=meta.pad_id,
            key=f"teachers.{self.project.name}",
        )

    def run_probe(self, device: str, placement: "Placement | None") -> "Probe":
        """Load the teacher and capture a sample, without writing it.

        Args:
            device: The device that computes.
            placement: How the teacher is spread over devices; None if one holds it.
        """
        import torch

        from pipeline.planning.probe import PROBE_TOKENS, load_to_probe, probe
        from pipeline.planning.token_count import sample_segment
        from pipeline.teacher.source.placement import input_device

        options, model, meta = self.project.options, self.project.model, self.count.meta
        loaded, self.is_trained = load_to_probe(
            self.project.directory,
            self.project.reference,
            path=model.path,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            config=self.config,
            task=self.task,
            classes=meta.classes,
            is_fit=self.project.is_fit,
            device=torch.device(device),
            dtype=self.dtype,
            placement=placement,
        )
        return probe(
            loaded,
            sample_segment(self.count.token_set, options, PROBE_TOKENS),
            self.signals,
            batch_tokens=self.batch_tokens,
            chunk_tokens=options.chunk_tokens,
            pad_id=meta.pad_id,
            max_length=meta.max_length,
            device=input_device(loaded, torch.device(device)),
        )

    @property
    def batch_tokens(self) -> int:
        """Tokens of a batch, padding included."""
        tokens = self.project.options.batch_tokens
        return tokens if isinstance(tokens, int) else AUTO_BATCH_TOKENS

    def estimate(self, signal: Signal) -> "SignalEstimate":
        """Return the bytes that a signal takes, by the probe's ratio if it measured the signal."""
        from pipeline.planning.estimate import estimate_signal

        return estimate_signal(
            signal,
            self.segments,
            model=self.model,
            report=self.report,
            ratio=None if self.probe is None else self.probe.ratios.get(signal.name),
        )

    @cached_property
    def store(self) -> StoreReader | None:
        """The complete store of this capture; None if there is none."""
        if self.project.reference is None or not self.count.is_exact:
            return None
        spec = store_spec(self.count.meta, self.project.reference, self.project.options)
        layout = Layout(self.project.stores / store_fingerprint(spec))
        return StoreReader(layout.root) if is_complete(layout, self.signals, self.blocks) else None

    @property
    def tables_bytes(self) -> int:
        """About how many bytes tokens, example table and records take."""
        from pipeline.planning.estimate import table_bytes

        extra = len(self.count.meta.columns)
        return table_bytes(self.plan, columns=extra, signals=len(self.signals))

    def describe(self) -> dict[str, Any]:
        """Return all estimates as JSON values."""
        from pipeline.teacher.capture.disk_space import DISK_RESERVE_BYTES

        estimates = [self.estimate(signal) for signal in self.signals]
        assets = self.asset_bytes(self.signals, self.blocks)
        once = sum(assets.values()) + self.tables_bytes
        place = _existing(self.project.stores)
        free = shutil.disk_usage(place).free
        most = sum(one.most_bytes for one in estimates) + once
        store = self.store
        needed = 0 if store else most + DISK_RESERVE_BYTES
        splits = {split: self.count.tokens(split) for split in SPLITS}
        if self.probe is None:
            how = "exact before compression; the expected size uses each form's usual ratio"
        elif self.is_trained:
            how = f"measured on {self.probe.tokens:,} tokens of this teacher"
        else:
            how = f"measured on {self.probe.tokens:,} tokens of random weights; run teach first"
        return {
            "teacher": self.project.name,
            "tokens": {
                "origin": self.count.origin,
                "is_exact": self.count.is_exact,
                "splits": splits,
                "captured": int(self.plan.length.sum()),
            },
            "segments": self.plan.segments,
            "training_segments": len(self.plan.segments_of(TRAIN)),
            "batch_tokens": self.batch_tokens,
            "is_batch_found": self.project.options.batch_tokens == "auto",
            "bytes": how,
            "signals": [self._signal(one) for one in estimates],
            "assets": assets,
            "tables_bytes": self.tables_bytes,
            "total": {
                "raw_bytes": sum(one.raw_bytes for one in estimates),
                "expected_bytes": sum(one.expected_bytes for one in estimates) + once,
                "most_bytes": most,
                "took_bytes": None if store is None else store_bytes(store.layout.root),
            },
            "disk": {
                "path": str(place),
                "free_bytes": free,
                "needed_bytes": needed,
                "fits": needed <= free,
            },
            "memory": {"capture": self._memory(estimates), "students": self._students(estimates)},
            "time": self._time(),
            "budget": None,
        }

    def _signal(self, one: "SignalEstimate") -> dict[str, Any]:
        signal, store = one.signal, self.store
        return {
            "signal": signal.name,
            "kind": signal.kind,
            "layer": signal.layer,
            "form": signal.form.name,
            "splits": "all" if len(one.splits) == len(SPLITS) else ",".join(one.splits),
            "tokens": one.tokens,
            "token_bytes": one.token_bytes,
            "raw_bytes": one.raw_bytes,
            "expected_bytes": one.expected_bytes,
            "most_bytes": one.most_bytes,
            "ratio": one.ratio,
            "is_measured": one.is_measured,
            "took_bytes": None if store is None else store.signal(signal.name).bytes,
        }

    def _memory(self, estimates: list["SignalEstimate"]) -> dict[str, Any]:
        from pipeline.planning.estimate import activation_bytes, buffered_bytes
        from pipeline.teacher.capture.outline import weight_bytes, widest_inner

        probe = self.probe
        of = None if probe is None else "of the GPU" if "cuda" in probe.device else "of the process"
        packed = self.project.model.quantization
        # One segment is filled while at most two wait to be written.
        return {
            "dtype": self.project.options.dtype,
            "weight_bytes": weight_bytes(self.model, bits=None if packed is None else packed.bits),
            "activation_bytes": activation_bytes(
                self.model,
                self.report,
                self.signals,
                batch_tokens=self.batch_tokens,
                inner=widest_inner(self.model),
            ),
            "peak_bytes": None if probe is None else probe.peak_bytes,
            "peak_of": of,
            "buffer_bytes": 3 * buffered_bytes(estimates, self.plan),
        }

    def rehearse(self, name: str, signals: list[Signal]) -> dict[str, Any]:
        """Return the record that the select stage would write if these signals were captured."""
        return rehearse(
            name,
            self.project.students[name],
            signals,
            self.blocks,
            depth=self.depth,
            config=self.config.to_dict(),
        )

    def _kept(self, student: StudentParams) -> int | None:
        """Return how many ids a student keeps, by the rows at hand; None if it keeps all."""
        if student.model.vocabulary != "corpus" or not models_language(self.task):
            return None
        import numpy as np

        from pipeline.student.vocabulary.vocabulary import smaller_vocabulary

        meta, tokens = self.count.meta, self.count.token_set
        table: Any = tokens.split(TRAIN).with_format("arrow")[:]
        ids = table["input_ids"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        kept = smaller_vocabulary(
            np.unique(ids).tolist(),
            self.config.to_dict(),
            tokens.tokenizer_path,
            vocab=meta.vocab,
            pad_id=meta.pad_id,
        )
        return len(kept.ids)

    def asset_bytes(self, signals: list[Signal], blocks: list[int]) -> dict[str, int]:
        """Return the bytes of assets. Weights saved in half precision are stored in it."""
        from pipeline.planning.estimate import asset_bytes

        item_bytes = 2 if self._is_saved_in_half else 4
        return asset_bytes(signals, blocks, self.model, self.report, item_bytes=item_bytes)

    @cached_property
    def _is_saved_in_half(self) -> bool:
        # Read from the checkpoint: the teacher's reference names the dtype in which it was loaded.
        from pipeline.teacher.source.load import load_config

        model = self.project.model
        if model.path is None or self.project.is_fit:
            return False
        try:
            found = load_config(
                model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
            )
        except ConfigError:
            return False  # no longer at hand, so assume the larger size
        return str(found.get("dtype")).endswith("16")

    def _epochs(self, student: StudentParams) -> float:
        options = student.train
        if options.steps is None:
            return float(options.epochs)
        rows = int((self.plan.split == SPLITS.index(TRAIN)).sum())
        return options.steps * options.batch_size * options.gradient_accumulation_steps / rows

    def _students(self, estimates: list["SignalEstimate"]) -> dict[str, Any]:
        from pipeline.planning.estimate import buffered_bytes
        from pipeline.planning.student_memory import student_memory
        from pipeline.store.forms.head import HEAD

        found: dict[str, Any] = {}
        for name, student in self.project.students.items():
            try:
                selected = self.rehearse(name, self.signals)
                used = [one for one in estimates if one.signal.name in selected["signals"]]
                assets = self.asset_bytes([one.signal for one in used], [])
                segment_bytes = buffered_bytes(used, self.plan)
                memory = student_memory(
                    model=student.model,
                    objective=student.loss,
                    options=student.train,
                    teacher_config=self.config.to_dict(),
                    task=self.task,
                    max_length=self.count.meta.max_length,
                    feature_pairs=len(selected["maps"]["feature"]),
                    attention_pairs=len(selected["maps"]["attention"]),
                    head_bytes=assets.get(HEAD, 0),
                    token_bytes=segment_bytes / self.plan.segment_tokens,
                    segment_bytes=segment_bytes,
                    pool_segments=student.pool_segments,
                    store_bytes=sum(one.raw_bytes for one in used),
                    vocabulary=self._kept(student),
                )
            except (ConfigError, IncompatibleError) as error:
                found[name] = {"error": str(error), "epochs": self._epochs(student)}
                continue
            found[name] = {**dataclasses.asdict(memory), "epochs": self._epochs(student)}
        return found

    def _time(self) -> dict[str, Any] | None:
        probe = self.probe
        if probe is None:
            return None
        captured = int(self.plan.length.sum())
        train = int(self.plan.length[self.plan.split == SPLITS.index(TRAIN)].sum())
        saved = (probe.forward_seconds - probe.read_seconds) * train
        total = probe.capture_seconds * captured
        return {
            "device": probe.device,
            "probed_tokens": probe.tokens,
            "forward_seconds": probe.forward_seconds,
            "capture_seconds": probe.capture_seconds,
            "read_seconds": probe.read_seconds,
            "capture_total_seconds": total,
            "pays_from": total / saved if saved > 0 else None,
            "planned": sum(self._epochs(one) for one in self.project.students.values()),
        }


def _existing(path: Path) -> Path:
    """Return the nearest directory above that is there already."""
    path = path.resolve()
    return next(one for one in (path, *path.parents) if one.exists())
