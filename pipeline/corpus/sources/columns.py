"""Which column is what: the keys that every source with named columns has, in one place.

A source yields rows as mappings of plain Python values; here they become examples.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from pipeline.corpus.sources.base import SourceConfig
from pipeline.corpus.text.examples import Example, Split
from pipeline.corpus.turns import turn_of
from pipeline.errors import ConfigError

Names = str | tuple[str, ...]


class ColumnSource(SourceConfig):
    """Base of the `corpus.source` sections whose examples are rows with named columns.

    Attributes:
        text: Column with the text; the prompt, where there is a target.
        pair: Column with the second text of a pair.
        label: Column with the class, or with the number of a regression.
        labels: Column with the classes of a multi-label task: a list, or a cell of several names.
        separator: What stands between the names in a cell of `labels`.
        target: Column with what is to be written after the text. Of several columns the first is
            trained on and all are references; splits may have columns of their own.
        alternatives: What stands between several targets in one cell; they count as columns do.
        messages: Column with a chat: a list of {role, content}, or its JSON. Of other keys of a
            turn those of `turns.FIELDS` are kept, as tool_calls; the rest is left out.
    """

    text: str = "text"
    pair: str | None = None
    label: str | None = None
    labels: str | None = None
    separator: str = Field(default=",", min_length=1)
    target: Names | dict[Split, Names] | None = None
    alternatives: str | None = Field(default=None, min_length=1)
    messages: str | None = None

    def column_settings(self) -> dict[str, Any]:
        """Return what the columns are, for provenance: the task's own keys only where given."""
        always = self.model_dump(include={"text", "pair", "label"}, mode="json")
        own = {"labels", "separator", "target", "alternatives", "messages"}
        given = self.model_dump(include=own, mode="json", exclude_defaults=True)
        return always | given

    def wanted(self, split: Split | None) -> list[str]:
        """Return the names of the columns that the rows of a split are read from."""
        texts = [self.messages] if self.messages else [self.text, self.pair]
        named = [*texts, self.label, self.labels, *self._targets(split)]
        return [name for name in named if name is not None]

    def example(
        self, cells: Mapping[str, Any], where: str, *, split: Split | None, source: str, row: int
    ) -> Example | None:
        """Return a row as an example, None where it has no text.

        Args:
            cells: Values by column name.
            where: File and line, or what else names the row in an error.
            split: The source's own split.
            source: The same for the corpus, free of the project's place.
            row: Number of the example in the source.

        Raises:
            ConfigError: If a column is missing or holds what is none of text, number and boolean.
        """
        # Published test files often lack the answer; which rows must have one is known only when
        # the splits are dealt.
        is_test = split == "test"
        place: dict[str, Any] = {"split": split, "source": source, "source_row": row}
        if self.messages is not None:
            messages = _messages(_value(cells, self.messages, where), where, self.messages)
            if not messages:
                return None
            answers = [turn["content"] or "" for turn in messages if turn["role"] == "assistant"]
            references = tuple(answers[-1:])
            return Example(text="", messages=messages, references=references, **place)
        text = _text(_value(cells, self.text, where), where, self.text)
        pair = _text(_value(cells, self.pair, where), where, self.pair) if self.pair else None
        if not text.strip() and not (pair or "").strip():
            return None
        if self.label is not None:
            value = _value(cells, self.label, where, optional=is_test)
            # A space too many is no class of its own.
            place["label"] = _text(value, where, self.label).strip()
        if self.labels is not None:
            value = _value(cells, self.labels, where, optional=is_test)
            place["labels"] = _names(value, where, self.labels, self.separator)
        if self.target is not None:
            references = self._references(cells, where, split)
            place |= {"target": references[0] if references else "", "references": references}
        return Example(text=text, pair=pair, **place)

    def _targets(self, split: Split | None) -> tuple[str, ...]:
        names = self.target
        if isinstance(names, dict):
            names = names.get(split or "train", ())
        return (names,) if isinstance(names, str) else names or ()

    def _references(
        self, cells: Mapping[str, Any], where: str, split: Split | None
    ) -> tuple[str, ...]:
        """Return every text that would do, the one to train on first; none is empty."""
        found: list[str] = []
        for column in self._targets(split):
            value = _value(cells, column, where, optional=split == "test")
            # A column of a list is a column of references.
            for item in value if isinstance(value, list) else [value]:
                text = _text(item, where, column)
                if self.alternatives is None:
                    found.append(text)
                else:
                    found += [part.strip() for part in text.split(self.alternatives)]
        return tuple(dict.fromkeys(text for text in found if text.strip()))


def _value(cells: Mapping[str, Any], column: str, where: str, *, optional: bool = False) -> Any:
    """Return a cell; None where a column is missing that may be."""
    if column not in cells and not optional:
        raise ConfigError(
            f"{where}: no column {column!r}, it has {', '.join(map(repr, cells))}; "
            "correct the name in corpus.source"
        )
    return cells.get(column)


def _text(value: Any, where: str, column: str) -> str:
    """Return a cell as text; numbers and booleans as JSON writes them, NaN as what is missing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, str):
        _refuse_broken(value, where, column)
        return value
    if isinstance(value, float) and math.isinf(value):
        raise ConfigError(
            f"{where}: column {column!r} holds {value}, expected text or a finite number; correct "
            "the row"
        )
    if isinstance(value, (bool, int, float)):
        return json.dumps(value)
    raise ConfigError(
        f"{where}: column {column!r} holds a {type(value).__name__}, "
        "expected text, a number or a boolean; flatten the column"
    )


def _refuse_broken(text: str, where: str, column: str) -> None:
    """JSON may escape half of a character or a zero byte, which no text file holds."""
    if "\0" in text:
        raise ConfigError(
            f"{where}: column {column!r} holds a zero byte, expected text; correct the row"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{where}: column {column!r} holds half a character "
            f"({text[error.start : error.start + 1]!r}), expected Unicode text; correct the row"
        ) from error


def _names(value: Any, where: str, column: str, separator: str) -> tuple[str, ...] | None:
    """Return the classes of a cell, each once; an empty cell is no class, none at all no answer."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, list):
        names = [_text(item, where, column) for item in value]
    else:
        names = _text(value, where, column).split(separator)
    return tuple(dict.fromkeys(name.strip() for name in names if name.strip()))


def _messages(value: Any, where: str, column: str) -> tuple[dict[str, str | None], ...]:
    """Return a chat's turns; an empty cell is no chat."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ConfigError(
                f"{where}: column {column!r} is not JSON ({error}); expected a list of "
                "{role, content}"
            ) from error
    if not value or (isinstance(value, float) and math.isnan(value)):
        return ()
    found: list[dict[str, str | None]] = []
    for value_of_turn in value if isinstance(value, list) else [[value]]:
        turn = turn_of(value_of_turn)
        if turn is None:
            raise ConfigError(
                f"{where}: column {column!r} holds {str(value_of_turn)[:60]!r}, expected a list of "
                "{role, content}, both texts, or with tool_calls in place of the content; convert "
                "the column"
            )
        for text in turn.values():
            _refuse_broken(text or "", where, column)
        found.append(turn)
    return tuple(found)
