"""Which stored logits a student is compared with: the most faithful form its teacher was kept in.

Decided from capture's JSON, for every student of a teacher alike, so that agreements compare.
"""

from pathlib import Path
from typing import Any

from pipeline.provenance import read_json

FAITHFUL_FIRST = ("dense", "head", "topk")
"""Forms of logits: all classes, the whole vocabulary, its likeliest tokens."""
NEVER = "sampled"
"""Draws say what to learn on average, but not what the teacher thinks of one position."""


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
    records = [record for record in found if record["form"] != NEVER]
    if not records:
        return None
    best = min(records, key=_rank)
    return {key: best[key] for key in ("store", "signal", "digest")}


def _rank(record: dict[str, Any]) -> tuple[int, str]:
    form = record["form"]
    known = FAITHFUL_FIRST.index(form) if form in FAITHFUL_FIRST else len(FAITHFUL_FIRST)
    return known, record["signal"]
