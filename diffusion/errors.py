"""Exceptions for the user, whose messages are one line, and checks of names and options."""

import difflib
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, get_type_hints

Errors = type[Exception] | tuple[type[Exception], ...]
"""What `except` takes."""


class UsageError(ValueError):
    """An error that the user can fix. Its message is one line that names the thing, its value, and what would be right.
    The commands print it to stderr and exit with code 2."""


class NotWritten(UsageError):
    """A file of a run could not be written: the disk is full, or permission is missing."""


class Stopped(Exception):
    """A signal has stopped a command, after saving. `code` is the exit code for it."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


class WorkerDied(RuntimeError):
    """A process that the run needed has died. The same command continues the run."""


@contextmanager
def prefixed(prefix: str) -> Iterator[None]:
    """Put the section or flag that the caller knows before the message of a UsageError."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{prefix}{error}") from None


@contextmanager
def refusing(message: Callable[[str], str], types: Errors = Exception) -> Iterator[None]:
    """Turn exceptions of some types into UsageErrors: `message` of what they say, in one line."""
    try:
        yield
    except types as error:
        raise UsageError(message(one_line(error))) from None


def did_you_mean(value: object, options: Collection[str], otherwise: str | None = None, cutoff: float = 0.6) -> str:
    """The nearest option to a value, for a message; if none is near, `otherwise`, by default a list of all."""
    near = difflib.get_close_matches(str(value), list(options), 1, cutoff)
    listed = f"there are {', '.join(options)}" if otherwise is None else otherwise
    return f"did you mean {near[0]}?" if near else listed


def check_name(what: str, value: object, options: Collection[str]) -> None:
    """Raise UsageError, with the nearest name, if `value` is not one of `options`."""
    if value not in options:
        hint = did_you_mean(value, options, otherwise="")
        raise UsageError(f"{what} is {value}; it must be one of {', '.join(options)}" + (f" ({hint})" if hint else ""))


def options_of(component: Callable[..., Any]) -> dict[str, Any]:
    """The options of a component, its keyword-only parameters, with their defaults."""
    return {p.name: p.default for p in inspect.signature(component).parameters.values() if p.kind is p.KEYWORD_ONLY}


def check_options(component: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Raise UsageError, which begins with the option's name, where a component does not take `options`.

    A value has the type of the option's default. A tuple in an `Annotated` type is the range of the values.
    """
    function: Any = vars(component)["__init__"] if isinstance(component, type) else component
    known, hints = options_of(component), get_type_hints(function, include_extras=True)
    for name, value in options.items():
        if name not in known:
            hint = did_you_mean(name, known, f"it has {', '.join(known) or 'none'}")
            raise UsageError(f"{name} is not an option of {component.__name__}: {hint}")
        kind = type(known[name])
        if not isinstance(value, (int, float) if kind is float else kind) or isinstance(value, bool) != (kind is bool):
            raise UsageError(f"{name} is {value}; it must be of type {kind.__name__}")
        for low, high in getattr(hints[name], "__metadata__", ()):
            if not low <= value <= high:
                raise UsageError(f"{name} is {value}; it must be from {low} to {high}")


def one_line(error: Exception) -> str:
    """The message of an exception, in one line of up to 200 characters."""
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
