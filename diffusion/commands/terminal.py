"""What the commands share: the parser, lines and bars on a terminal, and exit codes."""

from __future__ import annotations

import argparse
import difflib
import io
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO

import torch
from torch import Tensor
from tqdm import tqdm

from diffusion.errors import Stopped, UsageError, WorkerDied, escape_control, one_line, prefixed
from diffusion.files.atomic import check_no_dangling_link
from diffusion.run.checkpoint import Checkpoint, open_weights
from diffusion.run.folder import check_is_run, check_not_a_runs


def non_empty_path(text: str) -> Path:
    """An argparse type for paths. An empty one, such as an unset shell variable, is an error."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty")
    return Path(text)


def check_counts(args: argparse.Namespace) -> None:
    """Raise UsageError if `--n`, `--batch_size` or `--seed` is out of range."""
    for name, value, least in (("n", args.n, 1), ("batch_size", args.batch_size, 1), ("seed", args.seed, 0)):
        if value is not None and not least <= value <= 10**9:
            right = f"at least {least}" if value < least else "at most 10^9"
            raise UsageError(f"--{name} is {value}; it must be {right}")


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def open_run(path: Path, ema: str | None = None) -> tuple[Checkpoint, dict[str, Tensor]]:
    """`open_weights`, with a warning for each damaged checkpoint. Raises UsageError if `path` only lies in a run or
    checkpoint, with the path to name instead."""
    check_is_run(path)
    saved, weights = open_weights(path, ema)
    for _, damage in saved.passed_over:
        print_line(f"{os.path.basename(sys.argv[0])}: {damage}; {saved.path.name} is used", error=True)
    return saved, weights


def check_writable(folder: Path, flag: str) -> None:
    """Raise UsageError, with the flag, if no file can be written into `folder`, or it cannot be created."""
    try:
        check_no_dangling_link(folder)
        there = next(path for path in (folder, *folder.parents) if path.exists())
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise UsageError(f"{flag} cannot be written: {one_line(error)}") from None


def check_output(
    path: Path, flag: str, suffix: str = "", ours: Callable[[Path], bool] | None = None, instead: str = ""
) -> None:
    """Raise UsageError, with the flag, if a command may not write a file: it belongs to a run, has another suffix, or
    is there already and was not written by the same command, as `ours` tells."""
    with prefixed(f"{flag} {path} "):
        check_not_a_runs(path)
        if path.is_dir():
            raise UsageError(f"is a folder: name a {suffix or '.json'} file{instead}")
        if path.suffix != (suffix or path.suffix):
            raise UsageError(f"must end in {suffix}")
        if path.is_fifo() and not str(path).startswith("/dev/"):
            raise UsageError("is a pipe: name a file")
        if len(os.fsencode(path.name)) > 200:
            raise UsageError("has too long a name: take one of up to 200 bytes")
        if path.is_symlink() and not path.exists():
            raise UsageError(f"is a broken link ({os.readlink(path)})")
        if path.is_file() and not (ours and ours(path)):
            raise UsageError(f"is there already{', not from this command' if ours else ''}: name another, or remove it")
    check_writable(path.parent, f"{flag} {path}")


def choose_labels(saved: Checkpoint, wanted: str | None) -> list[int] | None:
    """The class numbers to generate in turn; None for a model without classes."""
    names = saved.class_names
    if not names:
        if wanted is not None:
            raise UsageError(f"--classes is {wanted}, but the model of {saved.path} has no classes")
        return None
    if wanted is None:
        return list(range(len(names)))
    labels = []
    for word in wanted.split(","):
        if word in names:
            labels.append(names.index(word))
        elif word.isdecimal() and word.isascii() and len(word) < 10 and int(word) < len(names):
            labels.append(int(word))
        else:
            near = [] if word.isdecimal() else difflib.get_close_matches(word, names, n=3)
            more = f" and {len(names) - 10} more" if len(names) > 10 else ""
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names[:10])}{more}"
            right = f"a class name or a number from 0 to {len(names) - 1}"
            raise UsageError(f"--classes has {word!r}, which is not {right}: {hint}")
    return labels


class _Unbreakable:
    """A stream for progress: a full disk or a closed pipe does not end the run."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> None:
        with suppress(OSError):
            self._stream.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def print_line(text: str, error: bool = False) -> None:
    """Print a line to stdout, or to stderr beside a bar. A closed stream does not end the run."""
    line = "\n" * text.startswith("\n") + escape_control(text.lstrip("\n"))
    tqdm.write(line, file=_Unbreakable(sys.stderr if error else sys.stdout))


def progress_bar(total: int, shown: bool, done: int = 0) -> tqdm:
    """A bar of `total` steps on stderr, if `shown`."""
    interval = 0.5 if sys.stderr.isatty() else 30  # fewer lines in a log file
    return tqdm(total=total, initial=done, unit="step", disable=not shown, dynamic_ncols=True, mininterval=interval,
                file=_Unbreakable(sys.stderr))  # fmt: skip


def advance(bar: tqdm, steps: Iterable[int]) -> Iterator[int]:
    """Iterate over steps, advancing the bar after each; with the bar bound, a sampler's `progress`."""
    for step in steps:
        yield step
        bar.update()


def _open_standard_streams() -> None:
    """Open standard streams that were closed (`>&-`): otherwise output would go to the next file that is opened."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if number == 0 else "w"))  # noqa: SIM115


def exit_code(main: Callable[[], None]) -> int:
    """Run `main` and return its exit code: 0; 2 after a user error, printed in one line; 128 + the number of a
    signal."""
    name = os.path.basename(sys.argv[0])
    _open_standard_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # paths may have characters that the terminal lacks
    try:
        main()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # Otherwise its threads sometimes abort the interpreter at exit.
            torch.distributed.destroy_process_group()
    except UsageError as error:
        rank = f" [rank {os.environ['RANK']}]" if torch.distributed.is_initialized() else ""
        print_line(f"{name}{rank}: {error}", error=True)
        return 2
    except Stopped as stopped:
        if int(os.environ.get("RANK", 0)) == 0:
            print_line(f"\n{name}: {stopped}", error=True)
        return stopped.code
    except OSError as error:
        where = "" if error.filename is None else f": {error.filename}"
        print_line(f"{name}: {error.strerror or error}{where}", error=True)
        return 2
    except WorkerDied as error:
        print_line(f"{name}: {error}", error=True)
        return 1
    except RuntimeError as error:
        others = isinstance(error, torch.distributed.DistError) or "gloo" in str(error)
        if not torch.distributed.is_initialized() or not others:
            raise
        print(f"{name} [rank {os.environ['RANK']}]: another process of this run ended: its own message, if it had time "
              f"for one, says why ({one_line(error)})", file=sys.stderr, flush=True)  # fmt: skip
        os._exit(1)  # a normal exit would wait for the processes that are gone
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted", file=sys.stderr)
        return 130
    return 0
