"""Measures a few batches of the real teacher, encoded and compressed as capture does it.

Nothing is written. The measurements of this sample are taken for the corpus: each signal's ratio of
compression, and the seconds a token of the teacher alone, of capture, and of reading back.
"""

import contextlib
import logging
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from pipeline.axes import Axis
from pipeline.store.codec import CRC, decode_shard, encode_shard
from pipeline.store.extent import PAIR_CHUNK_ROWS, example_rows, first_rows
from pipeline.store.forms.form import ArrayType, Channels
from pipeline.store.reader import Segment
from pipeline.store.signals import Signal
from pipeline.taps.check import TapReport
from pipeline.taps.configuration import auto_class
from pipeline.taps.inputs import model_columns, model_inputs, run_base
from pipeline.teacher.capture.batch_size import named_check_memory
from pipeline.teacher.capture.declare import geometry_of
from pipeline.teacher.capture.encode import BatchEncoder
from pipeline.teacher.capture.forward import Batch, TappedTeacher, segment_batches
from pipeline.teacher.capture.statistics import measure_channels
from pipeline.teacher.capture.tap_check import CHECK_EXAMPLES, check_signals, checked_batch
from pipeline.teacher.source.load import load_pretrained, load_teacher
from pipeline.teacher.source.placement import Placement
from pipeline.teacher.source.reference import TeacherReference

logger = logging.getLogger(__name__)
PROBE_TOKENS = 16384
"""Tokens of the sample: enough for ratios within a few percent."""
ROUNDS, LONG_SECONDS = 3, 20.0
"""Repetitions of the batches, and the seconds after which there are no more."""
HEAD_ROWS = 1024
"""Rows of logits computed at once, which bounds the memory of a large vocabulary."""


@dataclass(frozen=True)
class Probe:
    """The measurements of a sample, in bytes and in seconds for each token.

    `ratios` are bytes on disk over bytes before compression, by signal. `peak_bytes` is the most
    memory that the device, or on a CPU this process, ever held.
    """

    tokens: int
    report: TapReport
    device: str
    ratios: dict[str, float] = field(default_factory=dict)
    forward_seconds: float = 0.0
    capture_seconds: float = 0.0
    read_seconds: float = 0.0
    peak_bytes: int = 0


def probe(
    model: PreTrainedModel,
    segment: Segment,
    signals: Sequence[Signal],
    *,
    batch_tokens: int,
    chunk_tokens: int,
    pad_id: int,
    max_length: int,
    device: torch.device,
) -> Probe:
    """Capture a sample without writing it.

    Args:
        model: The teacher, loaded.
        segment: The sample.
        signals: What is to be captured.
        batch_tokens: Tokens of a batch, padding included.
        chunk_tokens: Tokens of a chunk.
        pad_id: Id to pad batches with.
        max_length: Longest row that will be run.
        device: Where the batches go.

    Raises:
        IncompatibleError: If the teacher does not have a tap.
        IntegrityError: If no row of the sample is finite.
    """
    with named_check_memory():
        checked = checked_batch(model, segment, CHECK_EXAMPLES, pad_id, device)
        report = check_signals(model, checked, signals, max_length=max_length)
    stored = [s for s in signals if s.form.arrays(geometry_of(s, model, report))]
    batches = list(segment_batches(segment, batch_tokens, pad_id, device))
    channels = _channels(model, report, stored, batches)
    encoder = BatchEncoder(model, report, stored, channels)
    shards = {
        one.name: _Shards(one, model, report, segment, chunk_tokens, channels[one.name], device)
        for one in stored
    }
    has_logits = any(signal.kind == "logits" for signal in signals)
    forward, capture = np.full((2, len(batches)), np.inf)
    with _peak(device) as peak:
        # The first pass of a model chooses kernels and takes memory; it is not timed.
        _bare(model, batches[0], report, has_logits)
        encoder(batches[0])
        started = time.perf_counter()
        for number in range(ROUNDS):
            description = f"probe, round {number + 1} of at most {ROUNDS}"
            for place, batch in enumerate(tqdm(batches, desc=description, leave=False)):
                with _timed(device) as bare:
                    _bare(model, batch, report, has_logits)
                with _timed(device) as encoding:
                    for name, encoded in encoder(batch).items():
                        shards[name].put(batch, encoded.arrays)
                # The minimum of several runs: other load on the machine only adds time.
                forward[place] = min(forward[place], bare.seconds)
                capture[place] = min(capture[place], encoding.seconds)
            if time.perf_counter() - started > LONG_SECONDS:
                break
    compress, read = 0.0, 0.0
    for one in shards.values():
        with _timed(device) as compressing:
            one.compress()
        with _timed(device) as reading:
            one.read()
        compress, read = compress + compressing.seconds, read + reading.seconds
    tokens = int(segment.length.sum())
    logger.info("probed %d tokens on %s", tokens, device)
    return Probe(
        tokens=tokens,
        report=report,
        device=str(device),
        ratios={name: one.ratio for name, one in shards.items()},
        forward_seconds=float(forward.sum()) / tokens,
        capture_seconds=float(np.maximum(forward, capture).sum() + compress) / tokens,
        read_seconds=read / tokens,
        peak_bytes=peak.bytes,
    )


