"""What a run would cost, from a few of its steps, and what looks wrong with its settings."""

from __future__ import annotations

import math
import resource
import statistics
import sys
import tempfile
import time
from contextlib import closing, nullcontext
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from diffusion.config.schema import Config
from diffusion.data.loader import step_batches
from diffusion.data.values import to_x_start
from diffusion.training.data import describe_run
from diffusion.training.trainer import Trainer

STEPS = 4
"""One to count operations, one to warm up, two to measure."""


def dry_run(config: Config) -> list[str]:
    """Train a few steps of a run of one process that leaves nothing behind: what it would cost, in lines."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, Path(folder, "run"))
        with closing(trainer):
            train, step, device = config.train, trainer.training_step, trainer.accelerator.device
            counter, times = FlopCounterMode(display=False), list[float]()
            images = step_batches(trainer.dataset, train.batch_size, train.seed, range(STEPS),
                                  [slice(0, train.batch_size)], config.data.workers)  # fmt: skip
            with closing(images):
                for i, (x, y) in enumerate(images):
                    began = time.perf_counter()
                    with counter if i == 0 else nullcontext():
                        result = step(to_x_start(x.to(device)), y.to(device) if trainer.class_names else None)
                    result.losses.sum().item()  # waits for the device
                    times.append(time.perf_counter() - began)
            states = [value for state in step.optimizer.state.values() for value in state.values()]
            weights = sum(p.numel() for p in trainer.network.parameters())
            moments = sum(value.numel() for value in states if isinstance(value, torch.Tensor))
            lines = describe_run(config, trainer.data)
            images_there = len(trainer.dataset)
    seconds = statistics.median(times[2:])
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated() / 2**30
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    checkpoint = 4 * (weights * (1 + len(train.averages)) + moments) / 2**20
    saves = -(-train.steps // (config.checkpoint.every or train.steps))
    kept = min(saves, config.checkpoint.keep_last or saves)
    lines += [
        f"{weights / 1e6:.2f} million parameters; {counter.get_total_flops() / 1e9:,.1f} GFLOPs a step",
        f"{seconds:.3f} seconds a step, {train.batch_size / seconds:.0f} images/s, {memory:.1f} GiB of memory on one "
        f"{device.type}",
        f"{train.steps} steps take {_duration(seconds * train.steps)}, without grids and checkpoints, and see an image "
        f"{train.steps * train.batch_size / images_there:.1f} times",
        f"a checkpoint takes {checkpoint:,.0f} MiB, {kept} of them {checkpoint * kept:,.0f} MiB of disk",
    ]  # fmt: skip
    return lines + [f"advice: {text}" for text in advice(config, weights, images_there, seconds)]


def advice(config: Config, weights: int, images: int, seconds: float) -> list[str]:
    """What looks wrong with the settings of a run of so many weights, images, and seconds a step."""
    train, found = config.train, list[str]()
    most = 1e-3 if train.optimizer == "adamw" else 1e-2
    if train.lr > most:
        found.append(f"train.lr {train.lr:g} is high for {train.optimizer} (usually up to {most:g})")
    if train.optimizer == "adamw" and train.lr > 2e-4 and train.batch_size < 16:
        found.append(f"train.lr {train.lr:g} is high for batches of {train.batch_size}")
    longest = max(train.ema_rates, default=0.0)
    if 2 / (1 - longest) > train.steps and not train.ema_warmup:
        found.append(f"an average of rate {longest} remembers {1 / (1 - longest):.0f} steps, and the run has "
                     f"{train.steps}: set train.ema_warmup true")  # fmt: skip
    values = images * math.prod(config.data.shape)
    if weights > 10 * values:
        found.append(f"the network has {weights / values:.0f} times as many weights as the data have values: it may "
                     "learn them by heart, so hold some out with --data.held_out 0.1")  # fmt: skip
    if train.steps * train.batch_size > 500 * images:
        found.append(f"each image is seen {train.steps * train.batch_size / images:.0f} times: hold some out with "
                     "--data.held_out 0.1, and use the best checkpoint by them")  # fmt: skip
    if train.steps * train.batch_size < images:
        found.append("the run ends before each image was seen once")
    if not config.checkpoint.every and seconds * train.steps > 3600:
        found.append("checkpoint.every is 0, so a crash loses everything")
    return found


def _duration(seconds: float) -> str:
    for unit, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.0f} seconds"
