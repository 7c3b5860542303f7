"""Cuts a tokenizer down to the ids that some texts need; it still splits these texts as before.

`tokenizer.json` is edited, for all four models: BPE, WordPiece, Unigram and WordLevel. Every other
text can still be tokenized, into more pieces. Ids are renumbered without gaps, in their old order.
"""

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import AutoTokenizer

from pipeline.errors import IncompatibleError, IntegrityError

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
CHAT_TEMPLATES = ("chat_template*", "additional_chat_templates/*")
BYTE = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class SmallerTokenizer:
    """A cut tokenizer.

    Attributes:
        ids: The kept ids of the original tokenizer; the index of an id is its new id.
        files: Text of each file, by name.
    """

    ids: tuple[int, ...]
    files: Mapping[str, str]

    def save(self, directory: Path) -> None:
        """Write the files to a directory, from which `AutoTokenizer` loads them."""
        for name, text in self.files.items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")


def cut_tokenizer(source: Path, used: Collection[int]) -> SmallerTokenizer:
    """Return a tokenizer with used ids, added tokens, and pieces that any text can be split into.

    A text with used ids alone is split into the same pieces as before. (One exception: a word that
    WordPiece did not know may become known if a removed piece prevented its match.)

    Args:
        source: Directory with `tokenizer.json`.
        used: Ids to keep.

    Raises:
        IntegrityError: If the file is missing or broken.
        IncompatibleError: If the tokenizer's model is none of the four, or does not load with the
            new ids.
    """
    path = source / TOKENIZER_FILE
    try:
        backend = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise IntegrityError(
            f"{path}: not readable as JSON ({error}); run the tokenize and capture stages again"
        ) from error
    model = backend["model"]
    ids = _ids_by_piece(model)
    pieces = {number: piece for piece, number in ids.items()}
    added = {token["id"]: token["content"] for token in backend["added_tokens"]}
    wanted = {pieces[number] for number in used if number in pieces and number not in added}
    needed = wanted | _unknown(model) | _smallest(model, ids)
    if _kind(model) == "BPE":
        needed |= _intermediate(model, wanted)
    kept = sorted({*added, *(ids[piece] for piece in needed if piece in ids)})
    new = {number: index for index, number in enumerate(kept)}
    cut = {
        **backend,
        "model": _cut_model(model, new),
        "added_tokens": [token | {"id": new[token["id"]]} for token in backend["added_tokens"]],
        "post_processor": _renumbered(backend.get("post_processor"), new),
        "padding": None,
        "truncation": None,
    }
    files = {TOKENIZER_FILE: json.dumps(cut, ensure_ascii=False, indent=2)}
    if (source / CONFIG_FILE).exists():
        files[CONFIG_FILE] = _cut_config(source / CONFIG_FILE, new)
    for pattern in CHAT_TEMPLATES:
        for file in sorted(source.glob(pattern)):
            if file.is_file():
                files[str(file.relative_to(source))] = file.read_text(encoding="utf-8")
    smaller = SmallerTokenizer(tuple(kept), files)
    _check(smaller, pieces | added, path)
    return smaller


def _kind(model: Mapping[str, Any]) -> str:
    """Return the name of the model; old files have no type."""
    kind = model.get("type")
    if kind is None:
        kind = "BPE" if "merges" in model else "WordPiece"
        kind = "Unigram" if isinstance(model["vocab"], list) else kind
    if kind not in ("BPE", "WordPiece", "Unigram", "WordLevel"):
        raise IncompatibleError(
            f"vocabulary: corpus: the tokenizer's model is {kind}, expected BPE, WordPiece, "
            "Unigram or WordLevel; use vocabulary: teacher"
        )
    return kind


def _ids_by_piece(model: Mapping[str, Any]) -> dict[str, int]:
    if _kind(model) == "Unigram":
        return {piece: number for number, (piece, _) in enumerate(model["vocab"])}
    return dict(model["vocab"])


def _unknown(model: Mapping[str, Any]) -> set[str]:
    if _kind(model) == "Unigram":
        number = model.get("unk_id")
        return set() if number is None else {model["vocab"][number][0]}
    token = model.get("unk_token")
    return set() if token is None else {token}


