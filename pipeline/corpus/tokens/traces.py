"""Does a chat template write all of a chat? What leaves no trace in the text is never learnt.

A template ignores without a word what it does not know: a role, a call of a tool, a list of parts.
So the text is rendered with and without what is in doubt.
"""

from collections.abc import Callable, Sequence
from typing import Any

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
        """Refuse a chat of which the template writes less than it holds.

        Args:
            turns: The turns as the template was given them.
            text: What it wrote.
            spans: Where in it the assistant's turns are.
            where: What names the chat in an error.

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
