"""Compares a model's own tokenizer with the one that wrote the token ids.

Equal vocabulary sizes do not show that they agree. With one merge of another tokenizer, ids stand
for other pieces than those the model has learned, and nothing later would notice.
"""

import json
import logging
from itertools import zip_longest
from pathlib import Path
from typing import Any

from pipeline.corpus.tokens.tokenizer import load_tokenizer
from pipeline.errors import ConfigError, IncompatibleError
from pipeline.provenance import fingerprint

logger = logging.getLogger(__name__)
FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "*.model")
"""At least one of them is in a directory that has a tokenizer."""
PARTS = ("model", "normalizer", "pre_tokenizer")
"""What decides which pieces a text becomes; marks put around it are the corpus's business."""
SHOWN = 16
MAX_SHOWN = 60


def check_same_tokenizer(
    model: str,
    revision: str | None,
    tokenizer: Path,
    *,
    key: str,
    remedy: str,
    trust_remote_code: bool = False,
) -> None:
    """Refuse a model whose own tokenizer writes a text in other ids.

    Special tokens of its own are no difference, nor is having no tokenizer at all.

    Args:
        model: A directory or hub id.
        revision: Revision of a hub id.
        tokenizer: Directory of the tokenizer that wrote the ids.
        key: What names the model, for the message.
        remedy: What to do, for the message.
        trust_remote_code: Run code from the model's repository.

    Raises:
        IncompatibleError: With the first difference and the digests of both.
    """
    if Path(model).is_dir() and not any(any(Path(model).glob(name)) for name in FILES):
        logger.info("%s: has no tokenizer; its ids are taken for those of the corpus", model)
        return
    try:
        own = load_tokenizer(model, revision=revision, trust_remote_code=trust_remote_code)
    except ConfigError as error:
        if Path(model).is_dir():
            raise
        logger.warning("%s: its ids are taken for those of the corpus: %s", model, error)
        return
    found = json.loads(own.backend_tokenizer.to_str())
    expected = json.loads(load_tokenizer(tokenizer).backend_tokenizer.to_str())
    difference = _difference(found, expected)
    if difference is not None:
        raise IncompatibleError(
            f"{key} {model}: {difference} (tokenizer {_digest(found)}, expected "
            f"{_digest(expected)}); {remedy}"
        )


def _digest(backend: dict[str, Any]) -> str:
    return fingerprint({part: backend[part] for part in PARTS})[:SHOWN]


def _difference(ours: dict[str, Any], theirs: dict[str, Any]) -> str | None:
    """Say where two tokenizers first differ in what they make of a text; None if nowhere."""
    for part in PARTS[1:]:
        if ours[part] != theirs[part]:
            return (
                f"its tokenizer's {part} is {_short(ours[part])}, the corpus's "
                f"{_short(theirs[part])}"
            )
    found, expected = ours["model"], theirs["model"]
    pairs = zip_longest(found.get("merges") or (), expected.get("merges") or ())
    for rank, (merge, wanted) in enumerate(pairs):
        if merge != wanted:
            return (
                f"merge {rank} of its tokenizer is {_short(merge)}, of the corpus's "
                f"{_short(wanted)}"
            )
    for key in sorted(found.keys() | expected.keys()):
        if found.get(key) != expected.get(key):
            return f"its tokenizer has another {key}, {_first_other(found, expected, key)}"
    return _other_added(ours, theirs)


def _other_added(ours: dict[str, Any], theirs: dict[str, Any]) -> str | None:
    """Find an added token with two ids, or an id with two added tokens."""
    found = {token["id"]: token["content"] for token in ours["added_tokens"]}
    expected = {token["id"]: token["content"] for token in theirs["added_tokens"]}
    numbers = {content: number for number, content in expected.items()}
    for number, content in found.items():
        if expected.get(number, content) != content or numbers.get(content, number) != number:
            wanted = expected.get(number, "nothing")
            return f"its id {number} is {_short(content)}, the corpus's {_short(wanted)}"
    return None


def _first_other(found: dict[str, Any], expected: dict[str, Any], key: str) -> str:
    ours, theirs = found.get(key), expected.get(key)
    if isinstance(ours, dict) and isinstance(theirs, dict):
        piece = min(p for p in ours.keys() | theirs.keys() if ours.get(p) != theirs.get(p))
        return f"where {_short(piece)} is {ours.get(piece)}, the corpus's {theirs.get(piece)}"
    return f"{_short(ours)}, the corpus's {_short(theirs)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"
