"""Chooses the stored logits that students are compared with: those of the most faithful form.

The choice follows from the manifests alone and is the same for all students of a teacher, so their
agreements are comparable.
"""

from pathlib import Path

from pipeline.provenance import read_json
from pipeline.store.forms.form import Content
from pipeline.store.signals import CapturedSignal


def reference_logits(manifests: Path) -> dict[str, str] | None:
    """Return store, signal and digest of a teacher's logits; None if none are to be compared with.

    Samples are not: their cross-entropy has the teacher's entropy in it. Nor is the output of a
    regression, which is no distribution.

    Args:
        manifests: Directory with the JSON files that capture wrote for the teacher.

    Raises:
        IntegrityError: If a manifest is not readable.
    """
    store = manifests / "store.json"
    if store.exists() and read_json(store).get("task") == "regression":
        return None
    found = [read_json(path) for path in sorted(manifests.glob("logits.*.json"))]
    ranked = []
    for record in found:
        form = CapturedSignal.from_json(record).form
        if form.content is not Content.SAMPLES:
            ranked.append((form.rank, record["signal"], record))
    if not ranked:
        return None
    *_, best = min(ranked)
    return {key: best[key] for key in ("store", "signal", "digest")}
