"""Selects the signals of a store that a student needs, from JSON files, before training.

The selection has the digests of these signals alone, so a layer that is captured for another
student does not change it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import ConfigError, DecantError, IncompatibleError, in_short
from pipeline.provenance import read_json
from pipeline.store.forms.form import Content
from pipeline.store.forms.registry import names_of
from pipeline.store.layout import BLOCKS
from pipeline.store.signals import CapturedSignal
from pipeline.student.align.layer_maps import (
    LAYER_MAPS,
    LayerMap,
    Layers,
    block_choice,
    layer_map,
    layer_pairs,
)
from pipeline.student.align.objective import Alignment, AttentionTerm, FeatureTerm, Objective
from pipeline.student.model.origin import StudentModel
from pipeline.written_by import remedy

DEPTH_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")

Blocks = Sequence[int] | Literal["uniform", "first", "last"] | Mapping[Literal["every"], int]


def depth_of(config: dict[str, Any]) -> int | None:
    """Return the number of blocks in a Hugging Face configuration, under any of its names."""
    return next((int(config[key]) for key in DEPTH_KEYS if key in config), None)


def select_signals(
    manifests: Path,
    *,
    name: str,
    objective: Objective,
    align: Alignment,
    model: StudentModel,
) -> dict[str, Any]:
    """Return the store, the signals with their digests, and the layer maps of one student.

    Args:
        manifests: Directory with the JSON files that capture wrote for the student's teacher.
        name: The student's name, for errors.
        objective: The student's loss terms.
        align: The student's layer map.
        model: How the student starts.

    Raises:
        IncompatibleError: If the store lacks a signal the student needs.
        ConfigError: If several forms fit and the term names none.
    """
    records = [read_json(path) for path in sorted(manifests.glob("*.json"))]
    store = next((r for r in records if "config" in r), None)
    if store is None:
        raise ConfigError(f"{manifests}: no store.json; {remedy(manifests)}")
    signals = [CapturedSignal.from_json(r) for r in records if "kind" in r]
    teacher_layers = int(store["layers"])
    key = f"students.{name}"
    own = _own_config(model, key)
    student_layers = _student_layers(own, store["config"], key)
    chosen: list[CapturedSignal] = []
    maps: dict[str, LayerMap] = {"feature": {}, "attention": {}}
    depths = (student_layers, teacher_layers)
    if not objective.feature.weight.is_off:
        maps["feature"] = _map(signals, "hidden", objective.feature, align, depths, key)
        chosen += [
            _one(signals, "hidden", layer, objective.feature.form, key)
            for layer in teacher_layers_of(maps["feature"])
        ]
    if not objective.attention.weight.is_off:
        maps["attention"] = _map(
            signals, _attention_kind(objective.attention), objective.attention, align, depths, key
        )
        for layer in teacher_layers_of(maps["attention"]):
            chosen += _attention_signals(signals, layer, objective, chosen, key)
    if not objective.output.weight.is_off:
        chosen.append(_one(signals, "logits", None, objective.output.form, key))
    assets: dict[str, Any] = {}
    if model.init == "teacher-layers":
        assets[BLOCKS] = _blocks(records, key, student_layers, teacher_layers, model.blocks)
    selected = {
        "store": store["store"],
        "signals": {signal.name: signal.digest for signal in chosen},
        "assets": assets,
        "maps": {term: {str(s): t for s, t in pairs.items()} for term, pairs in maps.items()},
    }
    origin = LAYER_MAPS.origin(align.layers) if isinstance(align.layers, str) else None
    if origin is not None:
        selected["origins"] = {f"layer_map.{align.layers}": origin.model_dump()}
    return selected


def teacher_layers_of(pairs: LayerMap) -> list[int]:
    """Return the distinct teacher layers of a layer map, in order."""
    return sorted({teacher for _, teacher in layer_pairs(pairs)})


def _map(
    signals: Sequence[CapturedSignal],
    kind: str,
    term: FeatureTerm | AttentionTerm,
    align: Alignment,
    depths: tuple[int, int],
    key: str,
) -> LayerMap:
    """Return the layer map of one term; attention has no layer 0."""
    is_attention = isinstance(term, AttentionTerm)
    captured = [
        s.layer for s in signals if s.kind == kind and s.layer is not None and _serves(s, term)
    ]
    has_embeddings = align.embeddings and not is_attention
    try:
        pairs = layer_map(align.layers, Layers(*depths, has_embeddings, captured))
    except DecantError as error:
        raise type(error)(f"{key}.align.layers: {error}") from error
    if not is_attention:
        return pairs
    pairs = {student: teacher for student, teacher in pairs.items() if student and teacher}
    if not pairs:
        raise ConfigError(
            f"{key}.align.layers: only pairs with layer 0, which has no attention; name a "
            f"pair of blocks, or set {key}.loss.attention.weight to 0"
        )
    return pairs


def _serves(signal: CapturedSignal, term: FeatureTerm | AttentionTerm) -> bool:
    """Tell whether a term can use a signal of its kind; the form of values has no key."""
    if isinstance(term, AttentionTerm) and term.compared_relations and not _has_vectors(signal):
        return False
    return signal.kind == "value" or term.form in (None, signal.form_name)


def _has_vectors(signal: CapturedSignal) -> bool:
    """Tell whether a signal has vectors, which relations need; attention maps do not."""
    return signal.form.content is not Content.ATTENTION_MAP


def _attention_kind(term: AttentionTerm) -> str:
    """Return the kind of signal that decides which layers can be compared."""
    return "value" if term.compared_relations == ("vv",) else "attention"


def _attention_signals(
    signals: Sequence[CapturedSignal],
    layer: int,
    objective: Objective,
    chosen: Sequence[CapturedSignal],
    key: str,
) -> list[CapturedSignal]:
    """Return the signals that the attention term needs of one teacher layer."""
    term = objective.attention
    selected: list[CapturedSignal] = []
    if _attention_kind(term) == "attention":
        usable = signals
        if term.compared_relations:
            usable = [s for s in signals if s.kind != "attention" or _has_vectors(s)]
            if not _captured(usable, "attention", layer) and _captured(signals, "attention", layer):
                raise IncompatibleError(
                    f"{key}.loss.attention: relations are made of query and key, attention/{layer} "
                    "is captured as maps alone; capture it in form "
                    f"{names_of(Content.QUERY_KEY)} too, or use loss head_mean"
                )
        selected.append(_one(usable, "attention", layer, term.form, key))
    if "vv" in term.compared_relations:
        best = _best(signals, "value", layer)
        others = [s for s in signals if (s.kind, s.layer) != ("value", layer)]
        selected.append(_one([*others, *best], "value", layer, None, key))
    for below in [signal.needs["hidden"] for signal in selected if signal.needs]:
        # A layer is decoded from one form: the feature term's, if that uses the layer too.
        if any((signal.kind, signal.layer) == ("hidden", below) for signal in chosen):
            continue
        form = objective.feature.form
        is_named = any(s.form_name == form for s in _captured(signals, "hidden", below))
        usable = (
            _captured(signals, "hidden", below) if is_named else _best(signals, "hidden", below)
        )
        selected.append(_one(usable, "hidden", below, form if is_named else None, key))
    return selected


def _captured(
    signals: Sequence[CapturedSignal], kind: str, layer: int | None
) -> list[CapturedSignal]:
    return [signal for signal in signals if (signal.kind, signal.layer) == (kind, layer)]


def _best(signals: Sequence[CapturedSignal], kind: str, layer: int) -> list[CapturedSignal]:
    """Return the most faithful signal of a layer, or nothing if there is none."""
    return sorted(_captured(signals, kind, layer), key=lambda signal: signal.form.rank)[:1]


def _student_layers(own: dict[str, Any], teacher: dict[str, Any], key: str) -> int:
    is_other = own.get("model_type", teacher.get("model_type")) != teacher.get("model_type")
    depth = depth_of(own) or (None if is_other else depth_of(teacher))
    if depth is None:
        raise ConfigError(f"{key}.model: no number of layers; give architecture.num_hidden_layers")
    return depth


def _own_config(model: StudentModel, key: str) -> dict[str, Any]:
    """Return the architecture's keys, or the checkpoint's configuration."""
    if model.architecture is not None:
        return model.architecture
    checkpoint = str(model.checkpoint)
    path = Path(checkpoint) / "config.json"
    if path.exists():
        return read_json(path)
    from transformers import PreTrainedConfig

    try:
        return PreTrainedConfig.get_config_dict(checkpoint, revision=model.revision)[0]
    except (OSError, ValueError) as error:
        reason = in_short(error)
        raise ConfigError(
            f"{key}.model.checkpoint {checkpoint}: no configuration to be had ({reason}); expected "
            "a directory with config.json, or a hub id in the local cache"
        ) from error


def _one(
    signals: Sequence[CapturedSignal], kind: str, layer: int | None, form: str | None, key: str
) -> CapturedSignal:
    wanted = kind if layer is None else f"{kind}/{layer}"
    captured = _captured(signals, kind, layer)
    fitting = [signal for signal in captured if form in (None, signal.form_name)]
    if not fitting:
        has = sorted(f"{s.layer}" for s in signals if s.kind == kind and s.layer is not None)
        in_form = f" in form {form}" if form and captured else ""
        raise IncompatibleError(
            f"{key}: needs {wanted}{in_form}, which is not in the store "
            f"(it has {kind} {', '.join(has) or 'none' if layer is not None else 'none'}); add "
            f"it under the "
            "teacher's capture section and run `dvc repro`"
        )
    if len(fitting) > 1:
        forms = ", ".join(signal.name.rsplit("/", 1)[1] for signal in fitting)
        raise ConfigError(
            f"{key}: {wanted} is captured as {forms}; name one with the term's `form`"
        )
    return fitting[0]


def _blocks(
    records: list[dict[str, Any]],
    key: str,
    student_layers: int,
    teacher_layers: int,
    blocks: Blocks | None,
) -> dict[str, Any]:
    try:
        wanted = block_choice(
            "uniform" if blocks is None else blocks,
            student_layers=student_layers,
            teacher_layers=teacher_layers,
        )
    except IncompatibleError as error:
        raise IncompatibleError(f"{key}.model.blocks: {error}") from error
    asset = next((r for r in records if r.get("signal") == BLOCKS), None)
    have = asset["layers"] if asset else []
    if asset is None or not set(wanted) <= set(have):
        raise IncompatibleError(
            f"{key}.model: starts from teacher blocks {list(wanted)}, the store's assets have "
            f"{have or 'none'}; "
            "add them to the teacher's capture.blocks and run `dvc repro`"
        )
    return {"digest": asset["digest"], "layers": list(wanted)}