def load_to_probe(
    directory: Path,
    reference: TeacherReference | None,
    *,
    path: str | None,
    revision: str | None,
    trust_remote_code: bool,
    config: PreTrainedConfig,
    task: str,
    classes: tuple[str, ...],
    is_fit: bool,
    device: torch.device,
    dtype: torch.dtype,
    placement: Placement | None = None,
) -> tuple[PreTrainedModel, bool]:
    """Load a teacher, or before the teach stage has run, the weights that it starts from.

    Args:
        directory: The teacher's directory.
        reference: What is in it, if the teach stage has run.
        path: Directory or hub id of its weights; None for one to be built.
        revision: Revision of a hub id.
        trust_remote_code: Run code from the model's repository.
        config: Its configuration.
        task: What its head is for.
        classes: Names of the classes.
        is_fit: Whether it will be trained here.
        device: Where it runs, unless it is spread.
        dtype: Of its weights.
        placement: How it is spread over devices.

    Returns:
        The teacher, and whether its weights are trained ones: random ones take other bytes.

    Raises:
        ConfigError: If it cannot be found.
        IncompatibleError: If its weights are not those of the reference.
    """
    if reference is not None:
        keywords: dict[str, Any] = {"task": task, "device": device, "dtype": dtype}
        model = load_teacher(directory, reference, placement=placement, **keywords)
        return model, True
    if path is not None:
        model = load_pretrained(
            path,
            task=task,
            revision=revision,
            trust_remote_code=trust_remote_code,
            dtype=dtype,
            classes=classes,
            new_head=is_fit,
        )
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = auto_class(task).from_config(config, dtype=dtype)
    model.config.use_cache = False
    model.to(device)  # pyright: ignore[reportArgumentType]
    return model.eval().requires_grad_(False), path is not None


class _Shards:
    """The arrays of one signal for the sample: filled, compressed and read back in memory."""

    def __init__(
        self,
        signal: Signal,
        model: PreTrainedModel,
        report: TapReport,
        segment: Segment,
        chunk_tokens: int,
        channels: Channels | None,
        device: torch.device,
    ) -> None:
        form = signal.form
        rule = "causal" if signal.layer is None else report.rule.get(signal.layer, "causal")
        self._form, self._name, self._device = form, signal.name, device
        self._channels = channels
        self._counts = example_rows(form.axis, segment.length, rule)
        self._first = first_rows(self._counts)
        self._rows = int(self._counts.sum())
        self._chunk = {
            Axis.TOKEN: chunk_tokens,
            Axis.EXAMPLE: self._rows,
            Axis.PAIR: PAIR_CHUNK_ROWS,
        }[form.axis]
        self._room = -(-self._rows // self._chunk) * self._chunk
        self._types: dict[str, ArrayType] = form.arrays(geometry_of(signal, model, report))
        self._values = {
            name: np.zeros((self._room, *array.row_shape), array.dtype)
            for name, array in self._types.items()
        }
        self._shards: dict[str, bytes] = {}

    def put(self, batch: Batch, arrays: Any) -> None:
        """Copy a batch's rows to the places of its examples."""
        members = batch.members
        counts = self._counts[members]
        owners = np.repeat(np.arange(len(members)), counts)
        rows = self._first[members][owners] + np.arange(len(owners)) - first_rows(counts)[owners]
        for name, value in arrays.items():
            self._values[name][rows] = value.cpu().numpy()

    def compress(self) -> None:
        """Compress the arrays into shards."""
        self._shards = {
            name: encode_shard(values, self._chunk) for name, values in self._values.items()
        }

    def read(self) -> None:
        """Decode the shards as a student does: on the host, then widened on its device."""
        decoded: dict[str, NDArray[Any]] = {
            name: decode_shard(
                data,
                self._types[name],
                shard_rows=self._room,
                chunk_rows=self._chunk,
                name=self._name,
            )
            for name, data in self._shards.items()
        }
        self._form.decode(
            {name: torch.from_numpy(value).to(self._device) for name, value in decoded.items()},
            self._channels,
        )

    @property
    def ratio(self) -> float:
        """Bytes of the shards over those of the rows."""
        row = sum(
            int(np.prod(array.row_shape)) * np.dtype(array.dtype).itemsize
            for array in self._types.values()
        )
        found = sum(len(data) - CRC.size for data in self._shards.values())
        return found / max(1, row * self._rows)


def _channels(
    model: PreTrainedModel,
    report: TapReport,
    signals: Sequence[Signal],
    batches: Sequence[Batch],
) -> dict[str, Channels | None]:
    """Measure statistics on the sample, of the signals that capture measures them for."""
    standardised = [one for one in signals if one.form.has_channels]
    found: dict[str, Channels | None] = {one.name: None for one in signals}
    if standardised:
        teacher = TappedTeacher(model, report, standardised)
        for name, one in measure_channels(teacher, batches, standardised).items():
            place = batches[0].inputs["attention_mask"].device
            found[name] = Channels(one["mean"].to(place), one["deviation"].to(place))
    return found


@torch.inference_mode()
def _bare(model: PreTrainedModel, batch: Batch, report: TapReport, has_logits: bool) -> None:
    """Run the teacher and drop its outputs; logits are computed if a student needs them."""
    columns = model_columns(model, batch.inputs)
    output = run_base(model, model_inputs(columns, is_causal=report.causal))
    head = model.get_output_embeddings() if has_logits else None
    if head is not None:
        for rows in output[batch.live.to(output.device)].split(HEAD_ROWS):
            head(rows)


@dataclass
class _Measured:
    seconds: float = 0.0
    bytes: int = 0


@contextlib.contextmanager
def _timed(device: torch.device) -> Iterator[_Measured]:
    """Time a block, including work that it started on the device."""
    found = _Measured()
    _wait(device)
    start = time.perf_counter()
    yield found
    _wait(device)
    found.seconds = time.perf_counter() - start


@contextlib.contextmanager
def _peak(device: torch.device) -> Iterator[_Measured]:
    """Measure the peak memory until the end of the block."""
    found = _Measured()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    yield found
    if device.type == "cuda":
        found.bytes = torch.cuda.max_memory_allocated(device)
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        found.bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
