"""Which stored logits a student is compared with: the most faithful form its teacher was kept in.

Decided from capture's JSON, for every student of a teacher alike, so that agreements compare.
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
