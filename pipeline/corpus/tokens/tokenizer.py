"""The tokenizer of a teacher: its own, loaded as it is, or one trained on the training split.

Both are plain Hugging Face tokenizers; a saved one loads with `AutoTokenizer` anywhere.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from pipeline.errors import ConfigError, in_short
from pipeline.provenance import fingerprint

# One mark for both ends, as GPT-2 has it, and another for padding: with one mark for all three,
# the usual collators mask every end of text with the padding, and a model never learns to stop.
END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
COMMIT = r"[0-9a-f]{40}"


def train_tokenizer(texts: Iterable[str], *, vocab: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE, which can write every text; equal texts give an equal tokenizer.

    It sets one end-of-text token before a text and one after it.

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
    Nothing is fetched where the environment says so (`HF_HUB_OFFLINE`).

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

    Only for trials: a class of its own, which `load_tokenizer` would take, may change ids.

    Returns:
        None where there is no such file on this machine; nothing is fetched, no foreign code runs.

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

    The padding and truncation of the last call are no part of it, nor is where it was loaded from.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    special = {
        name: getattr(tokenizer, f"{name}_token_id")
        for name in ("bos", "eos", "pad", "unk", "cls", "sep", "mask")
    }
    return fingerprint(
        {"backend": {**backend, "padding": None, "truncation": None}, "special": special}
    )
