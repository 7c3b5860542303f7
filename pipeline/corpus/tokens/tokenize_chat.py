"""Token rows of chats, rendered by the chat template; only the assistant's turns are targets.

The template is rendered by transformers; which tokens are the assistant's is read from the
template's `{% generation %}` blocks. A template that asks for today's date gets a fixed one, so
that ids never depend on the day.
"""

import datetime as dt
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from pipeline.corpus.tokens.row_builder import (
    Counts,
    Overlong,
    RowBuilder,
    batches,
    encode,
    too_long,
)
from pipeline.corpus.tokens.spans import ends_of, sizes_of
from pipeline.corpus.turns import whole_turn
from pipeline.errors import ConfigError

Turn = dict[str, Any]
Spans = Sequence[tuple[int, int]]
Render = Callable[[list[Turn]], tuple[str, Spans]]

LINKS = frozenset({"tool_call_id"})
"""Fields that only say which call an answer is for; many templates rely on the order instead."""


class Traces:
    """Looks for traces in the chats of one template; the first turn of each role in full."""

    def __init__(self, render: Callable[[list[Turn], str], tuple[str, Spans]]) -> None:
        self._render = render
        self._roles: set[str] = set()

    def check(self, turns: list[Turn], text: str, spans: Spans, where: str) -> None:
        """Refuse a chat if the template omits part of it.

        Args:
            turns: The turns given to the template.
            text: The rendered text.
            spans: The spans of the assistant's turns.
            where: Names the chat in errors.

        Raises:
            ConfigError: With the number of the turn, from 1, its role and what is missing.
        """
        in_doubt = not self._in_order(turns, text) or not {t["role"] for t in turns} <= self._roles
        marks_all = len(spans) == sum(turn["role"] == "assistant" for turn in turns)
        for place, turn in enumerate(turns):
            whose = f"{where}: turn {place + 1} ({turn['role']})"
            learnt = marks_all and turn["role"] == "assistant"
            for what, changed in _changes(turn, in_doubt=in_doubt):
                others = [*turns[:place], changed, *turns[place + 1 :]]
                if not self._differs(others, text, spans, learnt=learnt):
                    raise ConfigError(
                        f"{whose}: {what} leaves no trace in "
                        f"{'what is to be learnt' if learnt else 'the text'} of the chat template; "
                        "remove it from the row, or set tokens.chat_template to one that writes it"
                    )
            if isinstance(turn["content"], list) and str(turn["content"]) in text:
                raise ConfigError(
                    f"{whose}: the chat template writes the list of content as Python prints it, "
                    "expected text; join the parts, or set tokens.chat_template to one for parts"
                )
        self._roles |= {turn["role"] for turn in turns}

    @staticmethod
    def _in_order(turns: list[Turn], text: str) -> bool:
        """Tell whether the text holds all contents one after the other."""
        place = 0
        for turn in turns:
            content = turn["content"].strip() if isinstance(turn["content"], str) else ""
            found = text.find(content, place)
            if found < 0:
                return False
            place = found + len(content)
        return True

    def _differs(self, turns: list[Turn], text: str, spans: Spans, *, learnt: bool) -> bool:
        try:
            other, places = self._render(turns, "")
        except ConfigError:
            return True
        if not learnt:
            return other != text
        return [other[a:b] for a, b in places] != [text[a:b] for a, b in spans]


def _changes(turn: Turn, *, in_doubt: bool) -> list[tuple[str, Turn]]:
    """Return what is to leave a trace, each with the turn that lacks it or has it otherwise."""
    found: list[tuple[str, Turn]] = []
    content = turn["content"]
    if isinstance(content, list):
        for place, part in enumerate(content):
            kind = part.get("type", "part") if isinstance(part, dict) else "text"
            others = [*content[:place], *content[place + 1 :]]
            found.append((f"part {place + 1} of content ({kind})", {**turn, "content": others}))
    elif content.strip() and in_doubt:
        found.append(("content", {**turn, "content": f"{content.rstrip()}x"}))
    is_tool = turn["role"] in ("tool", "function")
    for name in turn.keys() - {"role", "content"} - LINKS - ({"name"} if is_tool else set()):
        value = turn[name]
        found.append((name, {key: turn[key] for key in turn if key != name}))
        if isinstance(value, list) and len(value) > 1:
            for place in range(len(value)):
                rest = [*value[:place], *value[place + 1 :]]
                found.append((f"{name}[{place}]", {**turn, name: rest}))
    return sorted(found, key=lambda each: each[0])


DEFAULT_DATE = "2026-01-01"

