"""The rows of a token set in the ids of a student that has fewer of them than its teacher.

Held-out text has pieces that such a student lacks; there its own tokenizer writes the same text in
more pieces. What is text, prompt and target stays what it was, so that scores a byte or a word
compare with those of any other model. What it can only write as unknown is charged as one of all
the pieces that this may stand for: else it would be cheaper to know less.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray
from tokenizers.models import WordPiece
from transformers import PreTrainedTokenizerFast

from pipeline.axes import TRAIN
from pipeline.corpus.text.examples import SPLITS, Split
from pipeline.corpus.tokens.tokenizer import load_tokenizer, tokenizer_digest
from pipeline.corpus.tokens.tokens import NUMBERS, TokenColumns, TokenMeta, TokenSet, token_digest
from pipeline.errors import IncompatibleError, IntegrityError
from pipeline.written_by import remedy

logger = logging.getLogger(__name__)

SANE_LENGTH = 10**9  # transformers' mark for "no limit known" is beyond


@dataclass(frozen=True, slots=True)
class StudentTokenSet(TokenSet):
    """Rows in a student's ids, held in memory.

    Attributes:
        path: The token set that they were made from.
        directory: The student, whose tokenizer this is.
        columns: The rows of each split.
        unknown_nats: What each row of a split is charged beyond the likelihood of its ids.
        cut_rows: How many rows of a split are longer than the student's positions.
    """

    directory: Path
    columns: dict[Split, TokenColumns]
    unknown_nats: dict[Split, NDArray[np.float64]]
    cut_rows: dict[Split, int]

    @property
    def tokenizer_path(self) -> Path:
        """Directory that `AutoTokenizer.from_pretrained` loads."""
        return self.directory

    def split(self, name: Split) -> datasets.Dataset:
        """Return the rows of one split."""
        table = self.columns[name].to_table()
        if self.unknown_nats[name].any():
            table = table.append_column("unknown_nats", [self.unknown_nats[name]])
        return datasets.Dataset(table)


def student_token_set(tokens: TokenSet, student_directory: Path, room: int | None) -> TokenSet:
    """Return a token set in the ids of a student.

    Rows whose pieces the student has keep them. In the others each stretch of text between special
    tokens, prompt and target apart, is written anew; a row that outgrows the student's positions
    loses its end, and the bytes and words of it; one with a prompt, first the prompt's middle.

    Args:
        tokens: The token set of the student's teacher.
        student_directory: What `train` wrote.
        room: Tokens of the longest row that the student takes, see `longest_row`.

    Returns:
        `tokens` itself where the student has the teacher's tokenizer.

    Raises:
        IntegrityError: If the student has no tokenizer.
    """
    if _tokenizer_text(student_directory) == _tokenizer_text(tokens.tokenizer_path):
        return tokens
    teacher, student = load_tokenizer(tokens.tokenizer_path), load_tokenizer(student_directory)
    longest = min(student.model_max_length, room or SANE_LENGTH, SANE_LENGTH)
    writer = _Writer(teacher, student, longest)
    columns: dict[Split, TokenColumns] = {}
    unknown: dict[Split, NDArray[np.float64]] = {}
    cut: dict[Split, int] = {}
    for split in SPLITS:
        rows = _columns(tokens.split(split))
        columns[split], unknown[split], cut[split] = writer.rewrite(rows, split)
    meta = _meta(tokens.meta, columns, student, longest)
    return StudentTokenSet(tokens.path, meta, student_directory, columns, unknown, cut)


def _tokenizer_text(directory: Path) -> bytes:
    path = directory / "tokenizer.json"
    try:
        return path.read_bytes()
    except OSError as error:
        raise IntegrityError(f"{path}: not readable ({error}); {remedy(path)}") from error


def _columns(rows: datasets.Dataset) -> TokenColumns:
    """Return a split as flat arrays."""
    table: Any = rows.with_format("arrow")[:]
    lists = {
        name: table[name].combine_chunks()
        for name in ("input_ids", "loss_mask", "token_type_ids", "targets")
        if name in table.column_names
    }
    flat = {name: column.flatten().to_numpy(zero_copy_only=False) for name, column in lists.items()}
    lengths = lists["input_ids"].value_lengths().to_numpy(zero_copy_only=False)
    numbers = {name: table[name].to_numpy() for name in NUMBERS if name in table.column_names}
    if "targets" in flat:
        flat["targets"] = flat["targets"].reshape(len(lengths), -1)
    if "references" in table.column_names:
        numbers["references"] = table["references"].to_pylist()
    return TokenColumns(
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), **flat, **numbers
    )


def _meta(
    meta: TokenMeta,
    columns: dict[Split, TokenColumns],
    student: PreTrainedTokenizerFast,
    longest: int,
) -> TokenMeta:
    rows = max(int(np.diff(c.offsets).max(initial=0)) for c in columns.values())
    changes: dict[str, Any] = {
        "vocab": len(student),
        "pad_id": student.pad_token_id,
        "max_length": min(longest, max(meta.max_length, rows)),
        "tokens": {split: len(c.input_ids) for split, c in columns.items()},
        "targets": {split: c.count_targets() for split, c in columns.items()},
        "digest": token_digest(columns),
        "tokenizer_digest": tokenizer_digest(student),
    }
    for name in ("target_bytes", "target_words"):
        if getattr(meta, name):
            changes[name] = {split: int(getattr(c, name).sum()) for split, c in columns.items()}
    return meta.model_copy(update=changes)


class _Writer:
    """Writes rows of the teacher's ids in the student's."""

    def __init__(
        self, teacher: PreTrainedTokenizerFast, student: PreTrainedTokenizerFast, longest: int
    ) -> None:
        self._teacher, self._student = teacher.backend_tokenizer, student.backend_tokenizer
        for backend in (self._teacher, self._student):
            backend.no_truncation()
            backend.no_padding()
        self._longest = longest
        self._pieces = {number: piece for piece, number in teacher.get_vocab().items()}
        self._vocab = student.get_vocab()
        self._unknown = student.unk_token_id
        self._place = np.full(1 + max(self._pieces), -1, np.int64)
        for number, piece in self._pieces.items():
            self._place[number] = self._vocab.get(piece, -1)
        self._lacks = sum(self._place[number] < 0 for number in self._pieces)
        self._is_special = np.zeros(len(self._place), bool)
        self._is_special[list(self._teacher.get_added_tokens_decoder())] = True

    def rewrite(
        self, columns: TokenColumns, split: str
    ) -> tuple[TokenColumns, NDArray[np.float64], int]:
        """Return a split's rows with new ids, and all that goes by token as long as they are.

        With them, in nats, what each row is charged for what it can only write as unknown, and the
        number of rows that were cut.
        """
        placed = self._place[columns.input_ids]
        lacking = np.add.reduceat(placed < 0, columns.offsets[:-1]) if len(placed) else placed
        ids: list[NDArray[np.int32]] = []
        sources: list[NDArray[np.int64]] = []
        numbers = {
            name: getattr(columns, name).copy()
            for name in ("target_bytes", "target_words", "prompt_tokens")
            if getattr(columns, name) is not None
        }
        cut, written, unknown = 0, 0, np.zeros(len(columns.offsets) - 1, np.int64)
        for row, (start, stop) in enumerate(
            zip(columns.offsets[:-1].tolist(), columns.offsets[1:].tolist(), strict=True)
        ):
            new, source = placed[start:stop], np.arange(start, stop)
            if lacking[row]:
                new, source = self._write(columns, row, placed)
            written += len(new)
            if "prompt_tokens" in numbers:
                border = start + int(numbers["prompt_tokens"][row])
                numbers["prompt_tokens"][row] = int((source < border).sum())
            if len(new) > self._longest:
                cut += 1
                new, source = self._cut(columns, row, new, source, numbers)
            if lacking[row]:
                unknown[row] = self._unknown_targets(new, columns.loss_mask[source]) - (
                    self._unknown_targets(placed[start:stop], columns.loss_mask[start:stop])
                )
            ids.append(new.astype(np.int32))
            sources.append(source)
        origin = np.concatenate(sources) if sources else np.zeros(0, np.int64)
        unknown = np.maximum(unknown, 0)
        if split != TRAIN:  # of which nothing is scored
            logger.info(
                "%s: %d of %d rows have pieces that the student's vocabulary lacks, as held-out "
                "text will; they are written in smaller ones, %d tokens instead of %d",
                split, int((lacking > 0).sum()), len(ids), written, len(placed),
            )  # fmt: skip
            self._warn(split, len(ids), int(unknown.sum()), cut)
        types = columns.token_type_ids
        rewritten = replace(
            columns,
            offsets=np.concatenate([[0], np.cumsum([len(row) for row in ids])]).astype(np.int64),
            input_ids=np.concatenate(ids) if ids else columns.input_ids,
            loss_mask=columns.loss_mask[origin],
            token_type_ids=None if types is None else types[origin],
            **numbers,
        )
        return rewritten, unknown * math.log(max(1, self._lacks)), cut

    def _unknown_targets(self, ids: NDArray[np.int64], counts: NDArray[np.bool_]) -> int:
        """Return how many tokens to be predicted are the unknown one; the first never is."""
        if self._unknown is None:
            return 0
        return int(((ids == self._unknown) & counts)[1:].sum())

    def _warn(self, split: str, rows: int, unknown: int, cut: int) -> None:
        """Say what was lost, and what to do."""
        if unknown:
            logger.warning(
                "%s: %d tokens are unknown to the student; each is charged as one of the %d pieces "
                "that it lacks: train on more text, or use vocabulary: teacher",
                split, unknown, self._lacks,
            )  # fmt: skip
        if cut:
            logger.warning(
                "%s: %d of %d rows are longer than the student's %d positions: what is over is not "
                "scored, nor counted in bytes or words; raise max_position_embeddings in the "
                "student's model.architecture",
                split, cut, rows, self._longest,
            )  # fmt: skip

    def _write(
        self, columns: TokenColumns, row: int, placed: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return a row's new ids, and for each the token whose mask and segment it takes over."""
        start, stop = int(columns.offsets[row]), int(columns.offsets[row + 1])
        ids = columns.input_ids[start:stop]
        marks = [columns.loss_mask[start:stop], self._is_special[ids]]
        if columns.token_type_ids is not None:
            marks.append(columns.token_type_ids[start:stop])
        if columns.prompt_tokens is not None:
            marks.append(np.arange(len(ids)) < columns.prompt_tokens[row])
        changes = np.any([mark[1:] != mark[:-1] for mark in marks], axis=0)
        borders = [0, *(np.flatnonzero(changes) + 1).tolist(), len(ids)]
        found: list[int] = []
        sources: list[int] = []
        for first, last in pairwise(borders):
            own = placed[start + first : start + last].tolist()
            source = list(range(start + first, start + last))
            if min(own) < 0:
                own = self._stretch(ids[first:last].tolist())
                # Masks and segments are those of the whole stretch.
                source = [start + first] * len(own)
            found += own
            sources += source
        return np.array(found, np.int64), np.array(sources, np.int64)

    def _stretch(self, ids: list[int]) -> list[int]:
        """Write a stretch of text anew, as the student's tokenizer writes it.

        Where decoding loses something, as a space at the start, it is written piece by piece.
        """
        text = self._teacher.decode(ids, skip_special_tokens=False)
        if self._teacher.encode(text, add_special_tokens=False).ids == ids:
            return self._student.encode(text, add_special_tokens=False).ids
        return [new for number in ids for new in self._split(number)]

    def _split(self, number: int) -> Sequence[int]:
        """Write one piece in smaller ones."""
        if self._place[number] >= 0:
            return [int(self._place[number])]
        piece, model = self._pieces[number], self._student.model
        prefix = model.continuing_subword_prefix if isinstance(model, WordPiece) else ""
        if prefix and piece.startswith(prefix):
            # WordPiece itself would take the prefix for text.
            rest = piece.removeprefix(prefix)
            found = [self._vocab.get(prefix + character, self._unknown) for character in rest]
        else:
            found = [token.id for token in model.tokenize(piece)]
        kept = [new for new in found if isinstance(new, int)]
        if not kept:
            raise IncompatibleError(
                f"the student's tokenizer cannot write {piece!r}, a piece of the teacher's; "
                "train the student again"
            )
        return kept

    def _cut(
        self,
        columns: TokenColumns,
        row: int,
        new: NDArray[np.int64],
        source: NDArray[np.int64],
        numbers: dict[str, NDArray[np.int32]],
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Shorten a row to the student's positions; a classifier's row keeps its closing mark.

        A prompt gives first, down to half of the positions, and keeps both its ends, where the
        words of a template stand: without a target nothing would be measured.
        """
        if "target_bytes" not in numbers:
            kept = np.r_[0 : self._longest - 1, len(new) - 1]
            return new[kept], source[kept]
        keeps = np.ones(len(new), bool)
        if "prompt_tokens" in numbers:
            prompt = int(numbers["prompt_tokens"][row])
            given = min(len(new) - self._longest, max(0, prompt - self._longest // 2))
            first = (prompt - given + 1) // 2
            keeps[first : first + given] = False
            numbers["prompt_tokens"][row] = prompt - given
        keeps[np.flatnonzero(keeps)[self._longest :]] = False
        lost = new[~keeps & columns.loss_mask[source]]
        text = self._student.decode(lost.tolist())
        for name, amount in (
            ("target_bytes", len(text.encode())),
            ("target_words", len(text.split())),
        ):
            numbers[name][row] = max(0, int(numbers[name][row]) - amount)
        return new[keeps], source[keeps]
