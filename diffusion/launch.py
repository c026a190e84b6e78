"""What the launchers get wrong on a CPU, and the scripts' way to end."""

from __future__ import annotations

import argparse
import dataclasses
import io
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO

import psutil
import torch
from torch import Tensor
from tqdm import tqdm

from diffusion.checkpoint import Checkpoint, open_weights
from diffusion.config import Config
from diffusion.errors import Died, Stopped, UsageError, in_short, printable
from diffusion.files import check_no_dangling_link
from diffusion.run_folder import check_is_run

SWITCHES = [f"ACCELERATE_{name}" for name in (
    "USE_CPU", "USE_FSDP", "USE_DEEPSPEED", "USE_MEGATRON_LM", "USE_SAGEMAKER", "USE_PARALLELISM_CONFIG", "DEBUG_MODE",
    "CPU_AFFINITY", "DYNAMO_USE_FULLGRAPH", "DYNAMO_USE_DYNAMIC")] + ["FORK_LAUNCHED"]  # fmt: skip
"""What accelerate reads as true or false, some of it only in the first step."""


def a_path(text: str) -> Path:
    """The type of an argument that is a path: an empty one, such as an unset shell variable, is an error."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty")
    return Path(text)


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def check_launcher() -> None:
    """Use the cores that `accelerate launch` hides; raise UsageError where it started too few processes."""
    for name in SWITCHES:
        value = os.environ.get(name, "false")
        if value.lower() not in ("true", "false", "1", "0", "yes", "no", "on", "off", "y", "n", "t", "f", "none"):
            raise UsageError(f"the environment has {name}={value}; it must be true or false")
    _rejoin()
    if "ACCELERATE_MIXED_PRECISION" not in os.environ or "WORLD_SIZE" in os.environ:
        return  # not started by it, or as one of several processes
    asked = re.search(r"--num[_-]processes[= ](\d+)", " ".join(_launchers_command()))
    if asked and int(asked[1]) > 1:
        raise UsageError(
            f"accelerate launch starts one process without GPUs, not {asked[1]}: "
            f"use torchrun --nproc_per_node {asked[1]} {os.path.basename(sys.argv[0])} ..."
        )
    if os.environ.get("OMP_NUM_THREADS") == "1":  # its default, which would leave every other core idle
        torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def _launchers_command() -> list[str]:
    """The command line of the process that started this one, if it may be read."""
    try:
        return psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return []


def with_launchers_settings(config: Config) -> Config:
    """The configuration, with what `accelerate launch`, its configuration file or its environment was told where
    `config` leaves it open (null). Raises UsageError where the two differ, and for what this trainer does not know."""
    if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG") == "true":
        for size in ("TP_SIZE", "CP_SIZE", "SP_SIZE"):
            if (value := os.environ.get(f"PARALLELISM_CONFIG_{size}", "1")) != "1":
                raise UsageError(
                    f"the launcher was told parallelism_config_{size.lower()} {value}, which is not known here: to "
                    "shard a network, use configs/accelerate/fsdp2.yaml"
                )
    told = _launchers_settings()
    taken = {}
    for name, (flag, value) in told.items():
        mine = getattr(config.train, name)
        if mine is None:
            taken[name] = value
        elif mine != value:
            raise UsageError(
                f"train.{name} is {mine}, and the launcher was told {flag} {value}: give both the same value, or leave "
                "one of them out"
            )
    train = dataclasses.replace(config.train, **taken)
    return dataclasses.replace(config, train=train)


def _launchers_settings() -> dict[str, tuple[str, Any]]:
    """What a launcher was told, by the field of `TrainConfig` that it belongs to: its flag's name and the value."""
    environment, arguments = os.environ, argparse.Namespace()
    command = _launchers_command()
    at = next(
        (i for i, word in enumerate(command) if re.search(r"(^|/)(launch(\.py)?|accelerate-launch)$", word)), None
    )
    if "ACCELERATE_MIXED_PRECISION" in environment and at is not None:
        from accelerate.commands.launch import launch_command_parser  # takes a moment to import

        with suppress(SystemExit):
            arguments = launch_command_parser().parse_args(command[at + 1 :])
    told: dict[str, tuple[str, Any]] = {}
    precision = (environment.get("ACCELERATE_MIXED_PRECISION") or "no").lower()
    # Its files and defaults say no unasked.
    if precision != "no" or getattr(arguments, "mixed_precision", None) == "no":
        if precision not in ("no", "bf16", "fp16"):
            raise UsageError(
                f"the launcher was told --mixed_precision {precision}; train.precision knows no, bf16 and fp16"
            )
        told["precision"] = "--mixed_precision", precision
    for field, flag, kind in (
        ("accumulation", "gradient_accumulation_steps", int),
        ("grad_clip", "gradient_clipping", float),
    ):
        given = environment.get(f"ACCELERATE_{flag.upper()}", getattr(arguments, flag, None))
        if given not in (None, "none", "auto"):
            try:
                told[field] = f"--{flag}", kind(given)
            except ValueError:
                raise UsageError(
                    f"the launcher was told --{flag} {given}; it must be of type {kind.__name__}"
                ) from None
    backend = environment.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend == "inductor" and on_cpu():
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            get_cpp_compiler()
        except Exception:
            raise UsageError(
                "the launcher was told --dynamo_backend inductor, which needs a C++ compiler on a CPU: install one "
                "(g++), or leave the flag out"
            ) from None
    return told


