"""Rows of chats: the tokenizer's own template around the turns, and only the assistant's learnt.

The template is rendered by transformers; which tokens are the assistant's is read from the
template's `{% generation %}` marks. A template may ask for today's date: it is given a fixed one,
so that ids never depend on the day.
"""

import datetime as dt
import hashlib
import re
from collections.abc import Mapping, Sequence
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
from pipeline.corpus.tokens.traces import Traces
from pipeline.corpus.turns import whole_turn
from pipeline.errors import ConfigError

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
        source: The template as it was given.
        date: The day that templates are told, as 2026-01-01.
    """

    source: str
    date: str

    @classmethod
    def of(
        cls, tokenizer: PreTrainedTokenizerFast | None, given: str | None, date: str
    ) -> "ChatTemplate":
        """Take the template that was given, else that of the tokenizer, where there is one.

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
        """Return the chat as one text, and where in it each turn of the assistant begins and ends.

        Args:
            messages: The turns.
            special: Texts of the special tokens by name, as `bos_token`.
            where: What names the chat in an error.
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
    """Add the rows of one split; a long chat loses its end.

    Those in which no answer of the assistant is left, or nothing stands before the last one, are
    left out. A chat of which the template writes less than it holds is refused.

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
                # The mark that ends an answer may stand outside; without it none learns to stop.
                stop = last + (last < len(ids) and ids[last] == tokenizer.eos_token_id)
                mask[first:stop] = True
            ids, mask = ids[:max_length], mask[:max_length]
            # A turn that was cut off, and one without text, begins nowhere.
            seen = [number for number, (first, _) in enumerate(turns) if first < len(ids)]
            if not mask[1:].any() or not seen or turns[seen[-1]][0] == 0:
                counts.dropped += 1
                continue
            rows.add(ids, mask, source_row=batch["source_row"][number])
            # The template's marks are no text that other tokenizers would have to write.
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
    """Return first and last (exclusive) token with text of a span.

    A token that only begins or ends in it counts, as it does for the library.
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
    """Return the ids from which a served model would write an answer; None if refused."""
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
    """Return the last answer that is in the row, where so many later ones are not.

    One that is more than its content, as a call of a tool, is what the template writes of it.
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
