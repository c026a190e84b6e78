"""Launchers and processes: settings that launchers pass on, and agreement between processes."""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import psutil
import torch

from diffusion.config.schema import Config
from diffusion.errors import UsageError, one_line

if TYPE_CHECKING:  # slow to import, and only needed once a run begins
    from accelerate import Accelerator

SWITCHES = [f"ACCELERATE_{name}" for name in (
    "USE_CPU", "USE_FSDP", "USE_DEEPSPEED", "USE_MEGATRON_LM", "USE_SAGEMAKER", "USE_PARALLELISM_CONFIG", "DEBUG_MODE",
    "CPU_AFFINITY", "DYNAMO_USE_FULLGRAPH", "DYNAMO_USE_DYNAMIC")] + ["FORK_LAUNCHED"]  # fmt: skip
"""Environment variables that accelerate reads as booleans, some of them only in the first step."""


def check_launcher() -> None:
    """Use the cores that `accelerate launch` hides; raise UsageError if it started too few processes."""
    for name in SWITCHES:
        value = os.environ.get(name, "false")
        if value.lower() not in ("true", "false", "1", "0", "yes", "no", "on", "off", "y", "n", "t", "f", "none"):
            raise UsageError(f"the environment has {name}={value}; it must be true or false")
    _rejoin()
    if "ACCELERATE_MIXED_PRECISION" not in os.environ or "WORLD_SIZE" in os.environ:
        return  # not started by it, or as one of several processes
    asked = re.search(r"--num[_-]processes[= ](\d+)", " ".join(_launchers_command()))
    if asked and int(asked[1]) > 1:
        torchrun = f"torchrun --nproc_per_node {asked[1]} {os.path.basename(sys.argv[0])} ..."
        raise UsageError(f"accelerate launch starts one process without GPUs, not {asked[1]}: use {torchrun}")
    if os.environ.get("OMP_NUM_THREADS") == "1":  # its default, which leaves all other cores idle
        torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def _launchers_command() -> list[str]:
    """The command line of the parent process, if it can be read."""
    try:
        return psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return []


def with_launchers_settings(config: Config) -> Config:
    """The configuration, with settings of `accelerate launch`, its file or its environment where `config` leaves them
    open (null). Raises UsageError if the two differ, or for settings that the trainer does not support."""
    if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG") == "true":
        for size in ("TP_SIZE", "CP_SIZE", "SP_SIZE"):
            if (value := os.environ.get(f"PARALLELISM_CONFIG_{size}", "1")) != "1":
                name = f"parallelism_config_{size.lower()} {value}"
                raise UsageError(f"the launcher was told {name}; to shard, use configs/accelerate/fsdp2.yaml")
    told = _launchers_settings()
    taken = {}
    for name, (flag, value) in told.items():
        mine = getattr(config.train, name)
        if mine is None:
            taken[name] = value
        elif mine != value:
            raise UsageError(f"train.{name} is {mine}, and the launcher was told {flag} {value}: give both the same "
                             "value, or leave one of them out")  # fmt: skip
    train = dataclasses.replace(config.train, **taken)
    return dataclasses.replace(config, train=train)


def _launchers_settings() -> dict[str, tuple[str, Any]]:
    """A launcher's settings: for each field of `TrainConfig`, the launcher's flag and its value."""
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
    # Its files and defaults contain no explicitly.
    if precision != "no" or getattr(arguments, "mixed_precision", None) == "no":
        if precision not in ("no", "bf16", "fp16"):
            raise UsageError(f"the launcher was told --mixed_precision {precision}; it must be no, bf16 or fp16")
        told["precision"] = "--mixed_precision", precision
    for field, flag, kind in (
        ("gradient_accumulation", "gradient_accumulation_steps", int),
        ("grad_clip", "gradient_clipping", float),
    ):
        given = environment.get(f"ACCELERATE_{flag.upper()}", getattr(arguments, flag, None))
        if given not in (None, "none", "auto"):
            try:
                told[field] = f"--{flag}", kind(given)
            except ValueError:
                right = f"it must be of type {kind.__name__}"
                raise UsageError(f"the launcher was told --{flag} {given}; {right}") from None
    backend = environment.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend == "inductor" and on_cpu():
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            get_cpp_compiler()
        except Exception:
            raise UsageError("the launcher was told --dynamo_backend inductor, which needs a C++ compiler: install "
                             "one (g++), or leave the flag out") from None  # fmt: skip
    return told


def _rejoin() -> None:
    """After a restart by torchrun (or accelerate, which uses it), use a new rendezvous.

    On one machine, workers share one store, in which a restarted worker finds the addresses of those that died
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
    """The process id of the torchrun or accelerate that started this process, if any."""
    started = "TORCHELASTIC_RUN_ID" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
    return os.getppid() if started else None


def on_cpu() -> bool:
    """Whether to set accelerate's `cpu`: without a GPU, it would take each of torchrun's processes for the only one."""
    return not torch.accelerator.is_available()


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next step: returning it to the system and faulting it in again costs about a
    tenth of a step on a CPU. Without effect on other systems."""
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, at its largest


@contextmanager
def accelerate_starts() -> Iterator[None]:
    """Turn errors of accelerate about its environment into one line that names the variables."""
    try:
        yield
    except (ValueError, LookupError, AttributeError, ImportError, RuntimeError, AssertionError) as error:
        if isinstance(error, torch.distributed.DistError):
            raise
        read = [name for name in os.environ if name.startswith("ACCELERATE_")]
        read += [name for name in ("FORK_LAUNCHED", "LOCAL_RANK", "WORLD_SIZE") if name in os.environ]
        names = [f"{name}={os.environ[name]}" for name in sorted(read)]
        said = f"; it reads {', '.join(names)} from the environment" if names else ""
        raise UsageError(f"accelerate cannot start: {one_line(error)}{said}") from None


def check_known(accelerator: Accelerator) -> None:
    """Raise UsageError if accelerate is set up for a kind of sharding that saving and averaging do not support."""
    from accelerate.utils import DistributedType

    kind = accelerator.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM) or (
        kind == DistributedType.FSDP and not accelerator.is_fsdp2
    ):
        name = "FSDP 1" if kind == DistributedType.FSDP else kind.value
        raise UsageError(f"accelerate is set up for {name}, which this trainer does not know: to shard a network, use "
                         "accelerate launch --config_file configs/accelerate/fsdp2.yaml")  # fmt: skip


def check_agreed(*claims: tuple[str, str, str]) -> None:
    """Raise UsageError, in every process, if one of the values (what, mine, hint) differs between processes."""
    from accelerate.utils import gather_object

    said = gather_object([[mine for _, mine, _ in claims]])
    for (what, _, hint), answers in zip(claims, zip(*said, strict=True), strict=True):
        for i, theirs in enumerate(answers):
            if theirs != answers[0]:
                raise UsageError(f"{what}: {answers[0]} in process 0, and {theirs} in process {i}: {hint}")