def _rejoin() -> None:
    """After a restart by torchrun (or accelerate, which uses it), meet the others where the first attempt did not.

    On one machine its workers all meet in one store, in which a restarted one finds the addresses of those that died
    (torch 2.14; on several machines with --rdzv-backend c10d, each attempt has a store of its own).
    """
    attempt, world = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), os.environ.get("WORLD_SIZE", "1")
    wanted = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    wrong = [name for name in wanted if name != "MASTER_ADDR" and not os.environ.get(name, "0").isdecimal()]
    alone = [name for name in ("RANK", "LOCAL_RANK") if world == "1" and os.environ.get(name, "0") != "0"]
    missing = [name for name in wanted if name not in os.environ] if world != "1" else []
    if wrong or alone or missing:
        what = f"{wrong[0]}={os.environ[wrong[0]]}, which is no number" if wrong else (
            f"{alone[0]}={os.environ[alone[0]]}, but no WORLD_SIZE" if alone else
            f"WORLD_SIZE={world}, but {', '.join(missing)} is missing")  # fmt: skip
        raise UsageError(f"the environment has {what}: start with torchrun or accelerate launch, or unset it")
    if attempt != "0" and 1 < int(world) == int(os.environ["LOCAL_WORLD_SIZE"]):
        store = torch.distributed.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        page = torch.distributed.PrefixStore(f"attempt {attempt}", store)
        torch.distributed.init_process_group(
            "gloo" if on_cpu() else None, store=page, rank=int(os.environ["RANK"]), world_size=int(world)
        )


def launcher() -> int | None:
    """The number of the process of torchrun or accelerate that started this one, if any did."""
    started = "TORCHELASTIC_RUN_ID" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
    return os.getppid() if started else None


def on_cpu() -> bool:
    """Whether to tell accelerate so: without a GPU it would take each of torchrun's processes for the only one."""
    return not torch.accelerator.is_available()


@contextmanager
def accelerate_starts() -> Iterator[None]:
    """Turn what accelerate makes of an odd environment into one line that names the variables."""
    try:
        yield
    except (ValueError, LookupError, AttributeError, ImportError, RuntimeError, AssertionError) as error:
        if isinstance(error, torch.distributed.DistError):
            raise
        names = [
            f"{name}={value}"
            for name, value in sorted(os.environ.items())
            if name.startswith("ACCELERATE_") or name in ("FORK_LAUNCHED", "LOCAL_RANK", "WORLD_SIZE")
        ]
        said = f"; it reads {', '.join(names)} from the environment" if names else ""
        raise UsageError(f"accelerate cannot start: {in_short(error)}{said}") from None


def opened(path: Path, ema: str | None = None) -> tuple[Checkpoint, dict[str, Tensor]]:
    """`open_weights`, which says on stderr what it passed over. Raises UsageError, with the run's or checkpoint's path,
    where `path` only lies in one."""
    check_is_run(path)
    saved, weights = open_weights(path, ema)
    for _, damage in saved.passed_over:
        say(f"{os.path.basename(sys.argv[0])}: {damage}; {saved.path.name} is used", error=True)
    return saved, weights


def check_writable(folder: Path, flag: str) -> None:
    """Make `folder`, and raise UsageError, naming the flag, where no file can be written into it."""
    try:
        check_no_dangling_link(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UsageError(f"{flag} cannot be written: {in_short(error)}") from None


class _Unbreakable:
    """A stream for what a run says by the way: a full disk or a reader that has gone does not end the run."""

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


def say(text: str, error: bool = False) -> None:
    """Print a line to stdout, or to stderr beside a bar. It does not end the run where nobody can read it."""
    tqdm.write(
        "\n" * text.startswith("\n") + printable(text.lstrip("\n")),
        file=_Unbreakable(sys.stderr if error else sys.stdout),
    )


def progress_bar(total: int, shown: bool, done: int = 0) -> tqdm:
    """A bar of `total` steps on stderr, where `shown`."""
    interval = 0.5 if sys.stderr.isatty() else 30  # a log file needs no second-by-second account
    return tqdm(total=total, initial=done, unit="step", disable=not shown, dynamic_ncols=True, mininterval=interval,
                file=_Unbreakable(sys.stderr))  # fmt: skip


def counted(bar: tqdm, steps: Iterable[int]) -> Iterator[int]:
    """The steps, each counted on the bar when it is done; with the bar bound, a sampler's `progress`."""
    for step in steps:
        yield step
        bar.update()


def _open_standard_streams() -> None:
    """Open what was closed (`>&-`): else the next file that is opened would get what is printed."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if number == 0 else "w"))  # noqa: SIM115


def exit_code(main: Callable[[], None]) -> int:
    """Run `main`: 0, or after a line on stderr 2 where the user can put it right, and 128 + its number for a signal."""
    name = os.path.basename(sys.argv[0])
    _open_standard_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a path may have names that the terminal has not
    try:
        main()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # Its threads would end the interpreter with an abort now and then.
            torch.distributed.destroy_process_group()
    except UsageError as error:
        rank = f" [rank {os.environ['RANK']}]" if torch.distributed.is_initialized() else ""
        say(f"{name}{rank}: {error}", error=True)
        return 2
    except Stopped as stopped:
        if int(os.environ.get("RANK", 0)) == 0:
            say(f"\n{name}: {stopped}", error=True)
        return stopped.code
    except OSError as error:
        where = "" if error.filename is None else f": {error.filename}"
        say(f"{name}: {error.strerror or error}{where}", error=True)
        return 2
    except Died as error:
        say(f"{name}: {error}", error=True)
        return 1
    except RuntimeError as error:
        others = isinstance(error, torch.distributed.DistError) or "gloo" in str(error)
        if not torch.distributed.is_initialized() or not others:
            raise
        print(f"{name} [rank {os.environ['RANK']}]: another process of this run ended: its own message, if it had time "
              f"for one, says why ({in_short(error)})", file=sys.stderr, flush=True)  # fmt: skip
        os._exit(1)  # at the interpreter's end, the group would wait for those that are gone
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted", file=sys.stderr)
        return 130
    return 0
