"""Residual blocks by the ten, hundred and thousand, without normalisation: which weights at the start bear that.

    pip install -e '.[studies]'
    python studies/depth.py

A chain of the U-Net's own residual blocks, 16 channels wide, on the 8x8 digits. At the start: how large the signal is
behind each block, and how large the gradient that comes back to it. Then 100 steps of Adam. Writes the table of
docs/zero-init.md and docs/zero-init-depth.png; results are kept in runs/studies/depth.json.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from tables import keep, put_tables, table
from torch import Tensor, nn
from tqdm import tqdm

from diffusion import GaussianDiffusion, Schedule
from diffusion.data.loader import batch_indices
from diffusion.data.sources.digits import Digits
from diffusion.data.values import to_x_start
from diffusion.models.initialisation import InitName, initialise
from diffusion.models.layers import Linear, SiLU, conv_nd, timestep_embedding, zero_module
from diffusion.models.unet import ResBlock, UNetModel
from diffusion.randomness import generator_for, seed_for

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "zero-init.md"
DEPTHS = (10, 100, 1000)
INITS: tuple[InitName, ...] = ("zero", "fixup", "default")
CHANNELS, EMBEDDING, BATCH_SIZE, STEPS, RATE = 16, 64, 16, 100, 1e-3


class Chain(nn.Module):
    """Residual blocks in a row between two convolutions, with what `initialise` asks a U-Net for."""

    num_classes, last_layers = None, UNetModel.last_layers

    def __init__(self, depth: int):
        super().__init__()
        self.time_embed = nn.Sequential(Linear(CHANNELS, EMBEDDING), SiLU(), Linear(EMBEDDING, EMBEDDING))
        self.first = conv_nd(2, 1, CHANNELS, 3, padding=1)
        self.blocks = nn.ModuleList(
            ResBlock(CHANNELS, EMBEDDING, 0.0, CHANNELS, use_scale_shift_norm=True, use_norm=False)
            for _ in range(depth)
        )
        self.out = nn.Sequential(nn.Identity(), SiLU(), zero_module(conv_nd(2, CHANNELS, 1, 3, padding=1)))

    def signals(self, x: Tensor, t: Tensor) -> list[Tensor]:
        """What the first block is given, and what each gives."""
        emb = self.time_embed(timestep_embedding(t, CHANNELS))
        found = [self.first(x)]
        for block in self.blocks:
            found.append(block(found[-1], emb))
        return found

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.out(self.signals(x, t)[-1])


def chain(depth: int, init: InitName, seed: int = 0) -> Chain:
    torch.manual_seed(seed_for(seed, "weights"))
    model = Chain(depth)
    initialise(model, init)
    return model


def batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy digits (16, 1, 8, 8), what the network is told of t, and the noise, of a step."""
    dataset = Digits().open()
    x_start = to_x_start(dataset.images[batch_indices(len(dataset), BATCH_SIZE, 0, step)])
    generator = generator_for("cpu", 0, "step", step)
    t = torch.randint(1000, (BATCH_SIZE,), generator=generator)
    noise = torch.randn(x_start.shape, generator=generator)
    process = GaussianDiffusion(Schedule.named("cosine", 1000))
    return process.q_sample(x_start, t, noise), process.network_t(t), noise


def at_the_start(model: Chain) -> tuple[list[float], list[float]]:
    """The root mean square of the signal behind each block, and of the gradient of a random sum of the last one."""
    x, t, _ = batch(0)
    found = model.signals(x, t)
    for signal in found:
        signal.retain_grad()
    weights = torch.randn(found[-1].shape, generator=generator_for("cpu", 0, "sum"))
    (found[-1] * weights).sum().backward()
    model.zero_grad()
    size = [signal.detach().double().square().mean().sqrt().item() for signal in found]
    gradient = [signal.grad.double().square().mean().sqrt().item() for signal in found if signal.grad is not None]
    return size, gradient


def train(model: Chain, steps: int) -> list[float]:
    """The losses of `steps` steps; they end where one is not finite."""
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    losses: list[float] = []
    for step in range(steps):
        x, t, noise = batch(step)
        loss = (model(x, t) - noise).square().mean()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "runs" / "studies" / "depth.json")
    args = parser.parse_args()
    results: dict[str, Any] = json.loads(args.results.read_text()) if args.results.exists() else {}
    torch.set_num_threads(1)
    for depth in tqdm(DEPTHS, unit="depth"):
        for init in INITS:
            if f"{init} {depth}" in results:
                continue
            model = chain(depth, init)
            signal, gradient = at_the_start(model)
            results[f"{init} {depth}"] = {"signal": signal, "gradient": gradient, "losses": train(model, STEPS)}
            keep(args.results, results)
    report(results)


def results_table(results: dict[str, Any]) -> str:
    heads = ["weights at the start", "blocks", "signal, last block to first", "gradient, first block to last",
             "worst loss of the first 5 steps", f"loss of the last 5 of {STEPS}"]  # fmt: skip
    rows = []
    for init in INITS:
        for depth in DEPTHS:
            r = results[f"{init} {depth}"]
            losses = r["losses"]
            ended = len(losses) < STEPS
            last = f"not finite at step {len(losses)}" if ended else f"{sum(losses[-5:]) / 5:.3f}"
            signal, gradient = r["signal"][-1] / r["signal"][0], r["gradient"][0] / r["gradient"][-1]
            rows.append([init, str(depth), f"{signal:.3g}", f"{gradient:.3g}", f"{max(losses[:5]):.3g}", last])
    return table(heads, rows)


def report(results: dict[str, Any]) -> None:
    """Rewrite the table in the document, and the figure."""
    put_tables(DOCUMENT, {"depth": results_table(results)})
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for i, init in enumerate(INITS):
        for depth, style in zip(DEPTHS, (":", "--", "-"), strict=True):
            r = results[f"{init} {depth}"]
            label = f"{init}, {depth}"
            place = [block / depth for block in range(depth + 1)]
            axes[0].plot(place, r["signal"], style, color=f"C{i}", label=label)
            axes[1].plot(place, r["gradient"], style, color=f"C{i}")
            axes[2].plot(r["losses"], style, color=f"C{i}")
    for axis, title in zip(axes, ("signal behind each block", "gradient at each block", "training loss"), strict=True):
        axis.set(yscale="log", title=title)
    axes[0].set_xlabel("place in the chain")
    axes[1].set_xlabel("place in the chain")
    axes[2].set_xlabel("step")
    axes[0].legend(fontsize=7, title="start, blocks")
    figure.savefig(DOCUMENT.with_name("zero-init-depth.png"), dpi=120)
    print(f"{DOCUMENT} and its picture are written")


if __name__ == "__main__":
    main()
