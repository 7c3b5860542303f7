"""Parameters that a program changes as a person would: comments, order and quotes stay.

Nothing is written over a change that was made meanwhile.
"""

import dataclasses
import io
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.util import load_yaml_guess_indent

from pipeline.errors import ConfigError
from pipeline.planning.budget import Request, Rung
from pipeline.provenance import write_bytes_atomically
from pipeline.store.forms.form import Form, options
from stages.parameters import validate
from stages.sections.capture import CaptureParams

logger = logging.getLogger(__name__)
WIDTH = 110


def write_capture(params: Path, teacher: str, rungs: Mapping[str, Rung], *, seen: bytes) -> None:
    """Write what is to be captured of a teacher into the file of parameters.

    Args:
        params: The file.
        teacher: The teacher's name.
        rungs: What is chosen, by kind; a kind whose rung gives nothing up stays as it is written.
        seen: What the file held when it was read.

    Raises:
        ConfigError: If the file was changed meanwhile, or what comes of it would be no parameters.
        ResourceError: If it cannot be written.
    """
    text = seen.decode("utf-8")
    _, indent, offset = load_yaml_guess_indent(text)
    yaml = YAML()
    yaml.width = WIDTH
    yaml.preserve_quotes = True
    yaml.indent(mapping=2, sequence=indent or 4, offset=2 if offset is None else offset)
    values = yaml.load(text)
    capture = values["teachers"][teacher]["capture"]
    for kind, rung in rungs.items():
        if rung.words:
            _replace(capture, kind, rung.requests)
    buffer = io.StringIO()
    yaml.dump(values, buffer)
    written = buffer.getvalue()
    again = YAML(typ="safe", pure=True).load(written)
    validate(
        again["teachers"][teacher]["capture"],
        CaptureParams,
        file=params,
        key=f"teachers.{teacher}.capture",
    )
    for line in _comments(text) - _comments(written):
        logger.warning("%s: the comment %r went with what was left out", params, line)
    if params.read_bytes() != seen:
        raise ConfigError(
            f"{params}: changed while its plan was made; expected it as it was read, run the same "
            "command again"
        )
    write_bytes_atomically(params, written.encode("utf-8"))


def _comments(text: str) -> set[str]:
    return {line.strip() for line in text.splitlines() if line.lstrip().startswith("#")}


def _replace(capture: Any, kind: str, requests: Sequence[Request]) -> None:
    """Put requests in the place of a kind's entry; one of one form is changed key by key."""
    if not requests:
        capture.pop(kind, None)
        return
    entry: Any = capture.get(kind)
    if len(requests) > 1 or not isinstance(entry, CommentedMap):
        capture[kind] = [_entry(request) for request in requests]
        return
    wanted = _entry(requests[0])
    for key in [key for key in entry if key not in wanted]:
        del entry[key]
        if key in entry.ca.items:
            entry.ca.items.setdefault("form", entry.ca.items.pop(key))
    for key, value in wanted.items():
        if key not in entry or entry[key] != value:
            entry[key] = _flow(entry.get(key), value)


def _flow(before: Any, value: Any) -> Any:
    """Return a list that is written as the one before it; a new one on one line."""
    if not isinstance(value, list):
        return value
    found = CommentedSeq(value)
    if not isinstance(before, CommentedSeq):
        found.fa.set_flow_style()
        return found
    if before.fa.flow_style():
        found.fa.set_flow_style()
    found.ca.comment, found.ca.end = before.ca.comment, before.ca.end
    for place, comment in sorted(before.ca.items.items()):
        # What stands behind the last entry often speaks of the next key.
        found.ca.items[min(place, len(value) - 1)] = comment
    return found


def _entry(request: Request) -> dict[str, Any]:
    form = request.form
    entry: dict[str, Any] = {}
    if request.kind != "logits":
        entry["layers"] = list(request.layers)
    entry["form"] = form.name
    return entry | {key: value for key, value in options(form).items() if _is_chosen(form, key)}


def _is_chosen(form: Form, key: str) -> bool:
    """Tell whether an option is not its default, or is what the form is about."""
    fields = {one.name: one for one in dataclasses.fields(form)}  # pyright: ignore[reportArgumentType]
    return key in ("k", "n", "temperatures") or getattr(form, key) != fields[key].default
