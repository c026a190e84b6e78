"""Exceptions for the user, and one-line messages."""

import difflib
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager


class UsageError(ValueError):
    """An error that the user can fix. Its message is one line that names the thing, its value, and what would be right.
    The commands print it to stderr and exit with code 2."""


def one_of(value: object, options: Iterable[str]) -> str:
    """The options for a value in a message, with the nearest one."""
    near = difflib.get_close_matches(str(value), list(options), n=1)
    return f"one of {', '.join(options)}" + (f" (did you mean {near[0]}?)" if near else "")


@contextmanager
def prefixed(prefix: str) -> Iterator[None]:
    """Put the section or flag that the caller knows before the message of a UsageError."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{prefix}{error}") from None


def did_you_mean(value: str, options: Collection[str], otherwise: str = "there are") -> str:
    """The nearest option to a value in a message, or all of them."""
    near = difflib.get_close_matches(value, list(options), n=1)
    return f"did you mean {near[0]}?" if near else f"{otherwise} {', '.join(options)}"


def check_name(what: str, value: object, options: Collection[str]) -> None:
    """Raise UsageError, with the nearest name, if `value` is not one of `options`."""
    if value not in options:
        raise UsageError(f"{what} is {value}; it must be {one_of(value, options)}")


class NotWritten(UsageError):
    """A file of a run could not be written: the disk is full, or permission is missing."""


class Stopped(Exception):
    """A signal has stopped a command, after saving. `code` is the exit code for it."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


class WorkerDied(RuntimeError):
    """A process that the run needed has died. The same command continues the run."""


def one_line(error: Exception) -> str:
    """The message of an exception, in one line of up to 200 characters."""
    if isinstance(error, FileExistsError):
        return "it is a file"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:200] or type(error).__name__


def name_some(names: Sequence[str], what: str) -> str:
    """How many things there are, and the first five of them."""
    more = f"; and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{len(names)} {what}: {'; '.join(names[:5])}{more}"


def escape_control(text: str) -> str:
    """Escape line breaks and control characters, which file names may contain."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
