"""Reads `params.yaml` as DVC does; an error names the key and the reason in one line."""

import datetime as dt
import difflib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.errors import ConfigError

SectionType = TypeVar("SectionType")
Key = str | int
MAX_SHOWN = 60
MAX_REASON = 500
MAX_BYTES = 2**20
MAX_VALUES, MAX_DEPTH = 100_000, 100
MAX_KEYS = 5
QUOTE = "'"
_READ: dict[tuple[Path, str], Any] = {}
"""The sections that this command has read, by file and dotted key."""

NAMED = ("teachers", "students")
"""Sections whose keys the user chooses."""
KINDS = {bool: "a truth value", int: "a number", float: "a number", type(None): "nothing"}
EXPECTED = {
    "model_type": "a mapping",
    "dict_type": "a mapping",
    "list_type": "a list",
    "tuple_type": "a list",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "a text",
    "bool_type": "true or false",
    "none_required": "null",
}
"""The expected value in YAML's words, by the type of pydantic's error."""


def read_yaml(path: Path) -> Any:
    """Read YAML 1.2 exactly as DVC does, so that `1e-4` is the number DVC recorded.

    Raises:
        ConfigError: If the file is missing or is not YAML, or is too large for parameters.
    """
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ConfigError(
                f"{path}: {size} bytes, expected at most {MAX_BYTES} of parameters; give the right "
                "file"
            )
        value = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except OSError as error:
        cure = "run the command in the directory that holds it"
        if isinstance(error, PermissionError):
            cure = "correct its permissions"
        raise ConfigError(f"{path}: {error.strerror}; {cure}") from error
    except (YAMLError, UnicodeDecodeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:MAX_REASON]
        raise ConfigError(f"{path}: not YAML ({reason}); correct the file") from error
    _check_extent(path, value)
    return value


def _check_extent(path: Path, value: Any) -> None:
    """Limit the number of values after expanding aliases: a few lines can mean billions of them."""
    waiting, count = [(value, 0)], 0
    while waiting:
        item, depth = waiting.pop()
        count += 1
        if count > MAX_VALUES or depth > MAX_DEPTH:
            raise ConfigError(
                f"{path}: with its aliases written out it has more than {MAX_VALUES} values or "
                f"{MAX_DEPTH} levels; write it without aliases"
            )
        if isinstance(item, (dict, list)):
            below = item.values() if isinstance(item, dict) else item
            waiting += [(part, depth + 1) for part in below]


def section(params: Path, key: str, kind: type[SectionType] | Any) -> Any:
    """Return the section of `params.yaml` at a dotted key; the whole file for an empty key.

    It is remembered for `check_unchanged`.

    Raises:
        ConfigError: If the section is missing, or a key of it is unknown or of another type; the
            message names file and key.
    """
    value = _read_section(params, key)
    _READ.setdefault((params, key), value)
    return validate(value, kind, file=params, key=key)


def forget_sections() -> None:
    """Forget the sections that an earlier command read."""
    _READ.clear()


def check_unchanged() -> None:
    """Raise if a section that this command read has been edited since.

    DVC reads `params.yaml` after a stage has ended. Without this check it would record the new
    values for an output made with the old ones, and never run the stage again.

    Raises:
        ConfigError: With the keys that changed, and both values of each.
    """
    for (params, key), before in _READ.items():
        try:
            now = _read_section(params, key)
        except ConfigError as error:
            raise ConfigError(
                f"{error}; the file changed while this command ran, and the result is not recorded"
            ) from error
        if now != before:
            raise ConfigError(
                f"{params}: changed while this command ran: {_changes(key, before, now)}; the "
                "result is not recorded: run the same command again, or undo the change first to "
                "go on from what was computed"
            )


def _changes(key: str, before: Any, now: Any) -> str:
    """List the keys whose values differ, with both values."""
    olds, news = ({_dotted(key, path): leaf for path, leaf in _leaves(v)} for v in (before, now))
    keys = [name for name in {**olds, **news} if olds.get(name) != news.get(name)]
    shown = [f"{k} (was {_short(olds, k)}, is {_short(news, k)})" for k in keys[:MAX_KEYS]]
    more = len(keys) - len(shown)
    return ", ".join([*shown, *([f"and {more} more"] if more else [])]) or key


def _short(values: dict[str, Any], key: str) -> str:
    text = repr(values[key]) if key in values else "missing"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"


def _check_names(params: Path, value: Any) -> None:
    """Refuse names that YAML does not read as text: `2024`, `true`, `null`.

    Files, DVC stages and commands use these names, and would differ from the file: 007 becomes 7.
    """
    for group in NAMED if isinstance(value, dict) else ():
        names = value.get(group)
        for name in names if isinstance(names, dict) else ():
            if not isinstance(name, str):
                kind = KINDS.get(type(name), type(name).__name__)
                raise ConfigError(
                    f"{params}: {group}: YAML reads a name as {kind}, {_text(name)}, expected "
                    "text; put the name in quotes, or choose one with a letter"
                )


def _read_section(params: Path, key: str) -> Any:
    """Return the plain value at a dotted key.

    Raises:
        ConfigError: If there is none.
    """
    value = read_yaml(params)
    _check_names(params, value)
    done: list[str] = []
    for part in key.split(".") if key else []:
        if not isinstance(value, dict) or part not in value:
            there = ", ".join(map(str, value)) if isinstance(value, dict) else "nothing"
            place = ".".join(done) or "the file"
            raise ConfigError(
                f"{params}: {place} has no {part!r}, it has {there or 'nothing'}; "
                "add it, or correct the name"
            )
        value = value[part]
        done.append(part)
    return value


