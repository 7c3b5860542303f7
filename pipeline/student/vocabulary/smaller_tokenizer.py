"""A tokenizer cut down to the ids that some texts need, which writes them in the same pieces.

`tokenizer.json` is edited, whatever its model: byte-pair merges, WordPiece, Unigram or whole words.
Every text that could be written still can be, in more pieces. Ids are numbered anew, without gaps,
in the order that they had.
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
        ids: The ids kept, of the tokenizer it was cut from; an id's place is its new id.
        files: Text of each file, by name.
    """

    ids: tuple[int, ...]
    files: Mapping[str, str]

    def save(self, directory: Path) -> None:
        """Write what `AutoTokenizer` loads into a directory."""
        for name, text in self.files.items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")


def cut_tokenizer(source: Path, used: Collection[int]) -> SmallerTokenizer:
    """Cut a tokenizer down to used ids, added tokens, and what it needs to write every text.

    A text all of whose ids are used is written in the same pieces as before. (But for one: a word
    that was unknown to WordPiece as a whole may become known, where a removed piece stood in the
    way.)

    Args:
        source: Directory with `tokenizer.json`.
        used: Ids to keep.

    Raises:
        IntegrityError: If the file is missing or broken.
        IncompatibleError: If the tokenizer's model is none of the four, or gives other ids when
            numbered anew.
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
    new = {number: place for place, number in enumerate(kept)}
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
    found = SmallerTokenizer(tuple(kept), files)
    _check(found, pieces | added, path)
    return found


def _kind(model: Mapping[str, Any]) -> str:
    """Name the model; files of old write no type."""
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
    """Return what any text can be written in: bytes where it can fall back on them, or characters.

    Unigram keeps its characters in any case: it takes the way to a byte only where there is no
    other. And it keeps its least likely piece, whose score prices the unknown.
    """
    kind = _kind(model)
    if kind == "WordLevel":
        return set()
    found = {piece for piece in pieces if BYTE.fullmatch(piece)}
    if kind == "BPE" and model.get("byte_fallback") and found:
        return found
    prefix = model.get("continuing_subword_prefix") or ""
    suffix = model.get("end_of_word_suffix") or ""
    found |= {
        piece for piece in pieces if len(piece.removeprefix(prefix).removesuffix(suffix)) <= 1
    }
    if kind == "Unigram":
        found.add(min(model["vocab"], key=lambda entry: entry[1])[0])
    return found


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the merges by rank; files of old have both halves in one string."""
    pairs = (m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"])
    return [(left, right) for left, right in pairs]


def _merged(model: Mapping[str, Any], left: str, right: str) -> str:
    return left + right.removeprefix(model.get("continuing_subword_prefix") or "")


def _intermediate(model: Mapping[str, Any], pieces: Collection[str]) -> set[str]:
    """Return all that stands between characters and these pieces when they are merged.

    A piece comes about inside a word as it does alone: merges go by rank, and none that crosses
    its borders was made. With every step of the used pieces kept, the next merge of a text is
    always there, and no merge that is left can come before it: the same pieces.
    """
    ranks = {pair: rank for rank, pair in reversed(list(enumerate(_merges(model))))}
    prefix = model.get("continuing_subword_prefix") or ""
    suffix = model.get("end_of_word_suffix") or ""
    found: set[str] = set()
    for piece in pieces:
        start = prefix if prefix and piece.startswith(prefix) else ""
        end = suffix if suffix and piece.endswith(suffix) else ""
        symbols = [f"{prefix}{c}" for c in piece.removeprefix(start).removesuffix(end)]
        if symbols:
            symbols[0] = start + symbols[0].removeprefix(prefix)
            symbols[-1] += end
        found.update(symbols)
        while len(symbols) > 1:
            pairs = list(pairwise(symbols))
            at = min(range(len(pairs)), key=lambda i: ranks.get(pairs[i], len(ranks)))
            if pairs[at] not in ranks:
                break
            symbols[at : at + 2] = [_merged(model, *pairs[at])]
            found.add(symbols[at])
    return found


def _cut_model(model: Mapping[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    """Return the model with the kept pieces, and the merges between them, under their new ids."""
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
    found = {key: _renumbered(part, new) for key, part in value.items()}
    if isinstance(value.get("ids"), list):  # TemplateProcessing's special tokens
        found["ids"] = [new[number] for number in value["ids"]]
    for key in ("sep", "cls"):  # BertProcessing and RobertaProcessing: token and id
        if isinstance(value.get(key), list):
            token, number = value[key]
            found[key] = [token, new[number]]
    return found


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


def _check(found: SmallerTokenizer, pieces: Mapping[int, str], path: Path) -> None:
    """Require that anyone who loads it has the ids that were written.

    The library numbers added tokens itself, and transformers' classes rebuild some tokenizers.
    """
    with TemporaryDirectory() as directory:
        found.save(Path(directory))
        read = AutoTokenizer.from_pretrained(directory).get_vocab()
    for place, number in enumerate(found.ids):
        if read.pop(pieces[number], None) != place:
            raise IncompatibleError(
                f"vocabulary: corpus: {path}: piece {pieces[number]!r} would not have id {place} "
                "when ids are numbered anew; use vocabulary: teacher"
            )
    if read:
        raise IncompatibleError(
            f"vocabulary: corpus: {path}: transformers adds {min(read)!r} to it, expected the "
            f"{len(found.ids)} pieces kept; use vocabulary: teacher"
        )
