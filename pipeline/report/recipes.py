"""Describes each student in words: how it starts, what it matches, how long it trains.

The description has the keys that its section of `params.yaml` sets; defaults are left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TERMS = ("feature", "attention", "output", "labels")


@dataclass(frozen=True, slots=True)
class Recipe:
    """A student's section in four phrases; one is empty if the section sets none of its keys."""

    start: str
    match: str
    align: str
    train: str


def recipe(section: Mapping[str, Any]) -> Recipe:
    """Describe a student by its section `students.S`."""
    model = dict(section.get("model") or {})
    start = [_said(model.pop("architecture", None)), _said(model)]
    loss = dict(section.get("loss") or {})
    terms = [_term(name, loss.pop(name)) for name in TERMS if name in loss]
    return Recipe(
        start="; ".join(part for part in start if part),
        match="; ".join([term for term in terms if term] + ([_said(loss)] if loss else [])),
        align=_said(section.get("align")),
        train=_said(section.get("train")),
    )


def _term(name: str, options: Mapping[str, Any]) -> str:
    """A term as `0.1 attention (relations)`; nothing where its weight is 0."""
    rest = dict(options)
    weight = rest.pop("weight", 0)
    if weight == 0:
        return ""
    parts = [str(rest.pop("loss", "")), _said(rest)]
    details = ", ".join(part for part in parts if part)
    return f"{_value(weight)} {name}" + (f" ({details})" if details else "")


def _said(options: Any) -> str:
    """Keys with their values, without braces and quotes."""
    if not isinstance(options, Mapping):
        return "" if options is None else _value(options)
    return ", ".join(f"{key} {_value(value)}" for key, value in options.items())


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"({_said(value)})"
    if isinstance(value, list):
        return " ".join(_value(item) for item in value)
    return str(value).lower() if isinstance(value, bool) or value is None else f"{value}"
