"""Reading and writing whole files: a user's file that cannot be read is one line that names it.

Gzip is recognised by the name. Directories are written beside their place and renamed into it.
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
    """Open a UTF-8 text file, plain or gzip, with its line ends untouched.

    A byte-order mark at the start is left out. Reading errors in the `with` body are reported
    as the file's.

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
    """Refuse what is no text.

    Raises:
        ConfigError: Naming the file and the line.
    """
    if "\0" in content:
        line = content[: content.index("\0")].count("\n") + 1
        raise ConfigError(
            f"{path}: line {line} holds a zero byte, expected text; correct it, or leave the file "
            "out of corpus.source"
        )


def _matches(pattern: str, root: Path) -> list[Path]:
    """Expand one pattern; a plain path is itself, there or not, so that reading names it.

    What exists under a name with signs of a pattern, as `reviews [2024].tsv`, is that name.
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
        files: Names and globs, of each split or of none.
        root: What they are relative to.
        key: The parameter that holds them, for errors; `{split}` in it is the split.

    Returns:
        Split (None where the source names none), name relative to `root`, and path of each file.

    Raises:
        ConfigError: If a pattern matches nothing or a file stands in two splits.
    """
    by_split: dict[Split | None, Patterns]
    by_split = dict(files.items()) if isinstance(files, dict) else {None: files}
    found: dict[Path, tuple[Split | None, str, Path]] = {}
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
                known = found.setdefault(path.resolve(), (split, name, path))
                if known[0] != split:
                    raise ConfigError(
                        f"{_key_of(key, split)}: {name} stands in the splits {known[0]} and "
                        f"{split}; expected each file in one split, remove it from the other"
                    )
    return list(found.values())


def _key_of(key: str, split: Split | None) -> str:
    if "{split}" in key:
        return key.format(split=split)
    return f"{key}.{split}" if split else key


def refuse_empty(
    files: Files, found: set[Split | None], *, key: str = "corpus.source.files"
) -> None:
    """Refuse a split that is named in `files` and gave no example.

    Raises:
        ConfigError: Naming the split; without splits, the whole source.
    """
    for split in files if isinstance(files, dict) else (None,):
        if split not in found:
            raise ConfigError(
                f"{_key_of(key, split)}: the files hold no text, expected at least one example; "
                "correct the names"
            )


@contextmanager
def directory_written_whole(output: Path) -> Iterator[Path]:
    """Give a temporary sibling of `output` to write into, and rename it into place at the end.

    After an error or a kill `output` holds what it held before. What stood there is replaced.

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
