"""Chat turns: role, content and the optional fields that a chat template may render."""

import json
from collections.abc import Mapping
from typing import Any

FIELDS = ("tool_calls", "function_call", "tool_call_id", "name", "reasoning_content", "thinking")
"""Optional keys of a turn that the template may render, in addition to role and content."""


def turn_of(value: Any) -> dict[str, str | None] | None:
    """Return a turn in stored form: `role`, `content` and the optional fields as JSON in `more`.

    Content that is a list of parts is stored in `more`. Null fields are dropped at every depth,
    because tables fill the fields of other rows with null.

    Returns:
        None if the value is not a turn: it has no role, or neither content nor optional fields.
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
    """Return a stored turn in the form that a chat template takes.

    Missing content becomes the empty string: many templates would render null as "None".
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
