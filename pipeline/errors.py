"""Errors a user can act on: one line that says what was found, what was expected and what to do.

The exit code of each class is part of the command line's contract.
"""

from collections.abc import Sequence

OUT_OF_MEMORY = (
    "allocate memory",
    "not enough memory",
    "out of memory",
    "STATUS_ALLOC_FAILED",
)
"""Words of torch's plain RuntimeErrors for a failed allocation: on a CPU, in pinned memory, and for
handles of cuBLAS and cuDNN, which torch's own allocator does not provide."""


class DecantError(Exception):
    """Base of every error that is reported as one line instead of a traceback."""

    exit_code: int = 1


class ConfigError(DecantError):
    """A parameter, path or source is wrong; nothing expensive has started."""

    exit_code = 2


class IntegrityError(DecantError):
    """Stored bytes are missing, short, altered or not finite; no value of them was used."""

    exit_code = 3


class IncompatibleError(DecantError):
    """Two good things do not fit: teacher and form, store and student, tokenizer and corpus."""

    exit_code = 4


class ResourceError(DecantError):
    """Disk, memory or a lock is not to be had; what was written stays valid."""

    exit_code = 5


class ManyFoundError(DecantError):
    """Errors that were found at once, each of them a line of its own; the first decides the code.

    Args:
        errors: At least one.
    """

    def __init__(self, errors: Sequence[DecantError]) -> None:
        super().__init__("; ".join(map(str, errors)))
        self.errors = tuple(errors)
        self.exit_code = errors[0].exit_code


class Interrupted(KeyboardInterrupt):
    """Work was ended by a signal after its state had been saved.

    Args:
        keeps: What the same command does when it is run again, to follow "the same command".
        exit_code: 128 plus the signal's number.
    """

    def __init__(self, keeps: str, exit_code: int) -> None:
        super().__init__(f"interrupted; the same command {keeps}")
        self.exit_code = exit_code


def in_short(error: BaseException) -> str:
    """Return, as the start of one line, what another library's error says, or else is called."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that an allocation failed; torch is not imported for it."""
    if isinstance(error, MemoryError):
        return True
    # torch.OutOfMemoryError is a RuntimeError; its text need not have the words.
    names = {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, RuntimeError) and (
        "OutOfMemoryError" in names or any(words in str(error) for words in OUT_OF_MEMORY)
    )
