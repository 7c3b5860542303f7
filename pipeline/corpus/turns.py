"""Turns of a chat: role and text, and what else a chat template may write of them."""

import json
from collections.abc import Mapping
from typing import Any

FIELDS = ("tool_calls", "function_call", "tool_call_id", "name", "reasoning_content", "thinking")
"""Keys of a turn, beside role and content, that a model reads or learns to write."""


def turn_of(value: Any) -> dict[str, str | None] | None:
    """Return a turn as it is kept: `role`, `content` and, where it has more, that as JSON.

    Content that is a list of parts is kept with what is more. Fields that are null, as tables fill
    what other rows have, are left out at every depth.

    Returns:
        None where the value is no turn: it has no role, or neither content nor more.
    """
    if not isinstance(value, Mapping) or not isinstance(value.get("role"), str):
        return None
    content = value.get("content")
    more = {name: _without_null(value[name]) for name in FIELDS if value.get(name)}
    if isinstance(content, list):
        more["content"] = _without_null(content)
        content = None
    if not (isinstance(content, str) or (content is None and more)):
        return None
    kept: dict[str, str | None] = {"role": value["role"], "content": content}
    if more:
        kept["more"] = json.dumps(more, ensure_ascii=False)
    return kept


def whole_turn(turn: Mapping[str, str | None]) -> dict[str, Any]:
    """Return a turn as a chat template takes it; where it has no content, the content is empty.

    Templates that are not made for null would write the word None.
    """
    return {
        "role": turn["role"],
        "content": turn["content"] or "",
        **json.loads(turn.get("more") or "{}"),
    }


def _without_null(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_null(each) for key, each in value.items() if each is not None}
    if isinstance(value, list):
        return [_without_null(each) for each in value if each is not None]
    return value
