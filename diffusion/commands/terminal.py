"""What the commands share: the parser, lines and bars on a terminal, and exit codes."""

import argparse
import io
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, NoReturn, TextIO

import torch
from tqdm import tqdm

from diffusion.config.files import parse_value
from diffusion.errors import Stopped, UsageError, WorkerDied, escape_control, one_line, prefixed, refusing
from diffusion.parallel.cores import CORES
from diffusion.run.loaded import Run, load_run
from diffusion.samplers import SAMPLERS


def non_empty_path(text: str) -> Path:
    """An argparse type for paths. An empty one, such as an unset shell variable, is an error."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty")
    return Path(text)


def number_from(least: int) -> Callable[[str], int]:
    """An argparse type for whole numbers of at least `least`."""

    def number(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= 10**9:
            raise argparse.ArgumentTypeError(f"it is {text}; it must be a whole number from {least} to 10^9")
        return int(text)

    return number


def steps(text: str) -> Any:
    """An argparse type for the steps of a process: a count, sections, a placement, or a list."""
    return parse_value(text, "--steps") if text else text


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def open_run(path: Path, ema: str | None = None) -> Run:
    """`load_run`, with a warning for each damaged checkpoint."""
    run = load_run(path, ema)
    for _, damage in run.saved.passed_over:
        print_line(f"{os.path.basename(sys.argv[0])}: {damage}; {run.path.name} is used", error=True)
    return run


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how images are drawn (see `sampling_as`)."""
    add = parser.add_argument
    add("--sampler", choices=SAMPLERS, help="default: as in the run's grids")
    add("--guidance", type=float, help="guidance: 1 none, above 1 clearer classes, 0 no class (default: the grids')")
    text = "run or checkpoint that guides: a worse one of the same data (default: this network without conditions)"
    add("--guide", type=non_empty_path, help=text)
    add("--guide_ema", help="which moving average guides, or none: of --guide, else of --ckpt's own checkpoint")
    text = "noise levels sigma / alpha that are guided, such as '[0.3, 5]' (default: the grids', usually all)"
    add("--guide_between", type=lambda text: parse_value(text or "''", "--guide_between"), help=text)


def sampling_as(run: Run, args: argparse.Namespace, **flags: Any) -> Run:
    """A run with the flags of `add_sampling`, and others. Raises UsageError where they do not fit."""
    named = [name for name in ("guide", "guide_ema", "guide_between") if getattr(args, name) is not None]
    if named and args.guidance is None and run.config.sample.guidance == 1:
        raise UsageError(f"--{named[0]} is set, and --guidance is 1, which is none: add --guidance 2")
    if args.guide is not None or args.guide_ema is not None:
        with prefixed("the guide: "):
            flags["guide"] = open_run(args.guide or run.path, args.guide_ema)
    return run.with_sampling(sampler=args.sampler, guidance=args.guidance, guide_between=args.guide_between, **flags)


def check_writable(folder: Path, flag: str) -> None:
    """Raise UsageError, with the flag, if no file can be written into `folder`, or it cannot be created."""
    with refusing(lambda reason: f"{flag} cannot be written: {reason}", OSError):
        tempfile.TemporaryFile(dir=next(path for path in (folder, *folder.parents) if os.path.lexists(path))).close()


def check_output(path: Path, flag: str, suffix: str, ours: Callable[[Path], bool] = lambda path: False) -> None:
    """Raise UsageError, with the flag, if a command may not write a file: it has another suffix, or is there already
    and was not written by the same command, as `ours` tells."""
    if path.suffix != suffix or path.is_dir():
        raise UsageError(f"{flag} is {path}; it must be a {suffix} file")
    if os.path.lexists(path) and not (path.is_file() and ours(path)):
        raise UsageError(f"{flag} {path} is there already: name another, or remove it")
    check_writable(path.parent, f"{flag} {path}")


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
    tqdm.write(escape_control(text), file=_Unbreakable(sys.stderr if error else sys.stdout))


def progress_bar(total: int, shown: bool, done: int = 0) -> tqdm:
    """A bar of `total` steps on stderr, if `shown`."""
    # Fewer lines in a log file.
    looks: dict[str, Any] = {"unit": "step", "dynamic_ncols": True, "mininterval": 0.5 if sys.stderr.isatty() else 30}
    return tqdm(total=total, initial=done, disable=not shown, file=_Unbreakable(sys.stderr), **looks)


def advance(bar: tqdm, steps: Iterable[int]) -> Iterator[int]:
    """Iterate over steps, advancing the bar after each, and say what slows them down; with the bar bound, a sampler's
    `progress`."""
    for step in steps:
        yield step
        bar.update()
        if not bar.disable and (news := CORES.news()):
            print_line(f"{os.path.basename(sys.argv[0])}: {news}", error=True)


def exit_code(main: Callable[[], None]) -> int:
    """Run `main` and return its exit code: 0; 2 after a user error, printed in one line; 128 + the number of a
    signal."""
    name, rank = os.path.basename(sys.argv[0]), os.environ.get("RANK", "0")
    with suppress(PackageNotFoundError):
        distribution("diffusion")
        print_line(f"{name}: PyPI's diffusion has the same import name: pip uninstall diffusion", error=True)
        return 2
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # paths may have characters that the terminal lacks
    try:
        main()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # Otherwise its threads sometimes abort the interpreter at exit.
            torch.distributed.destroy_process_group()
    except (UsageError, WorkerDied) as error:
        process = f" [rank {rank}]" if torch.distributed.is_initialized() else ""
        print_line(f"{name}{process}: {error}", error=True)
        return 2 if isinstance(error, UsageError) else 1
    except Stopped as stopped:
        if rank == "0":
            print_line(f"{name}: {stopped}", error=True)
        return stopped.code
    except OSError as error:
        where = "" if error.filename is None else f": {error.filename}"
        print_line(f"{name}: {error.strerror or error}{where}", error=True)
        return 2
    except RuntimeError as error:
        from_others = isinstance(error, torch.distributed.DistError) or "gloo" in str(error)
        if not torch.distributed.is_initialized() or not from_others:
            raise
        reason = f"another process of this run ended; its own message says why ({one_line(error)})"
        print(f"{name} [rank {rank}]: {reason}", file=sys.stderr, flush=True)
        os._exit(1)  # a normal exit would wait for the processes that are gone
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted", file=sys.stderr)
        return 130
    return 0
