"""Which stored logits a student is compared with: the most faithful form its teacher was kept in.

Decided from capture's JSON, for every student of a teacher alike, so that agreements compare.
"""

from pathlib import Path
from typing import Any

from pipeline.provenance import read_json

FAITHFUL_FIRST = ("dense", "head", "topk")
"""Forms of logits: all classes, the whole vocabulary, its likeliest tokens."""


def reference_logits(manifests: Path) -> dict[str, str] | None:
    """Return store, signal and digest of a teacher's logits; None if none were captured.

    Args:
        manifests: Directory with the JSON files that capture wrote for the teacher.

    Raises:
        IntegrityError: If a manifest is not readable.
    """
    records = [read_json(path) for path in sorted(manifests.glob("logits.*.json"))]
    if not records:
        return None
    best = min(records, key=_rank)
    return {key: best[key] for key in ("store", "signal", "digest")}


def _rank(record: dict[str, Any]) -> tuple[int, str]:
    form = record["form"]
    known = FAITHFUL_FIRST.index(form) if form in FAITHFUL_FIRST else len(FAITHFUL_FIRST)
    return known, record["signal"]
