"""Steps a second of a normalised network, of one without normalisation, and of Fixup's, in alternation.

python benchmarks/initialisation.py --config configs/digits.yaml [--batch_size 64]
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from functools import partial
from pathlib import Path

import torch

from diffusion.config import Config, load_config
from diffusion.losses import training_losses

NETWORKS = {"zero": ("zero", True), "zero, no norm": ("zero", False), "fixup": ("fixup", False)}


class Training:
    """A network that can be trained on one batch, again and again."""

    def __init__(self, config: Config, name: str, batch_size: int, device: torch.device, compiled: bool):
        init, use_norm = NETWORKS[name]
        model = dataclasses.replace(config.model, init=init, use_norm=use_norm)  # type: ignore[arg-type]
        self.config = dataclasses.replace(config, model=model)
        torch.manual_seed(0)
        self.network = self.config.network(10).to(device)
        if compiled:
            self.network.compile()
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-4, fused=True)
        data, self.process = config.data, config.diffusion.process()
        shape = (batch_size, data.channels, data.image_size, data.image_size)
        self.x_start, self.noise = torch.randn(2, *shape, device=device).clamp(-1, 1)
        self.t = torch.randint(self.process.num_timesteps, (batch_size,), device=device)
        self.y = torch.arange(batch_size, device=device) % 10

    def seconds(self, steps: int) -> float:
        """How long a step takes."""
        denoiser = partial(self.network, y=self.y) if self.config.model.class_cond else self.network
        began = time.perf_counter()
        for _ in range(steps):
            loss = training_losses(
                self.process, denoiser, self.x_start, self.t, self.noise, self.config.diffusion.loss
            )["loss"].mean()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        loss.item()  # waits for the device
        return (time.perf_counter() - began) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/digits.yaml"))
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    config = load_config(args.config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch_size = args.batch_size or config.train.batch_size
    trainings = {name: Training(config, name, batch_size, device, args.compile) for name in NETWORKS}
    times: dict[str, list[float]] = {name: [] for name in NETWORKS}
    for training in trainings.values():
        training.seconds(2)
    for _ in range(args.rounds):
        for name, training in trainings.items():
            times[name].append(training.seconds(args.steps))
    for name in NETWORKS:
        ratios = [zero / own for zero, own in zip(times["zero"], times[name], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        print(f"{name}: {1 / statistics.median(times[name]):.2f} steps/s, {statistics.median(ratios):.3f} times zero's "
              f"(quartiles {low:.3f} and {high:.3f})")  # fmt: skip


if __name__ == "__main__":
    main()
