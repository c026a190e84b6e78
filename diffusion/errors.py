"""The exceptions that are meant for the person at the keyboard, and how others are told to them."""


class UsageError(ValueError):
    """Something the user can put right: its message is one line that names the thing, the value,
    and what would be right. The scripts print it to stderr and exit with code 2."""


class NotWritten(UsageError):
    """A file of a run could not be written, for want of room or permission."""


class Stopped(Exception):
    """A signal has ended a command, whose work is saved. `code` is what a shell expects of a process so ended."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


class WorkerDied(RuntimeError):
    """A process that the run needed has ended. Not the user's fault: the same command continues."""


def one_line(error: Exception) -> str:
    """What an exception says, in one line of up to 200 characters."""
    if isinstance(error, FileExistsError):
        return "it is a file"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:200] or type(error).__name__


def escape_control(text: str) -> str:
    """A text for a terminal: the line breaks and control characters that a file's name may hold are spelled out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
