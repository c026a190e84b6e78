"""Images a second of a whole training step and of a sampling step, and the fraction of the device's peak that is.

    python benchmarks/step.py --config configs/cifar10.yaml --train.batch_size 16

Takes train.py's flags. The training steps are those of the product's own loop, data, logging and averages included.
The peak is measured: the fastest of several large matrix products and convolutions in the training's precision.
"""

from __future__ import annotations

import dataclasses
import math
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from diffusion.commands.command_line import parse_command_line
from diffusion.commands.terminal import exit_code
from diffusion.config.schema import Config
from diffusion.losses import training_losses
from diffusion.parallel.launchers import check_launcher
from diffusion.sampling import sample_batch
from diffusion.training.trainer import Trainer

WINDOWS = 7


def seconds(work: Callable[[], Any], device: torch.device, repeats: int) -> list[float]:
    """How long `work` takes, `repeats` times after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return times[1:]


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest large matrix product or convolution, which may be of different libraries."""
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device).to(dtype)
    x = torch.randn(8, 256, 32, 32, device=device).to(dtype, memory_format=torch.channels_last)
    weight = torch.randn(256, 256, 3, 3, device=device).to(dtype, memory_format=torch.channels_last)
    convolution = 2 * 9 * 256 * x.numel() / min(seconds(lambda: F.conv2d(x, weight, padding=1), device, 10))
    return max(2 * size**3 / min(seconds(lambda: a @ a, device, 10)), convolution)


def flops(work: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def steps_per_window(config: Config, device: torch.device) -> int:
    return (
        50
        if device.type == "cuda"
        else max(1, 2000 // (config.train.batch_size * math.prod(config.data.shape[1:]) // 64))
    )


def main() -> None:
    config = parse_command_line(sys.argv[1:]).config
    check_launcher()
    with tempfile.TemporaryDirectory() as folder:
        measure(config, Path(folder))


def measure(config: Config, folder: Path) -> None:
    """Print the figures of a configuration, measured with a run in `folder`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    window = steps_per_window(config, device)
    train = dataclasses.replace(config.train, steps=(1 + WINDOWS) * window, log_every=window)
    short = dataclasses.replace(config.sample, every=0, n=1, steps=1)
    trainer = Trainer(dataclasses.replace(config, train=train, sample=short), folder / "run")
    device = trainer.accelerator.device
    windows: list[float] = []
    trainer.run(lambda step, metrics: windows.append(metrics["images_per_second"]) if metrics else None)
    per_second = windows[1:]  # the first one warms up

    batch = config.train.batch_size // (config.train.gradient_accumulation or 1) // trainer.accelerator.num_processes
    data = config.data
    x = torch.randn(batch, *data.shape, device=device)
    t = torch.zeros(batch, dtype=torch.int64, device=device)
    y = t if trainer.class_names else None

    def forward_and_backward() -> None:
        losses = training_losses(trainer.process, lambda x, t: trainer.network(x, t, y), x, t, x, config.diffusion.loss)
        losses["loss"].mean().backward()

    labels = None if y is None else y.cpu()
    trained = flops(forward_and_backward) / batch
    with torch.no_grad():
        drawn = flops(lambda: trainer.network(x, t, y)) / batch
    trainer.network.eval()
    steps = max(2, window // 4)
    process = config.diffusion.process(steps)
    sampling = [
        steps * batch / time_
        for time_ in seconds(
            lambda: sample_batch(
                process, trainer.network, x.shape[1:], range(batch), labels=labels, device=device
            ),
            device,
            WINDOWS,
        )
    ]  # fmt: skip
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.train.precision or "no"]
    peak = peak_flops(device, dtype)

    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    parameters = sum(p.numel() for p in trainer.network.parameters()) / 1e6
    print(f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}, {name}, {torch.get_num_threads()} CPU threads")
    precision = config.train.precision or "no"
    print(f"{config.data.source}: {parameters:.2f}M parameters, batch {batch}, precision {precision}")
    print(f"peak, matrix products and convolutions in {dtype}: {peak / 1e9:.0f} GFLOP/s")
    for what, figures, cost in (("training", per_second, trained), ("sampling", sampling, drawn)):
        median = statistics.median(figures)
        print(
            f"{what} step: {median:.1f} images/s (median of {len(figures)} windows, "
            f"{min(figures):.1f} to {max(figures):.1f}), {cost / 1e9:.3f} GFLOP an image, "
            f"{median * cost / peak:.2f} of the peak"
        )


if __name__ == "__main__":
    sys.exit(exit_code(main))
