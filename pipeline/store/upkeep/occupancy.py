"""The bytes of a store on disk, by category."""

from collections import Counter
from pathlib import Path

FEATURES = ("hidden", "attention", "value", "logits")
"""Groups of `features.zarr` that hold features; the others hold text."""


def bytes_by_part(store: Path) -> dict[str, int]:
    """Return the bytes of all files of a store: features, text, each asset, and records.

    Links are not counted.
    """
    sizes: Counter[str] = Counter()
    for path in sorted(store.rglob("*")):
        if path.is_file() and not path.is_symlink():
            sizes[_category(path.relative_to(store))] += path.stat().st_size
    return dict(sizes)


def _category(path: Path) -> str:
    top, *below = path.parts
    if top == "features.zarr" and below and below[0] in FEATURES:
        return "features"
    if top == "features.zarr" and len(below) > 1:
        return "text"
    if top == "assets" and below:
        # `lm_head.safetensors` is one file, the tokenizer a directory.
        return Path(below[0]).stem
    return "records"
