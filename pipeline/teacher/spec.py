"""A store's identity: everything that changes stored values, and nothing else.

Which signals are captured does not enter: forms and layers live side by side in one store.
"""

from dataclasses import asdict, dataclass
from typing import Any

from pipeline.corpus.tokens import TokenMeta
from pipeline.provenance import fingerprint
from pipeline.store.layout import FORMAT
from pipeline.teacher.reference import TeacherReference


@dataclass(frozen=True)
class SegmentOptions:
    """How the corpus is cut: which training examples, in what order, in what pieces and batches.

    `batch_tokens` counts padding. It is here because batches of another shape round differently.
    """

    fraction: float = 1.0
    limit: int | None = None
    segment_tokens: int = 16384
    chunk_tokens: int = 256
    batch_tokens: int = 8192
    dtype: str = "float32"
    seed: int = 0


def store_spec(
    meta: TokenMeta, reference: TeacherReference, options: SegmentOptions
) -> dict[str, Any]:
    """Return the JSON that a store's fingerprint is taken of."""
    return {
        "format": FORMAT,
        "tokens": meta.digest,
        "tokenizer": meta.tokenizer_digest,
        "teacher": reference.identity(),
        "segments": asdict(options),
    }


def store_fingerprint(spec: dict[str, Any]) -> str:
    """Return the name of the store's directory."""
    return fingerprint(spec)[:16]
