"""What exact runs cost: the trainer against a plain loop of the same network, in alternation; and what a save takes.

The plain loop is what people write: a shuffling loader, the global generator, no guard against steps that are not
finite, no signals, nothing that could be resumed. `python benchmarks/exactness.py --config configs/digits.yaml`.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from diffusion.config.files import load_config
from diffusion.config.schema import Config
from diffusion.data.values import to_x_start
from diffusion.ema import EMA
from diffusion.losses import training_losses
from diffusion.training.trainer import Trainer

WARM_UP = 5


def exact(config: Config, steps: int, folder: Path) -> tuple[float, float]:
    """Seconds of a step of the trainer, and of a save."""
    config = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, steps=steps + WARM_UP),
        sample=dataclasses.replace(config.sample, every=0, n=1, steps=1),
        checkpoint=dataclasses.replace(config.checkpoint, every=0, keep_last=1),
    )
    trainer = Trainer(config, folder)
    times: list[float] = []
    trainer.run(lambda step, metrics: times.append(time.perf_counter()))
    began = time.perf_counter()
    trainer.training_step.step += 1
    trainer.save()
    return (times[-1] - times[WARM_UP - 1]) / steps, time.perf_counter() - began


def plain(config: Config, steps: int) -> float:
    """Seconds of a step of the plain loop."""
    dataset: Any = config.data.open()
    train = config.train
    network = config.network(len(dataset.class_names))
    process, ema = config.diffusion.process(), EMA(network, train.ema_rates)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=train.lr, weight_decay=train.options["weight_decay"], fused=True
    )
    loader: DataLoader[Any] = DataLoader(
        dataset, train.batch_size, shuffle=True, drop_last=True, collate_fn=lambda batch: batch
    )
    network.train()
    step, losses, began = 0, torch.zeros(()), 0.0
    while True:
        for images, y, _ in loader:
            x_start = to_x_start(images)
            t = torch.randint(process.num_timesteps, (len(x_start),))

            def denoiser(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor = y) -> torch.Tensor:
                return network(x, t, y=y)

            noise = torch.randn_like(x_start)
            loss = training_losses(process, denoiser, x_start, t, noise, config.diffusion.loss)["loss"].mean()
            loss.backward()
            losses += loss.detach()
            optimizer.step()
            optimizer.zero_grad()
            ema.update(step)
            step += 1
            if step % train.log_every == 0:
                losses.item()
            if step == WARM_UP:
                began = time.perf_counter()
            if step == steps + WARM_UP:
                return (time.perf_counter() - began) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/digits.yaml"))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    config = load_config(args.config)
    ratios, steps, saves = [], [], []
    with tempfile.TemporaryDirectory(dir=".") as folder:  # on the disk that runs are written to
        for i in range(args.rounds):
            ours, save = exact(config, args.steps, Path(folder, str(i)))
            theirs = plain(config, args.steps)
            ratios.append(ours / theirs)
            steps.append(ours)
            saves.append(save)
            print(f"a step {1e3 * ours:.1f} ms, plain {1e3 * theirs:.1f} ms, ratio {ratios[-1]:.3f}", flush=True)
    low, *_, high = statistics.quantiles(ratios, n=4)
    cost, first, third = (f"{100 * (ratio - 1):.1f}%" for ratio in (statistics.median(ratios), low, high))
    print(f"exactness costs {cost} of a step (quartiles {first} and {third})")
    save = statistics.median(saves)
    print(f"a save takes {1e3 * save:.0f} ms, {save / statistics.median(steps):.2f} steps")


if __name__ == "__main__":
    main()
