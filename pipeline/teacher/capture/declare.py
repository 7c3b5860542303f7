"""Declare signals: sizes, bytes per row, and the assets that a reader needs to decode them."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from pipeline.axes import Axis
from pipeline.errors import IncompatibleError, IntegrityError
from pipeline.store.forms.form import Geometry, Tap
from pipeline.store.index import read_index
from pipeline.store.layout import Layout
from pipeline.store.records import Declaration
from pipeline.store.sealed import read_record
from pipeline.store.shards import file_digest
from pipeline.store.signals import Signal
from pipeline.taps.check import TapReport
from pipeline.taps.head import linear_head
from pipeline.teacher.capture.assets import write_head, write_query_key
from pipeline.teacher.capture.forward import Batch, TappedTeacher
from pipeline.teacher.capture.request import splits_of
from pipeline.teacher.capture.statistics import measure_channels, save_channels


def geometry_of(signal: Signal, model: PreTrainedModel, report: TapReport) -> Geometry:
    """Return a signal's sizes.

    Raises:
        IncompatibleError: If the model has no head to store.
    """
    match signal.form.tap:
        case Tap.HIDDEN:
            return Geometry(width=report.d_teacher)
        case Tap.QUERY_KEY | Tap.LAYER_BELOW:
            return Geometry(heads=report.heads, kv_heads=report.kv_heads, d_head=report.d_head)
        case Tap.ATTENTION_MAP:
            return Geometry(heads=report.heads)
        case Tap.VALUE:
            return Geometry(kv_heads=report.kv_heads, d_head=report.d_value)
        case Tap.LOGITS | Tap.HEAD_INPUT:
            if signal.axis is Axis.EXAMPLE:
                return Geometry(vocab=int(model.config.num_labels or 0))
            head = linear_head(model)
            return Geometry(width=head.in_features, vocab=head.out_features)


def row_bytes(signal: Signal, geometry: Geometry) -> int:
    """Return the bytes of one row of a signal before compression.

    Raises:
        IncompatibleError: If the form's options do not fit the sizes.
    """
    arrays = signal.form.arrays(geometry).values()
    return sum(np.dtype(a.dtype).itemsize * int(np.prod(a.row_shape)) for a in arrays)


def load_declaration(layout: Layout, signal: Signal) -> Declaration | None:
    """Return a signal's declaration if it exists and the assets it names are intact, else None."""
    try:
        declared = Declaration.from_json(read_record(_path(layout, signal), layout.root))
        if declared.channels is not None:
            path = layout.channels(signal.kind, signal.layer)
            if file_digest(path, layout.root) != declared.channels:
                return None
        for name, entry in declared.asset_entries.items():
            digest = file_digest(layout.assets / entry["file"], layout.root)
            if entry != {"file": entry["file"], **digest} or (
                read_index(layout)["assets"].get(name) != entry
            ):
                return None
    except (IntegrityError, IncompatibleError):
        return None
    return declared


def declarations(
    layout: Layout,
    signals: Sequence[Signal],
    model: PreTrainedModel,
    report: TapReport,
    sample: Callable[[], Iterable[Batch]],
) -> list[Declaration]:
    """Declare signals and write their assets: channel statistics, head, attention parameters.

    Channel statistics belong to a layer: a second form of a layer uses the statistics that its
    first form was declared with.

    Args:
        layout: The store.
        signals: The signals to declare.
        model: The teacher.
        report: The report of its tap check.
        sample: Returns the batches to measure statistics on.
    """
    standardised = [s for s in signals if s.form.has_channels]
    unmeasured = [s for s in standardised if _measured_before(layout, s) is None]
    if unmeasured:
        teacher = TappedTeacher(model, report, unmeasured)
        measured = measure_channels(teacher, sample(), unmeasured)
        for signal in unmeasured:
            save_channels(layout.channels(signal.kind, signal.layer), measured[signal.name])
    return [
        Declaration.of(
            signal,
            geometry_of(signal, model, report),
            splits_of(signal),
            _info(layout, signal, model, report),
            file_digest(layout.channels(signal.kind, signal.layer), layout.root)
            if signal in standardised
            else None,
        )
        for signal in signals
    ]


def _path(layout: Layout, signal: Signal) -> Any:
    return layout.receipt(signal.name, 0).parent / "declaration.json"


def _measured_before(layout: Layout, signal: Signal) -> dict[str, int] | None:
    """Return the digest of a layer's statistics file if a form was declared with exactly that."""
    path = layout.channels(signal.kind, signal.layer)
    if not path.exists():
        return None
    digest = file_digest(path, layout.root)
    others = _path(layout, signal).parent.parent.glob(f"{path.stem}.*/declaration.json")
    return digest if any(_channels_of(layout, other) == digest for other in others) else None


def _channels_of(layout: Layout, declaration: Path) -> dict[str, int] | None:
    try:
        return read_record(declaration, layout.root).get("channels")
    except IntegrityError:
        return None  # that signal will be declared again


def _info(
    layout: Layout, signal: Signal, model: PreTrainedModel, report: TapReport
) -> dict[str, Any]:
    tap, layer = signal.form.tap, signal.layer
    if layer is None:
        if tap is not Tap.HEAD_INPUT:
            return {}
        assert report.head is not None
        heads = {name: write_head(layout, name, model) for name in signal.assets}
        return {"scale": report.head.scale, "softcap": report.head.softcap, **heads}
    if tap is Tap.HIDDEN:
        return {}
    rule = {"rule": report.rule[layer]}
    if tap in (Tap.ATTENTION_MAP, Tap.VALUE):
        return rule
    blocks = {name: write_query_key(layout, name, model, layer) for name in signal.assets}
    return rule | {"scaling": report.scaling[layer]} | signal.needs | blocks