WITHIN_A_TEMPLATE = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""What Python raises for an expression of a template; jinja has errors of its own for the rest."""

CHECKED_PROMPTS = 256
"""Chats of a split whose beginning is compared with what a served model would be given."""

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_DIRECTIVES = "aAbBdHIjmMpSUwWyY"


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A chat template with its date pinned.

    Attributes:
        source: The template's text.
        date: The date that templates get, such as 2026-01-01.
    """

    source: str
    date: str

    @classmethod
    def of(
        cls, tokenizer: PreTrainedTokenizerFast | None, given: str | None, date: str
    ) -> "ChatTemplate":
        """Return the given template, or else the tokenizer's.

        Raises:
            ConfigError: If there is none, it does not mark the assistant's turns, or the date is
                none.
        """
        source = given or (tokenizer.chat_template if tokenizer else None)
        if isinstance(source, Mapping):
            source = source.get("default")
        if not source:
            raise ConfigError(
                "tokenizer: found no chat template, which task messages needs; set "
                "tokens.chat_template to a jinja file"
            )
        if not _MARK.search(source):
            raise ConfigError(
                f"tokenizer: the chat template {source[:40]!r}… has no {{% generation %}} mark, "
                "which says what the assistant wrote; set tokens.chat_template to a file with the "
                "assistant's turns between {% generation %} and {% endgeneration %}"
            )
        try:
            dt.date.fromisoformat(date)
        except ValueError as error:
            raise ConfigError(
                f"tokens.chat_date: found {date!r}, expected a day as {DEFAULT_DATE}; correct it"
            ) from error
        return cls(source, date)

    @property
    def sha256(self) -> str:
        """Digest of the template's text."""
        return hashlib.sha256(self.source.encode()).hexdigest()

    def render(
        self,
        messages: Sequence[Mapping[str, str | None]],
        special: Mapping[str, Any],
        where: str,
        *,
        opens_answer: bool = False,
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return the chat as one text, with the span of each turn of the assistant.

        Args:
            messages: The turns.
            special: Texts of the special tokens by name, such as `bos_token`.
            where: Names the chat in errors.
            opens_answer: Whether the template is asked to open an answer at the end, as a program
                that serves the model asks it to (`add_generation_prompt`).

        Raises:
            ConfigError: If the template refuses the chat.
        """
        turns = [whole_turn(turn) for turn in messages]
        return self.render_turns(turns, special, where, opens_answer=opens_answer)

    def render_turns(
        self,
        turns: list[dict[str, Any]],
        special: Mapping[str, Any],
        where: str,
        *,
        opens_answer: bool = False,
    ) -> tuple[str, list[tuple[int, int]]]:
        """Do the same for turns as a template takes them, from `whole_turn`."""
        day = dt.date.fromisoformat(self.date)
        try:
            rendered, spans = render_jinja_template(
                conversations=[turns],
                chat_template=_pinned(day) + self.source,
                return_assistant_tokens_mask=True,
                add_generation_prompt=opens_answer,
                **{**special, "date_string": day.strftime("%d %b %Y")},
            )
        except (TemplateError, *WITHIN_A_TEMPLATE) as error:
            raise ConfigError(
                f"{where}: the chat template refuses the turns "
                f"{', '.join(turn['role'] for turn in turns)} ({error}); correct the row or "
                "tokens.chat_template"
            ) from error
        return rendered[0], [(int(start), int(end)) for start, end in spans[0]]


def _pinned(day: dt.date) -> str:
    """Return a macro that takes the place of `strftime_now`, which templates ask for the time.

    The library lets no function of ours into a template, so each directive is replaced in text.
    """
    moment = dt.datetime.combine(day, dt.time())
    filters = "".join(
        f" | replace('%{flag}{letter}', '{_written(moment, letter, bool(flag))}')"
        for letter in _DIRECTIVES
        for flag in ("", "-")
    )
    return f"{{%- macro strftime_now(format) -%}}{{{{ format{filters} }}}}{{%- endmacro -%}}"


def _written(moment: dt.datetime, letter: str, short: bool) -> str:
    text = moment.strftime(f"%{letter}")
    return (text.lstrip("0") or "0") if short and text.isdecimal() else text


def add_chat_rows(
    rows: RowBuilder,
    counts: Counts,
    texts: datasets.Dataset,
    tokenizer: PreTrainedTokenizerFast,
    *,
    max_length: int,
    overlong: Overlong,
    template: ChatTemplate,
) -> None:
    """Add the rows of one split; a long chat is truncated at the end.

    Chats without any answer of the assistant, or with nothing before the last one, are dropped. A
    chat is refused if the template omits part of it.

    Raises:
        ConfigError: If the template refuses a chat or leaves out a part of one, or one is too long
            under `error`.
    """
    special = tokenizer.special_tokens_map
    traces = Traces(lambda turns, where: template.render_turns(turns, special, where))
    for batch in batches(texts):
        chats = [
            template.render(messages, special, source)
            for messages, source in zip(batch["messages"], batch["source"], strict=True)
        ]
        for messages, chat, source in zip(batch["messages"], chats, batch["source"], strict=True):
            traces.check([whole_turn(turn) for turn in messages], *chat, source)
        encoded = encode(tokenizer, [text for text, _ in chats], add_special_tokens=False)
        for number, (text, spans) in enumerate(chats):
            ids = np.array(encoded["input_ids"][number], np.int32)
            offsets = np.array(encoded["offset_mapping"][number], np.int64).reshape(-1, 2)
            ends = ends_of(offsets, len(text))
            turns = [_tokens_of(span, offsets, ends) for span in spans]
            if len(ids) > max_length:
                counts.overlong += 1
                if overlong == "error":
                    raise too_long(batch["source"][number], len(ids), max_length)
            mask = np.zeros(len(ids), bool)
            for first, last in turns:
                # The end token may be outside the span; without it a model never learns to stop.
                stop = last + (last < len(ids) and ids[last] == tokenizer.eos_token_id)
                mask[first:stop] = True
            ids, mask = ids[:max_length], mask[:max_length]
            # A truncated turn and one without text have no start.
            seen = [number for number, (first, _) in enumerate(turns) if first < len(ids)]
            if not mask[1:].any() or not seen or turns[seen[-1]][0] == 0:
                counts.dropped += 1
                continue
            rows.add(ids, mask, source_row=batch["source_row"][number])
            # The template's special tokens are not text that other tokenizers would have to write.
            plain = ~np.isin(ids, tokenizer.all_special_ids)
            sizes = [size[: len(ids)] * plain for size in sizes_of(text, ends)]
            rows.add_target_sizes(mask, (sizes[0], sizes[1]))
            rows.prompt_tokens.append(turns[seen[-1]][0])
            later = len(turns) - 1 - seen[-1]
            start, end = spans[seen[-1]]
            written = _without_marks(text[start:end], tokenizer.all_special_tokens)
            rows.references.append(_answer(batch["messages"][number], later, written))
            if len(rows.prompt_tokens) <= CHECKED_PROMPTS:
                served = _served(template, tokenizer, batch["messages"][number], later)
                counts.checked += 1
                counts.borders += served != ids[: rows.prompt_tokens[-1]].tolist()


def _tokens_of(
    span: tuple[int, int], offsets: NDArray[np.int64], ends: NDArray[np.int64]
) -> tuple[int, int]:
    """Return the first and last (exclusive) token with text in a span.

    A token that only begins or ends in it counts, as in transformers.
    """
    starts = np.concatenate([[0], ends[:-1]])
    inside = np.maximum(starts, span[0]) < np.minimum(ends, span[1])
    # Bytes of one character in two tokens: the second has no text of its own.
    inside |= np.maximum(offsets[:, 0], span[0]) < np.minimum(offsets[:, 1], span[1])
    found = np.flatnonzero(inside)
    return (int(found[0]), int(found[-1]) + 1) if len(found) else (len(ends), len(ends))


def _served(
    template: ChatTemplate,
    tokenizer: PreTrainedTokenizerFast,
    messages: list[dict[str, str | None]],
    later: int,
) -> list[int] | None:
    """Return the ids that a served model would answer; None if the template refuses."""
    answers = [place for place, turn in enumerate(messages) if turn["role"] == "assistant"]
    if later >= len(answers):
        return None
    before = messages[: answers[len(answers) - 1 - later]]
    try:
        text, _ = template.render(before, tokenizer.special_tokens_map, "", opens_answer=True)
    except ConfigError:
        return None
    return encode(tokenizer, [text], add_special_tokens=False)["input_ids"][0]


def _answer(messages: list[dict[str, str | None]], later: int, written: str) -> list[str]:
    """Return the last answer in the row, after dropping the later ones that do not fit.

    An answer with more than content, such as a tool call, is the text that the template renders.
    """
    answers = [turn for turn in messages if turn["role"] == "assistant"]
    if later >= len(answers):
        return []
    turn = answers[len(answers) - 1 - later]
    return [written if turn.get("more") else turn["content"] or ""]


def _without_marks(text: str, marks: Sequence[str]) -> str:
    """Return an answer as it is written, without white space and special tokens at its end."""
    left = text.strip()
    while mark := next((mark for mark in marks if mark and left.endswith(mark)), None):
        left = left.removesuffix(mark).strip()
    return left
