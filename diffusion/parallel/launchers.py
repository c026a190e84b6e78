"""Launchers and processes: settings that launchers pass on, and agreement between processes."""

import ctypes
import dataclasses
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from diffusion.errors import UsageError, one_line

if TYPE_CHECKING:  # slow to import, and only needed once a run begins
    from accelerate import Accelerator

    from diffusion.config.schema import Config

PASSED_ON = {
    "precision": ("ACCELERATE_MIXED_PRECISION", str),
    "gradient_accumulation": ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", int),
    "grad_clip": ("ACCELERATE_GRADIENT_CLIPPING", float),
}
"""For each setting of the section `train` that a launcher may pass on, its environment variable and type."""


def check_launcher() -> None:
    """Use the cores that `accelerate launch` hides; raise UsageError if it started too few processes."""
    _rejoin()
    if "ACCELERATE_MIXED_PRECISION" not in os.environ or "WORLD_SIZE" in os.environ:
        return  # not started by it, or as one of several processes
    parent, chosen = Path(f"/proc/{os.getppid()}"), False
    with suppress(OSError):  # another system
        chosen = b"\0OMP_NUM_THREADS=" in b"\0" + (parent / "environ").read_bytes()
        asked = re.search(rb"--num[_-]processes[=\0](\d+)", (parent / "cmdline").read_bytes())
        if asked and (count := int(asked[1])) > 1:
            torchrun = f"torchrun --nproc_per_node {count} {os.path.basename(sys.argv[0])} ..."
            raise UsageError(f"accelerate launch starts one process without GPUs, not {count}: use {torchrun}")
    if os.environ.get("OMP_NUM_THREADS") == "1" and not chosen:  # its default, which leaves all other cores idle
        torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def with_launchers_settings(config: "Config") -> "Config":
    """The configuration, with settings of `accelerate launch`, its file or its environment where `config` leaves them
    open (null). Raises UsageError if the two differ."""
    taken = {}
    for field, (variable, kind) in PASSED_ON.items():
        text = os.environ.get(variable, "no").lower()
        # accelerate passes on its defaults, too, so that they are not the user's choice.
        if text in ("", "no", "none", "auto") or (field == "gradient_accumulation" and text == "1"):
            continue
        try:
            value, own = kind(text), getattr(config.train, field)
        except ValueError:
            raise UsageError(f"the launcher passes on {variable}={text}; it must be of type {kind.__name__}") from None
        if own not in (None, value):
            raise UsageError(f"train.{field} is {own}, and the launcher passes on {variable}={text}: leave one out")
        taken[field] = value
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **taken)) if taken else config


def _rejoin() -> None:
    """After a restart by torchrun (or accelerate, which uses it), use a new rendezvous.

    On one machine, workers share one store, in which a restarted worker finds the addresses of those that died
    (torch 2.14; on several machines with --rdzv-backend c10d, each attempt has a store of its own).
    """
    read = os.environ.get
    attempt, world = read("TORCHELASTIC_RESTART_COUNT", "0"), read("WORLD_SIZE", "1")
    if attempt != "0" and world != "1" and world == read("LOCAL_WORLD_SIZE"):
        store = torch.distributed.TCPStore(read("MASTER_ADDR", ""), int(read("MASTER_PORT", "")), is_master=False)
        new, rank = torch.distributed.PrefixStore(f"attempt {attempt}", store), int(read("RANK", ""))
        torch.distributed.init_process_group("gloo" if on_cpu() else None, store=new, rank=rank, world_size=int(world))


def launcher() -> int | None:
    """The process id of the torchrun or accelerate that started this process, if any."""
    return os.getppid() if {"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"} & os.environ.keys() else None


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
        read = [name for name in os.environ if name.startswith("ACCELERATE_") or name in ("LOCAL_RANK", "WORLD_SIZE")]
        names = ", ".join(f"{name}={os.environ[name]}" for name in sorted(read)) or "nothing"
        raise UsageError(f"accelerate cannot start: {one_line(error)} (the environment has {names})") from None


def check_known(accelerator: "Accelerator") -> None:
    """Raise UsageError if accelerate is set up for a kind of sharding that saving and averaging do not support."""
    from accelerate.utils import DistributedType

    kind = accelerator.distributed_type
    other = kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
    if other or (kind == DistributedType.FSDP and not accelerator.is_fsdp2):
        raise UsageError(f"accelerate is set up for {kind.value}; only FSDP2 shards (configs/accelerate/fsdp2.yaml)")


def check_agreed(*claims: tuple[str, str, str]) -> None:
    """Raise UsageError, in every process, if one of the values (what, value, hint) differs between processes."""
    from accelerate.utils import gather_object

    gathered = gather_object([[value for _, value, _ in claims]])
    for (what, _, hint), values in zip(claims, zip(*gathered, strict=True), strict=True):
        for i, value in enumerate(values):
            if value != values[0]:
                raise UsageError(f"{what}: {values[0]} in process 0, and {value} in process {i}: {hint}")
