"""The exceptions that are meant for the person at the keyboard, and how others are told to them."""


class UsageError(ValueError):
    """Something the user can put right: its message is one line that names the thing, the value,
    and what would be right. The scripts print it to stderr and exit with code 2."""


class Stopped(Exception):
    """A signal has ended a run, which is saved. `code` is what a shell expects of a process that the signal ended."""

    def __init__(self, signal_name: str, code: int, step: int):
        super().__init__(f"stopped by {signal_name} after step {step}, which is saved: the same command continues")
        self.code = code


class Died(RuntimeError):
    """A process that the run needed has ended. Not the user's fault: the same command continues."""


def in_short(error: Exception) -> str:
    """What an exception says, in one line of up to 200 characters."""
    if isinstance(error, FileExistsError):
        return "it is a file"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:200] or type(error).__name__


def printable(text: str) -> str:
    """A text for a terminal: the line breaks and control characters that a file's name may hold are spelled out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
