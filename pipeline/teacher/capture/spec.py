"""The identity of a store: everything that changes stored values, and nothing else.

The captured signals are not part of it: one store can hold any forms and layers.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pipeline.corpus.tokens.tokens import TokenMeta
from pipeline.provenance import fingerprint
from pipeline.store.layout import FORMAT
from pipeline.teacher.source.reference import TeacherReference


@dataclass(frozen=True)
class SegmentOptions:
    """How the corpus is divided: selection and order of training examples, segments and batches.

    `batch_tokens` includes padding. It is part of the identity because other batch shapes round
    differently. With `auto` the identity holds that word and the plan holds the number, see
    `pipeline.teacher.capture.batch_size`.
    """

    fraction: float = 1.0
    limit: int | None = None
    segment_tokens: int = 16384
    chunk_tokens: int = 256
    batch_tokens: int | Literal["auto"] = 8192
    dtype: str = "float32"
    seed: int = 0


def store_spec(
    meta: TokenMeta, reference: TeacherReference, options: SegmentOptions
) -> dict[str, Any]:
    """Return the JSON that a store's fingerprint is computed from.

    It has `parts` only if text was added to the corpus, because parts then determine the segments.
    """
    parts = {"parts": list(meta.parts)} if len(meta.parts) > 1 else {}
    return {
        "format": FORMAT,
        "tokens": meta.digest,
        "tokenizer": meta.tokenizer_digest,
        "teacher": reference.identity(),
        "segments": asdict(options),
        **parts,
    }


def planned_batch_tokens(plan: Mapping[str, Any]) -> int:
    """Return the maximum padded tokens of a store's batches, from its recorded plan."""
    return plan.get("batch_tokens") or plan["spec"]["segments"]["batch_tokens"]


def store_fingerprint(spec: dict[str, Any]) -> str:
    """Return the name of the store's directory."""
    return fingerprint(spec)[:16]