def validate(value: Any, kind: Any, *, file: Path | str, key: str = "") -> Any:
    """Validate plain YAML values as JSON, without converting types: "1e-4" in quotes is a text.

    Args:
        value: What the YAML file holds.
        kind: A pydantic model or any type pydantic knows.
        file: Where the value comes from, for the message.
        key: The dotted key of `value` in the file; empty for all of it.

    Raises:
        ConfigError: For the key that best explains why the value is not valid.
    """
    adapter = TypeAdapter(kind)
    for path, leaf in _leaves(value):
        if isinstance(leaf, float) and not math.isfinite(leaf):
            raise ConfigError(
                f"{file}: {_dotted(key, path)}: found {leaf}, expected a finite number; correct it"
            )
        if isinstance(leaf, (dt.date, bytes)):
            raise ConfigError(
                f"{file}: {_dotted(key, path)}: YAML reads {leaf} as {type(leaf).__name__}; "
                "put it in quotes"
            )
    try:
        # Not sorted: reports list students in the order of the file.
        return adapter.validate_json(json.dumps(_text_keys(value)), strict=True)
    except ValidationError as error:
        problems = [
            (_resolve(found["loc"], value, found["type"]), found) for found in error.errors()
        ]
    # A union reports every alternative; the user most likely meant the one that got furthest. A
    # misspelt key is reported before the key that it leaves missing.
    deepest = max(len(path) for path, _ in problems)
    problems = [(path, found) for path, found in problems if len(path) == deepest]
    problems.sort(key=lambda problem: problem[1]["type"] != "extra_forbidden")
    path = problems[0][0]
    same = [found for other, found in problems if other == path]
    raise ConfigError(f"{file}: {_dotted(key, path)}: {_explain(same, adapter)}")


def _explain(problems: list[Any], adapter: TypeAdapter) -> str:
    """Return what was found, what was expected and what to do, for one key."""
    first = problems[0]
    match first["type"]:
        case "missing":
            return "missing; add it"
        case "extra_forbidden":
            name, names = str(first["loc"][-1]), _names(adapter)
            if name in names:
                return "unknown key here, though known elsewhere; move or remove it"
            close = difflib.get_close_matches(name, names, n=1)
            return f"unknown key; {f'did you mean {close[0]!r}?' if close else 'remove it'}"
        case "value_error":
            return first["msg"].removeprefix("Value error, ")
        case "union_tag_invalid" | "union_tag_not_found":
            context = first["ctx"]
            found = f"found {context['tag']!r}" if "tag" in context else "missing"
            expected = context.get("expected_tags", "the name of an alternative")
            return f"{context['discriminator'].strip(QUOTE)}: {found}, expected {expected}"
    expected = dict.fromkeys(_expected(problem) for problem in problems)
    found = f"{first['input']!r}"
    found = found if len(found) <= MAX_SHOWN else f"{found[:MAX_SHOWN]}…"
    hint = "; remove the quotes" if _is_quoted_number(first) else ""
    return f"found {found}, expected {' or '.join(expected)}{hint}"


def _expected(problem: Any) -> str:
    if problem["type"] == "literal_error":
        return problem["ctx"]["expected"]
    if problem["type"] in EXPECTED:
        return EXPECTED[problem["type"]]
    wanted = problem["msg"].removeprefix("Input should be ").removeprefix("Input should ")
    return f"a number {wanted}" if wanted.startswith(("greater", "less")) else wanted


def _is_quoted_number(problem: Any) -> bool:
    found = problem["input"]
    if problem["type"] not in {"int_type", "float_type"} or not isinstance(found, str):
        return False
    try:
        return found.isascii() and math.isfinite(float(found))
    except ValueError:
        return False


def _resolve(loc: tuple[Key, ...], value: Any, kind: str) -> tuple[Key, ...]:
    """Return the keys of the file in a pydantic location, without the names of union members."""
    path: list[Key] = []
    for position, part in enumerate(loc):
        is_last = position == len(loc) - 1
        if isinstance(value, dict) and part in _text_keys(value):
            value = _text_keys(value)[part]
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            value = value[part]
        elif not (is_last and kind == "missing"):
            continue
        path.append(part)
    return tuple(path)


def _text_keys(value: Any) -> Any:
    """Return the value with keys as JSON has them: YAML's may be numbers, which do not sort."""
    if isinstance(value, dict):
        return {_text(key): _text_keys(item) for key, item in value.items()}
    return [_text_keys(item) for item in value] if isinstance(value, (list, tuple)) else value


def _text(key: Any) -> str:
    if key is None:
        return "null"
    return str(key).lower() if isinstance(key, bool) else str(key)


def _leaves(value: Any, path: tuple[Key, ...] = ()) -> Iterator[tuple[tuple[Key, ...], Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, (*path, _text(key)))
    elif isinstance(value, list):
        for position, item in enumerate(value):
            yield from _leaves(item, (*path, position))
    else:
        yield path, value


def _names(adapter: TypeAdapter) -> list[str]:
    """Return every key a type knows, at any depth."""
    schema = adapter.json_schema()
    models = [schema, *schema.get("$defs", {}).values()]
    return sorted({name for model in models for name in model.get("properties", {})})


def _dotted(key: str, path: tuple[Key, ...]) -> str:
    return ".".join([*([key] if key else []), *map(str, path)]) or "the file"
