"""The cost of a run, measured on a few of its steps."""

import math
import statistics
import tempfile
import time
from contextlib import closing, nullcontext
from datetime import timedelta
from pathlib import Path

import psutil
import torch
from torch.utils.flop_counter import FlopCounterMode

from diffusion.config.schema import Config
from diffusion.data.base import load
from diffusion.training.data import describe_run
from diffusion.training.trainer import Trainer


def dry_run(config: Config) -> list[str]:
    """Train a few steps of a run of one process, which leaves no files: its cost, in lines."""
    train, counter, times = config.train, FlopCounterMode(display=False), list[float]()
    with tempfile.TemporaryDirectory() as folder, closing(Trainer(config, Path(folder, "run"))) as trainer:
        n, step, device = len(trainer.dataset), trainer.training_step, trainer.accelerator.device
        x_start, given = trainer.sampled.given(load(trainer.dataset, [i % n for i in range(train.batch_size)]))
        for i in range(4):  # one to count operations, one to warm up, two to measure
            began = time.perf_counter()
            with nullcontext() if i else counter:
                result = step(x_start, **given)
            result.losses.sum().item()  # waits for the device
            times.append(time.perf_counter() - began)
        weights = sum(p.numel() for p in trainer.network.parameters())
        moments = [value for state in step.optimizer.state.values() for value in state.values()]
        values = weights * (1 + len(train.averages)) + sum(m.numel() for m in moments if isinstance(m, torch.Tensor))
        lines = describe_run(config, trainer.data)
    seconds = statistics.median(times[2:])
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else psutil.Process().memory_info().rss
    saves = math.ceil(train.steps / (config.checkpoint.every or train.steps))
    kept, size = min(saves, config.checkpoint.keep_last or saves), 4 * values / 2**20
    return [
        *lines,
        f"{weights / 1e6:.2f} million parameters; {counter.get_total_flops() / 1e9:,.1f} GFLOPs a step",
        f"{seconds:.3f} seconds a step, {train.batch_size / seconds:.0f} images/s, "
        f"{memory / 2**30:.1f} GiB of memory on one {device.type}",
        f"{train.steps} steps take {timedelta(seconds=round(seconds * train.steps))}, without grids and checkpoints, "
        f"and see an image {train.steps * train.batch_size / n:.1f} times",
        f"a checkpoint takes {size:,.0f} MiB, {kept} of them {size * kept:,.0f} MiB of disk",
    ]
