"""Tokenizers of every kind of model, trained on one small text, as transformers saves them."""

import json
from pathlib import Path
from typing import Any

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast as FastTokenizer

KINDS = ("bytes", "fallback", "wordpiece", "unigram", "words")
WORDS = (
    *("the", "of", "and", "to", "in", "that", "is", "was", "for", "it", "with", "as", "his", "on"),
    *("they", "which", "one", "you", "were", "all", "her", "she", "there", "would", "their", "we"),
    *("if", "out", "so", "said", "what", "up", "its", "about", "into", "than", "them", "can"),
    *("may", "then", "do", "first", "any", "my", "now", "such", "like", "our", "over", "man"),
    *("before", "must", "through", "back", "years", "where", "much", "your", "way", "well"),
    *("people", "how", "too", "little", "state", "good", "very", "make", "world", "still", "own"),
    *("both", "life", "being", "under", "never", "day", "same", "another", "know", "while"),
    *("because", "against", "came", "right", "used", "take", "three", "nothing", "something"),
)
TEXTS = [
    " ".join(WORDS[(7 * i + 3 * j * j) % len(WORDS)] for j in range(3 + i % 9))
    + (", and more." if i % 3 else "?")
    for i in range(160)
]


def backend(kind: str) -> tuple[Tokenizer, dict[str, str]]:
    """A trained tokenizer and the names of its special tokens."""
    if kind == "bytes":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer: Any = trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=["<|end|>", "<|pad|>"],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        special = {"bos_token": "<|end|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"}
    elif kind == "fallback":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        tokenizer.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
        trainer = trainers.BpeTrainer(
            vocab_size=700,
            special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))],
            show_progress=False,
        )
        special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    elif kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        trainer = trainers.WordPieceTrainer(
            vocab_size=400, special_tokens=marks, show_progress=False
        )
        special = {f"{mark[1:-1].lower()}_token": mark for mark in marks}
    elif kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=300,
            special_tokens=["<pad>", "<unk>", "</s>"],
            unk_token="<unk>",
            show_progress=False,
        )
        special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"}
    else:
        tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(
            vocab_size=400, special_tokens=["<pad>", "<unk>"], show_progress=False
        )
        special = {"pad_token": "<pad>", "unk_token": "<unk>"}
    tokenizer.train_from_iterator(TEXTS, trainer)
    if kind == "fallback":
        # The trainer makes all it is given special; bytes are plain pieces, as in Llama's.
        text = json.loads(tokenizer.to_str())
        text["added_tokens"] = [
            t for t in text["added_tokens"] if not t["content"].startswith("<0x")
        ]
        tokenizer = Tokenizer.from_str(json.dumps(text))
    if kind == "wordpiece":
        sep, cls = (tokenizer.token_to_id(mark) for mark in ("[SEP]", "[CLS]"))
        tokenizer.post_processor = processors.BertProcessing(("[SEP]", sep), ("[CLS]", cls))
    elif "eos_token" in special:
        mark = special["eos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {mark}",
            pair=f"$A {mark} $B {mark}",
            special_tokens=[(mark, tokenizer.token_to_id(mark))],
        )
    return tokenizer, special


def write_tokenizer(kind: str, path: Path, *, added: tuple[str, ...] = ()) -> FastTokenizer:
    """Save a tokenizer of a kind, with further special tokens behind its vocabulary."""
    tokenizer, special = backend(kind)
    fast = FastTokenizer(tokenizer_object=tokenizer, **special)
    if added:
        fast.add_special_tokens({"extra_special_tokens": list(added)})
    fast.save_pretrained(path)
    return fast
