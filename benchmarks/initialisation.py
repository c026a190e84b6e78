"""Steps a second of a normalised network, of one without normalisation, and of Fixup's, in alternation.

python benchmarks/initialisation.py --config configs/digits.yaml [--batch_size 64]
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from diffusion.config.files import load_config
from diffusion.config.schema import Config
from diffusion.training.step import TrainingStep

NETWORKS = {"zero": ("zero", True), "zero, no norm": ("zero", False), "fixup": ("fixup", False)}


class Training:
    """A network that can be trained on one batch, again and again."""

    def __init__(self, config: Config, name: str, batch_size: int, compiled: bool):
        init, use_norm = NETWORKS[name]
        changed: dict[str, Any] = {"init": init, "use_norm": use_norm}
        model = dataclasses.replace(config.model, **changed)
        torch.manual_seed(0)
        network = dataclasses.replace(config, model=model).network(10)
        if compiled:
            network.compile()
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
        self.step = TrainingStep(network, config.diffusion.process(), optimizer, loss=config.diffusion.loss)
        device = self.step.accelerator.device
        self.x_start = torch.randn(batch_size, *config.data.shape, device=device).clamp(-1, 1)
        self.y = torch.arange(batch_size, device=device) % 10 if config.model.class_cond else None

    def seconds(self, steps: int) -> float:
        """How long a step takes."""
        began = time.perf_counter()
        for _ in range(steps):
            result = self.step(self.x_start, self.y)
        result.grad_norm.item()  # waits for the device
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
    batch_size = args.batch_size or config.train.batch_size
    trainings = {name: Training(config, name, batch_size, args.compile) for name in NETWORKS}
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
