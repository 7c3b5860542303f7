"""Which signals of a store a student needs; decided from JSON, before anything is trained.

The answer holds digests of just these signals, so a layer captured for another student changes
nothing here.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, DecantError, IncompatibleError
from pipeline.provenance import read_json
from pipeline.student.maps import block_choice, layer_map
from pipeline.student.objective import Alignment, Objective

DEPTH_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def depth_of(config: dict[str, Any]) -> int | None:
    """Return the number of blocks a Hugging Face configuration asks for, under any of its names."""
    return next((int(config[key]) for key in DEPTH_KEYS if key in config), None)


def select_signals(
    manifests: Path,
    *,
    name: str,
    objective: Objective,
    align: Alignment,
    architecture: dict[str, Any] | None,
    checkpoint: str | None,
    init: str,
    blocks: Sequence[int] | None,
) -> dict[str, Any]:
    """Return store, signals with their digests, and layer maps for one student.

    Args:
        manifests: Directory with the JSON files that capture wrote for the student's teacher.
        name: The student's name, for errors.
        objective: The student's loss terms.
        align: The student's layer map.
        architecture: Configuration keys that differ from the teacher's.
        checkpoint: A directory or hub id the student starts from.
        init: `random` or `teacher-layers`.
        blocks: Teacher blocks a student of `teacher-layers` starts from; None for a uniform choice.

    Raises:
        IncompatibleError: If the store lacks a signal the student needs.
        ConfigError: If several forms fit and none is named.
    """
    records = [read_json(path) for path in sorted(manifests.glob("*.json"))]
    store = next((r for r in records if "config" in r), None)
    if store is None:
        raise ConfigError(f"{manifests}: no store.json; run the capture stage first")
    signals = [r for r in records if "kind" in r]
    teacher_layers = int(store["layers"])
    student_layers = _student_layers(name, architecture, checkpoint, store["config"])
    key = f"students.{name}"
    chosen: dict[str, str] = {}
    maps: dict[str, dict[int, int]] = {"feature": {}, "attention": {}}
    for term, kind, embeddings in (
        ("feature", "hidden", align.embeddings),
        ("attention", "attention", False),
    ):
        options = getattr(objective, term)
        if options.weight.is_off:
            continue
        try:
            maps[term] = layer_map(
                align.layers,
                student_layers=student_layers,
                teacher_layers=teacher_layers,
                include_embeddings=embeddings,
            )
        except DecantError as error:
            raise type(error)(f"{key}.align.layers: {error}") from error
        if term == "attention":
            maps[term] = {s: t for s, t in maps[term].items() if s and t}
            if not maps[term]:
                raise ConfigError(
                    f"{key}.align.layers: only pairs with layer 0, which has no attention; name a "
                    f"pair of blocks, or set {key}.loss.attention.weight to 0"
                )
        for layer in sorted(set(maps[term].values())):
            found = _one(signals, kind, layer, options.form, key)
            chosen[found["signal"]] = found["digest"]
    if not objective.output.weight.is_off:
        found = _one(signals, "logits", None, objective.output.form, key)
        chosen[found["signal"]] = found["digest"]
    assets: dict[str, Any] = {}
    if init == "teacher-layers":
        assets["blocks"] = _blocks(records, key, student_layers, teacher_layers, blocks)
    return {
        "store": store["store"],
        "signals": chosen,
        "assets": assets,
        "maps": {term: {str(s): t for s, t in pairs.items()} for term, pairs in maps.items()},
    }


def _student_layers(
    name: str, architecture: dict[str, Any] | None, checkpoint: str | None, teacher: dict[str, Any]
) -> int:
    own = _checkpoint_config(checkpoint) if architecture is None else architecture
    is_other = own.get("model_type", teacher.get("model_type")) != teacher.get("model_type")
    depth = depth_of(own) or (None if is_other else depth_of(teacher))
    if depth is None:
        raise ConfigError(
            f"students.{name}.model: no number of layers; give architecture.num_hidden_layers"
        )
    return depth


def _checkpoint_config(checkpoint: str | None) -> dict[str, Any]:
    if checkpoint is None:
        return {}
    path = Path(checkpoint) / "config.json"
    if path.exists():
        return read_json(path)
    from transformers import PreTrainedConfig

    try:
        return PreTrainedConfig.get_config_dict(checkpoint)[0]
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"model.checkpoint {checkpoint}: no configuration to be had ({reason}); expected a "
            "directory with config.json, or a hub id in the local cache"
        ) from error


def _one(
    signals: list[dict[str, Any]], kind: str, layer: int | None, form: str | None, key: str
) -> dict[str, Any]:
    place = kind if layer is None else f"{kind}/{layer}"
    there = [r for r in signals if r["kind"] == kind and r["layer"] == layer]
    fitting = [r for r in there if form in (None, r["form"])]
    if not fitting:
        has = sorted(
            f"{r['layer']}" for r in signals if r["kind"] == kind and r["layer"] is not None
        )
        what = f" in form {form}" if form and there else ""
        raise IncompatibleError(
            f"{key}: needs {place}{what}, which is not in the store "
            f"(it has {kind} {', '.join(has) or 'none' if layer is not None else 'none'}); add "
            f"it under the "
            "teacher's capture section and run `dvc repro`"
        )
    if len(fitting) > 1:
        forms = ", ".join(r["signal"].rsplit("/", 1)[1] for r in fitting)
        raise ConfigError(f"{key}: {place} is captured as {forms}; name one with the term's `form`")
    return fitting[0]


def _blocks(
    records: list[dict[str, Any]],
    key: str,
    student_layers: int,
    teacher_layers: int,
    blocks: Sequence[int] | None,
) -> dict[str, Any]:
    try:
        wanted = block_choice(
            "uniform" if blocks is None else blocks,
            student_layers=student_layers,
            teacher_layers=teacher_layers,
        )
    except IncompatibleError as error:
        raise IncompatibleError(f"{key}.model.blocks: {error}") from error
    found = next((r for r in records if r.get("signal") == "blocks"), None)
    have = found["layers"] if found else []
    if found is None or not set(wanted) <= set(have):
        raise IncompatibleError(
            f"{key}.model: starts from teacher blocks {list(wanted)}, the store's assets have "
            f"{have or 'none'}; "
            "add them to the teacher's capture.blocks and run `dvc repro`"
        )
    return {"digest": found["digest"], "layers": list(wanted)}