def _smallest(model: Mapping[str, Any], pieces: Iterable[str]) -> set[str]:
    """Return pieces that any text can be split into: bytes if it falls back on them, or characters.

    Unigram keeps its characters in any case, because it uses a byte only for a character without a
    piece. It also keeps its least likely piece, whose score decides that of unknown characters.
    """
    kind = _kind(model)
    if kind == "WordLevel":
        return set()
    smallest = {piece for piece in pieces if BYTE.fullmatch(piece)}
    if kind == "BPE" and model.get("byte_fallback") and smallest:
        return smallest
    prefix = model.get("continuing_subword_prefix") or ""
    suffix = model.get("end_of_word_suffix") or ""
    smallest |= {
        piece for piece in pieces if len(piece.removeprefix(prefix).removesuffix(suffix)) <= 1
    }
    if kind == "Unigram":
        smallest.add(min(model["vocab"], key=lambda entry: entry[1])[0])
    return smallest


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the merges by rank; old files have both halves in one string."""
    pairs = (m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"])
    return [(left, right) for left, right in pairs]


def _merged(model: Mapping[str, Any], left: str, right: str) -> str:
    return left + right.removeprefix(model.get("continuing_subword_prefix") or "")


def _intermediate(model: Mapping[str, Any], pieces: Collection[str]) -> set[str]:
    """Return all pieces between the characters and these pieces, in the order of merging.

    A piece is merged inside a word as it is alone: merges go by rank, and none across its borders
    was made. If every step of the used pieces is kept, the next merge of a text always exists, and
    no other merge that is left can come before it. So the text has the same pieces.
    """
    ranks = {pair: rank for rank, pair in reversed(list(enumerate(_merges(model))))}
    prefix = model.get("continuing_subword_prefix") or ""
    suffix = model.get("end_of_word_suffix") or ""
    steps: set[str] = set()
    for piece in pieces:
        start = prefix if prefix and piece.startswith(prefix) else ""
        end = suffix if suffix and piece.endswith(suffix) else ""
        symbols = [f"{prefix}{c}" for c in piece.removeprefix(start).removesuffix(end)]
        if symbols:
            symbols[0] = start + symbols[0].removeprefix(prefix)
            symbols[-1] += end
        steps.update(symbols)
        while len(symbols) > 1:
            pairs = list(pairwise(symbols))
            at = min(range(len(pairs)), key=lambda i: ranks.get(pairs[i], len(ranks)))
            if pairs[at] not in ranks:
                break
            symbols[at : at + 2] = [_merged(model, *pairs[at])]
            steps.add(symbols[at])
    return steps


def _cut_model(model: Mapping[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    """Return the model with the kept pieces under their new ids, and the merges between them."""
    if _kind(model) == "Unigram":
        entries = [entry for number, entry in enumerate(model["vocab"]) if number in new]
        unknown = model.get("unk_id")
        return {
            **model,
            "vocab": entries,
            "unk_id": None if unknown is None else new[unknown],
        }
    vocab = {piece: new[number] for piece, number in model["vocab"].items() if number in new}
    if _kind(model) != "BPE":
        return {**model, "vocab": vocab}
    merges = [
        list(pair) for pair in _merges(model) if {*pair, _merged(model, *pair)} <= vocab.keys()
    ]
    return {**model, "vocab": vocab, "merges": merges}


def _renumbered(value: Any, new: Mapping[int, int]) -> Any:
    """Return a post-processor, or part of one, with the new ids of its special tokens."""
    if isinstance(value, list):
        return [_renumbered(part, new) for part in value]
    if not isinstance(value, dict):
        return value
    renumbered = {key: _renumbered(part, new) for key, part in value.items()}
    if isinstance(value.get("ids"), list):  # TemplateProcessing's special tokens
        renumbered["ids"] = [new[number] for number in value["ids"]]
    for key in ("sep", "cls"):  # BertProcessing and RobertaProcessing: token and id
        if isinstance(value.get(key), list):
            token, number = value[key]
            renumbered[key] = [token, new[number]]
    return renumbered


def _cut_config(path: Path, new: Mapping[int, int]) -> str:
    """Return `tokenizer_config.json` with its added tokens under their new ids."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(config.get("added_tokens_decoder"), dict):
        config["added_tokens_decoder"] = {
            str(new[int(number)]): token
            for number, token in config["added_tokens_decoder"].items()
            if int(number) in new
        }
    return json.dumps(config, ensure_ascii=False, indent=2)


def _check(smaller: SmallerTokenizer, pieces: Mapping[int, str], path: Path) -> None:
    """Require that the tokenizer has the written ids when it is loaded.

    The tokenizers library numbers added tokens itself, and transformers' classes rebuild some
    tokenizers.
    """
    with TemporaryDirectory() as directory:
        smaller.save(Path(directory))
        read = AutoTokenizer.from_pretrained(directory).get_vocab()
    for index, number in enumerate(smaller.ids):
        if read.pop(pieces[number], None) != index:
            raise IncompatibleError(
                f"vocabulary: corpus: {path}: piece {pieces[number]!r} would not have id {index} "
                "when ids are numbered anew; use vocabulary: teacher"
            )
    if read:
        raise IncompatibleError(
            f"vocabulary: corpus: {path}: transformers adds {min(read)!r} to it, expected the "
            f"{len(smaller.ids)} pieces kept; use vocabulary: teacher"
        )
