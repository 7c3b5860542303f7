"""The files of a store other than arrays: statistics, tokenizer, configuration, head and blocks.

Only files that a record lists, with size and checksum, are handed out one by one. A directory of a
store is never used as such, as it may contain other files and links.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors

from pipeline.errors import IncompatibleError, IntegrityError
from pipeline.store.forms.form import Channels
from pipeline.store.layout import Layout
from pipeline.store.records import Declaration
from pipeline.store.shards import check_file, matches

MAX_TEXT_BYTES = 2**28
"""The most bytes of a tokenizer's file or a configuration; the largest known has 2^25."""
NO_TOKENIZER = frozenset({"config.json", "generation_config.json"})
WEIGHTS = frozenset({".safetensors", ".bin", ".pt", ".pth", ".pkl", ".ckpt", ".h5", ".msgpack"})
"""Suffixes of files that would be taken for the student's weights, or unpickled."""
MAX_HEADER_BYTES = 2**16
"""The most bytes of a statistics file in addition to its numbers."""


class Attachments:
    """The attachments of a store whose index and plan have been checked."""

    def __init__(self, layout: Layout, index: dict[str, Any], plan: dict[str, Any]) -> None:
        self._layout = layout
        self._assets: dict[str, dict[str, Any]] = index["assets"]
        prefix = f"{layout.assets.name}/"
        self._planned: dict[str, dict[str, int]] = {
            name.removeprefix(prefix): record
            for name, record in plan["files"].items()
            if name.startswith(prefix)
        }

    def channels(self, declaration: Declaration) -> Channels | None:
        """Return a signal's channel statistics in float32; None if it has none.

        Raises:
            IntegrityError: If the file is not the declared one, or not a file of statistics.
        """
        if declaration.channels is None:
            return None
        path = self._layout.channels(declaration.kind, declaration.layer)
        width = declaration.geometry.width
        _check_size(path, declaration.channels, 8 * width + MAX_HEADER_BYTES)
        data = check_file(path, self._layout.root, declaration.channels)
        try:
            tensors = load_safetensors(data)
            mean, deviation = tensors["mean"], tensors["deviation"]
        except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise _not_statistics(path, repr(error)[:200]) from error
        for values in (mean, deviation):
            if values.dtype != np.float32 or values.shape != (width,):
                raise _not_statistics(path, f"{values.dtype} {values.shape}, expected ({width},)")
        if not (np.isfinite(mean).all() and np.isfinite(deviation).all() and (deviation > 0).all()):
            raise _not_statistics(path, "a mean or deviation that no channel has")
        return Channels(mean, deviation)

    def asset(self, name: str) -> Path:
        """Return the path of an asset after checking its file.

        Raises:
            IncompatibleError: If it was not captured.
            IntegrityError: If it is missing or altered.
        """
        record = self._assets.get(name)
        if record is None:
            raise IncompatibleError(
                f"{self._layout.root}: no asset {name}; ask for it in the teacher's capture section"
            )
        path = self._layout.assets / record["file"]
        expected = {key: record[key] for key in ("bytes", "xxh3")}
        # Compares the size first: reading a sparse file of a terabyte would take hours.
        if not matches(path, self._layout.root, expected, verify=True):
            raise IntegrityError(
                f"{path}: not the asset that the index states; delete it and run capture again"
            )
        return path

    def teacher_config(self) -> dict[str, Any]:
        """Return the teacher's Hugging Face configuration.

        Raises:
            IntegrityError: If it is missing, altered, or not a JSON object.
        """
        name = "teacher/config.json"
        try:
            config = json.loads(self._read(name))
        except (ValueError, RecursionError) as error:
            raise IntegrityError(
                f"{self._layout.assets / name}: not readable as JSON ({error}); capture this store "
                "again"
            ) from error
        if not isinstance(config, dict):
            raise IntegrityError(
                f"{self._layout.assets / name}: {type(config).__name__}, expected an object; "
                "capture this store again"
            )
        return config

    def tokenizer(self) -> Path:
        """Return the directory of the teacher's tokenizer, which has exactly the files of the plan.

        Raises:
            IntegrityError: If a file is missing, altered, a link, or not listed.
        """
        directory = self._layout.assets / "tokenizer"
        listed = dict(self._tokenizer_files())
        for path in _files_below(directory):
            if path.relative_to(directory).as_posix() not in listed:
                raise IntegrityError(
                    f"{path}: not a file of the tokenizer that was captured; remove it"
                )
        for name in listed.values():
            self._read(name)
        return directory

    def copy_tokenizer(self, target: Path) -> None:
        """Write the files of the teacher's tokenizer into a directory, replacing no file.

        Raises:
            IntegrityError: If a file is missing or altered, or its name exists in the directory.
        """
        for relative, name in self._tokenizer_files():
            path = target / relative
            data = self._read(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with path.open("xb") as file:
                    file.write(data)
            except FileExistsError as error:
                raise IntegrityError(
                    f"{self._layout.assets / name}: would replace the student's {relative}; "
                    "capture this store again"
                ) from error

    def _tokenizer_files(self) -> Iterator[tuple[str, str]]:
        """Yield each file's path in the tokenizer and below `assets`."""
        for name in self._planned:
            if not name.startswith("tokenizer/"):
                continue
            relative = name.removeprefix("tokenizer/")
            if relative in NO_TOKENIZER or Path(relative).suffix in WEIGHTS:
                raise IntegrityError(
                    f"{self._layout.assets / name}: listed as a file of the tokenizer, which has "
                    "none of that name; capture this store again"
                )
            yield relative, name

    def _read(self, name: str) -> bytes:
        path = self._layout.assets / name
        expected = self._planned.get(name)
        if expected is None:
            raise IntegrityError(f"{path}: not in the store's plan; capture this store again")
        _check_size(path, expected, MAX_TEXT_BYTES)
        return check_file(path, self._layout.root, expected)


def _check_size(path: Path, record: dict[str, int], most: int) -> None:
    """Refuse a file by its recorded size, before it is read into memory."""
    if record["bytes"] > most:
        raise IntegrityError(
            f"{path}: its record claims {record['bytes']} bytes, expected at most {most}; capture "
            "this store again"
        )


def _files_below(directory: Path) -> Iterator[Path]:
    """Yield every entry that is not a directory, following no links."""
    try:
        with os.scandir(directory) as entries:
            ordered = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise IntegrityError(
            f"{directory}: cannot be read ({error.strerror}); capture this store again"
        ) from error
    for entry in ordered:
        if entry.is_dir(follow_symlinks=False):
            yield from _files_below(Path(entry.path))
        else:
            yield Path(entry.path)


def _not_statistics(path: Path, found: str) -> IntegrityError:
    return IntegrityError(
        f"{path}: not the mean and deviation of a signal's channels ({found}); delete it and run "
        "capture again"
    )
