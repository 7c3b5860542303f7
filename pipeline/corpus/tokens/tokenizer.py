"""The tokenizer of a teacher: its own, or one trained on the training split.

Both are plain Hugging Face tokenizers; a saved one loads with `AutoTokenizer` anywhere.
"""

import json
import logging
import re
from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from pipeline.errors import ConfigError, IncompatibleError, in_short
from pipeline.provenance import fingerprint

# One mark for both ends, as GPT-2 has it, and another for padding: with one mark for all three,
# the usual collators mask every end of text with the padding, and a model never learns to stop.
END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
COMMIT = r"[0-9a-f]{40}"


def train_tokenizer(texts: Iterable[str], *, vocab: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE, which can encode every text; equal texts give an equal tokenizer.

    It puts one end-of-text token before a text and one after it.

    Args:
        texts: The training split only: held-out text would leak into the merges.
        vocab: Size including the 256 bytes and 2 special tokens; few texts may give fewer.

    Raises:
        ConfigError: If `vocab` has no room for the bytes and special tokens.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + 2
    if vocab < smallest:
        raise ConfigError(
            f"tokenizer.vocab: found {vocab}, expected at least {smallest} "
            "(256 bytes and 2 special tokens); raise it"
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A {END_OF_TEXT}",
        pair=f"{END_OF_TEXT} $A {END_OF_TEXT} $B {END_OF_TEXT}",
        special_tokens=[(END_OF_TEXT, backend.token_to_id(END_OF_TEXT))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=PAD
    )


def load_tokenizer(
    source: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerFast:
    """Load a tokenizer from a local directory or, by its id, from the hub.

    A missing pad token becomes the end-of-text token: padding never counts, so any id will do.
    With `HF_HUB_OFFLINE` nothing is fetched.

    Raises:
        ConfigError: If there is no tokenizer, it needs code of its own that was not asked for or
            that no commit pins, or it cannot work in batches with special tokens told apart.
    """
    is_pinned = Path(source).is_dir() or re.fullmatch(COMMIT, revision or "")
    if trust_remote_code and not is_pinned:
        raise ConfigError(
            f"{source}: revision is {revision!r}, expected a commit of 40 hexadecimal digits "
            "beside trust_remote_code: a branch or tag may be moved to other code"
        )
    # Imports torch, which nothing else here needs.
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(source), revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = in_short(error)
        if "custom code" in reason:
            raise ConfigError(
                f"{source}: the tokenizer brings code of its own, expected one that needs none; if "
                "you trust it, pin its revision and set trust_remote_code: true"
            ) from error
        raise ConfigError(
            f"{source}: no tokenizer can be loaded ({reason}); expected a local directory or hub "
            "id with tokenizer files, correct the teacher's model"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ConfigError(
            f"{source}: the tokenizer {type(tokenizer).__name__} is written in Python, expected "
            "one with a tokenizer.json; convert it with transformers and save it again"
        )
    return _with_padding(tokenizer, source)


def local_tokenizer(
    source: str | Path, *, revision: str | None = None
) -> PreTrainedTokenizerFast | None:
    """Read the `tokenizer.json` of a local directory or of the hub's cache; needs no torch.

    Only for trials: a model's own tokenizer class, which `load_tokenizer` uses, may change ids.

    Returns:
        None if the file is not on this machine; nothing is fetched, and no code of others runs.

    Raises:
        ConfigError: If it cannot be loaded, or has no token to pad with.
    """
    name = "tokenizer.json"
    is_here = (
        (Path(source) / name).is_file()
        if Path(source).is_dir()
        else isinstance(try_to_load_from_cache(str(source), name, revision=revision), str)
    )
    if not is_here:
        return None
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(
            str(source), revision=revision or "main", local_files_only=True
        )
    # The library's own reader raises a plain Exception for a broken file.
    except Exception as error:
        raise ConfigError(
            f"{source}: no tokenizer can be loaded ({in_short(error)}); expected a local directory "
            "or hub id with tokenizer files, correct the teacher's model"
        ) from error
    return _with_padding(tokenizer, source)


def _with_padding(
    tokenizer: PreTrainedTokenizerFast, source: str | Path
) -> PreTrainedTokenizerFast:
    if tokenizer.pad_token_id is None:
        substitute = tokenizer.eos_token or tokenizer.unk_token
        if substitute is None:
            raise ConfigError(
                f"{source}: the tokenizer has neither a pad nor an eos token, expected one; "
                "add a pad token to its tokenizer_config.json"
            )
        tokenizer.pad_token = substitute
    return tokenizer


def tokenizer_digest(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the SHA-256 of everything that decides which ids a text becomes.

    Padding and truncation of the last call, and the directory, are not part of it.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    special = {
        name: getattr(tokenizer, f"{name}_token_id")
        for name in ("bos", "eos", "pad", "unk", "cls", "sep", "mask")
    }
    return fingerprint(
        {"backend": {**backend, "padding": None, "truncation": None}, "special": special}
    )


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
