"""Reads users' files, with one-line errors that name the file, and writes directories atomically.

A file whose name ends in .gz is decompressed. A directory is written under a temporary name next
to its destination and then renamed.
"""

import gzip
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from pipeline.corpus.text.examples import Split
from pipeline.errors import ConfigError, ResourceError
from pipeline.provenance import fsync_directory, unfinished_name

Patterns = str | tuple[str, ...]
Files = Patterns | dict[Split, Patterns]


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """Open a UTF-8 text file, plain or gzip, without translating line ends.

    A leading byte-order mark is dropped. Read errors raised in the `with` body name the file.

    Raises:
        ConfigError: If the file cannot be opened, unpacked or decoded.
    """
    try:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            yield file
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: byte {error.start} of a block is {error.object[error.start]:#04x}, "
            "expected UTF-8; convert the file"
        ) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ConfigError(
            f"{path}: not a whole gzip file ({error}); the name promises gzip, fetch it again"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror or error}); expected a readable text file"
        ) from error


def refuse_zero_bytes(content: str, path: Path) -> None:
    """Refuse binary content, recognised by a zero byte.

    Raises:
        ConfigError: If there is a zero byte; names the file and the line.
    """
    if "\0" in content:
        line = content[: content.index("\0")].count("\n") + 1
        raise ConfigError(
            f"{path}: line {line} holds a zero byte, expected text; correct it, or leave the file "
            "out of corpus.source"
        )


def _matches(pattern: str, root: Path) -> list[Path]:
    """Expand one glob pattern to files.

    A plain path is returned even if it does not exist: the error comes from reading it. An
    existing file whose name looks like a pattern, such as `reviews [2024].tsv`, is that file.
    """
    if not any(sign in pattern for sign in "*?[") or (root / pattern).exists():
        return [root / pattern]
    base, rest = root, list(Path(pattern).parts)
    while len(rest) > 1 and (base / rest[0]).is_dir():
        base /= rest.pop(0)
    return sorted(path for path in base.glob(str(Path(*rest))) if path.is_file())


def resolve_files(
    files: Files, *, root: Path, key: str = "corpus.source.files"
) -> list[tuple[Split | None, str, Path]]:
    """Expand names and globs, relative to `root`, to files in a fixed order without repeats.

    Args:
        files: Names and globs, either per split or without splits.
        root: Directory that they are relative to.
        key: Name of the parameter, for errors; `{split}` in it is replaced by the split.

    Returns:
        Split (None where the source names none), name relative to `root`, and path of each file.

    Raises:
        ConfigError: If a pattern matches nothing or a file belongs to two splits.
    """
    by_split: dict[Split | None, Patterns]
    by_split = dict(files.items()) if isinstance(files, dict) else {None: files}
    resolved: dict[Path, tuple[Split | None, str, Path]] = {}
    for split, patterns in by_split.items():
        for pattern in (patterns,) if isinstance(patterns, str) else patterns:
            paths = _matches(pattern, root)
            if not paths:
                raise ConfigError(
                    f"{_key_of(key, split)}: {pattern!r} matches no file under {root}; "
                    "expected at least one, correct the pattern"
                )
            for path in paths:
                name = Path(os.path.relpath(path, root)).as_posix()
                first = resolved.setdefault(path.resolve(), (split, name, path))
                if first[0] != split:
                    raise ConfigError(
                        f"{_key_of(key, split)}: {name} stands in the splits {first[0]} and "
                        f"{split}; expected each file in one split, remove it from the other"
                    )
    return list(resolved.values())


def _key_of(key: str, split: Split | None) -> str:
    if "{split}" in key:
        return key.format(split=split)
    return f"{key}.{split}" if split else key


def refuse_empty(
    files: Files, splits_read: set[Split | None], *, key: str = "corpus.source.files"
) -> None:
    """Refuse a split that `files` names but that has no examples.

    Args:
        files: Names and globs, either per split or without splits.
        splits_read: Splits of the examples read; None for examples without a split.
        key: Name of the parameter, for errors.

    Raises:
        ConfigError: If there is one; names the split, if the source has splits.
    """
    for split in files if isinstance(files, dict) else (None,):
        if split not in splits_read:
            raise ConfigError(
                f"{_key_of(key, split)}: the files hold no text, expected at least one example; "
                "correct the names"
            )


@contextmanager
def directory_written_whole(output: Path) -> Iterator[Path]:
    """Yield a temporary directory next to `output` and rename it to `output` on success.

    An existing `output` is replaced on success and left unchanged on error. A process killed
    during the replacement may leave no `output`, but never a partial one.

    Raises:
        ResourceError: If the file system refuses, for example because no space is left.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = output.with_name(unfinished_name(output))
        temporary.mkdir()
        try:
            yield temporary
            for path in temporary.rglob("*"):
                if path.is_file():
                    with path.open("rb") as file:
                        os.fsync(file.fileno())
            if output.exists():
                # POSIX cannot exchange two directories portably: between the two renames a kill
                # leaves no output, which reads as "not made yet", never as half of one.
                replaced = output.with_name(unfinished_name(output))
                replaced.mkdir()
                output.rename(replaced / "old")
                temporary.rename(output)
                shutil.rmtree(replaced)
            else:
                temporary.rename(output)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        fsync_directory(output.parent)
    except OSError as error:
        raise ResourceError(
            f"{output}: cannot be written ({error.strerror or error}); free space or fix "
            "permissions, then run the same command again"
        ) from error
