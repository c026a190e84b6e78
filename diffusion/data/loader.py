"""The order of images as a function of (seed, step), and the processes that read them ahead."""

import signal
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import lru_cache
from multiprocessing.process import BaseProcess, active_children
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from diffusion.data.base import Batch, DataSet
from diffusion.errors import UsageError, one_line
from diffusion.parallel.signals import STOP_SIGNALS
from diffusion.randomness import generator_for

POLL_SECONDS = 1
"""How often a process that waits for a worker's batch checks whether to stop."""


def batch_indices(num_images: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Which images make up the global batch of `step`.

    Epochs are concatenated, each shuffled anew, and split into batches: every image is seen once an epoch, none is
    dropped, and a batch may span two epochs.
    """
    indices: list[int] = []
    while len(indices) < batch_size:
        epoch, start = divmod(step * batch_size + len(indices), num_images)
        indices += _epoch_order(num_images, seed, epoch)[start : start + batch_size - len(indices)].tolist()
    return indices


@lru_cache(maxsize=1)
def _epoch_order(num_images: int, seed: int, epoch: int) -> Tensor:
    """The shuffled epoch. The last one is cached, since every step of an epoch uses it."""
    return torch.randperm(num_images, generator=generator_for("cpu", seed, "epoch", epoch))


def _ignore_stop_signals(worker: int) -> None:
    """A terminal, torchrun and schedulers signal workers too, which have to read on until the run is saved."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def step_batches(
    dataset: DataSet, batch_size: int, seed: int, steps: range, slices: list[slice], workers: int = 0,
    replaced: Callable[[Sequence[str]], None] = lambda errors: None, waiting: Callable[[], None] = lambda: None,
) -> Generator[Batch]:  # fmt: skip
    """This process's images of each of `steps`: its `slices` of the global batch, concatenated.

    `replaced` is called with the errors of images that others replace. `waiting` is called each second while a worker's
    batch is waited for, and may raise. The generator has to be closed or exhausted, so that its workers end.
    Raises UsageError with the name of a file that cannot be read.
    """

    whole = (batch_indices(len(dataset), batch_size, seed, step) for step in steps)
    shares = ([index for part in slices for index in indices[part]] for indices in whole)

    ahead: Any = dict(num_workers=workers, worker_init_fn=_ignore_stop_signals, timeout=POLL_SECONDS) if workers else {}
    ahead["generator"] = torch.Generator()  # else it would draw from the global one, which dropout uses
    images = cast(Dataset[Any], dataset)
    loader: DataLoader[Any] = DataLoader(images, batch_sampler=shares, collate_fn=lambda batch: batch, **ahead)
    others = set(active_children())
    try:
        batches = iter(loader)
        while (batch := _next(batches, waiting)) is not None:
            if isinstance(batch, UsageError):
                raise batch
            if batch.replaced:
                replaced(batch.replaced)
            tensors = Batch.of(batch, dataset.condition_channels)
            pinned = torch.cuda.is_available()
            yield Batch(*(tensor.pin_memory() if pinned and tensor.numel() else tensor for tensor in tensors))
    except OSError as error:
        _kill(set(active_children()) - others)  # else torch waits 5 seconds for each
        # torch's half-made iterator complains when it is freed, which is now.
        hook, sys.unraisablehook = sys.unraisablehook, lambda unraisable: None
        error.with_traceback(None)
        sys.unraisablehook = hook
        raise UsageError(f"data.workers is {workers}, and they cannot be started: {one_line(error)}") from None
    finally:
        _kill(set(active_children()) - others)


def _next(batches: Iterator[Any], waiting: Callable[[], None]) -> Any:
    """The next batch, or None at the end."""
    while True:
        try:
            return next(batches, None)
        except RuntimeError as error:  # torch has no exception type for this
            if "timed out" not in str(error):
                raise
            waiting()


def _kill(workers: set[BaseProcess]) -> None:
    """Kill workers: they ignore SIGTERM, so Python's atexit would hang."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if workers else None  # torch would take it for a crash
    for worker in workers:
        worker.kill()
        worker.join()
    if before is not None:
        signal.signal(signal.SIGCHLD, before)
