"""Code that a model brings along: found by reading its configuration, before anything could run it.

transformers passes such code over in silence where it has an architecture of that name itself. The
weights may be meant for the other one, so here it is refused until somebody says which. A kernel of
the hub for its attention it would fetch and run without being asked at all.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from pipeline.provenance import file_sha256, fingerprint

ATTENTION = ("attn_implementation", "_attn_implementation")


def own_code(model: str, revision: str | None = None) -> list[str]:
    """Return the places of a model's own code, as its configuration names them.

    They are those of its `auto_map`, and kernels of the hub (`owner/name`) for its attention.
    Empty where there is none, and where there is no configuration: who loads it says so better.

    Args:
        model: A directory or a hub id.
        revision: Revision of a hub id.
    """
    try:
        config, _ = PreTrainedConfig.get_config_dict(model, revision=revision)
    except (OSError, ValueError):
        return []
    kernels = {place for key in ATTENTION for place in _places(config.get(key)) if "/" in place}
    return sorted({*_places(config.get("auto_map")), *kernels})


def code_sha256(directory: Path) -> str:
    """Return the SHA-256 over the digests of a model's Python files, in order of name."""
    files = sorted(directory.rglob("*.py"))
    return fingerprint({str(file.relative_to(directory)): file_sha256(file) for file in files})


def is_elsewhere(place: str) -> bool:
    """Tell whether code is in a repository other than the model's, which its revision is not of."""
    return "--" in place or "/" in place


def _places(value: Any) -> Iterator[str]:
    """Yield the strings of a map whose values may be lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _places(part)
    elif isinstance(value, list):
        for part in value:
            yield from _places(part)
