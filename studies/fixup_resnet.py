"""Fixup where it comes from: a small residual classifier without normalisation, beside one with batch normalisation.

    pip install -e '.[studies]'
    python studies/fixup_resnet.py --mnist FOLDER    (the folder that holds MNIST/raw)

MNIST at 14x14, the network of Zhang, Dauphin & Ma (2019), section 4.1, in small: three stages of 3 blocks, 16, 32 and
64 channels wide. SGD with momentum 0.9; scalars learn at a tenth of the rate, as there. `plain` is the same without
normalisation and without Fixup's rules: He's weights in every layer; `clipped` has gradients clipped to a norm of 1.
Rewrites a table of docs/zero-init.md; results are kept in runs/studies/fixup_resnet.json. Ten minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tables import keep, put_tables, table
from torch import Tensor, nn
from tqdm import tqdm

from diffusion.commands.terminal import exit_code
from diffusion.data.loader import batch_indices
from diffusion.data.sources.torchvision import MNIST
from diffusion.data.values import to_x_start
from diffusion.models.initialisation import scalars
from diffusion.models.layers import Conv2d, Layer, Linear, add_scalars
from diffusion.randomness import seed_for

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "zero-init.md"
ARMS = ("batch norm", "fixup", "fixup, clipped", "plain")
RATES, SEEDS = (0.03, 0.1), range(3)
STEPS, BATCH_SIZE, TEST_IMAGES = 400, 64, 2000


class ShiftedReLU(nn.Module):
    """ReLU behind a scalar bias."""

    def __init__(self) -> None:
        super().__init__()
        self.bias_before = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bias_before)


class Block(nn.Module):
    """activation(skip(x) + branch(x)); a `stride` of 2 halves the size and doubles the channels."""

    def __init__(
        self, channels: int, out_channels: int, stride: int, use_norm: bool, activation: type[ShiftedReLU | nn.ReLU]
    ):
        super().__init__()
        norms = [nn.BatchNorm2d(out_channels) if use_norm else nn.Identity() for _ in range(2)]
        self.branch = nn.Sequential(
            Conv2d(channels, out_channels, 3, stride, padding=1), norms[0], activation(),
            Conv2d(out_channels, out_channels, 3, padding=1), norms[1],
        )  # fmt: skip
        self.activation = activation()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        h = self.branch(x)
        if self.stride > 1:  # the skip has no weights: a mean, and zeros for the new channels
            x = F.avg_pool2d(x, self.stride, ceil_mode=True)
            x = F.pad(x, (0, 0, 0, 0, 0, h.shape[1] - x.shape[1]))
        return self.activation(x + h)


def network(arm: str, seed: int, blocks: int = 3) -> nn.Sequential:
    """A classifier of images (B, 1, 14, 14), with `blocks` residual blocks in each of three stages."""
    torch.manual_seed(seed_for(seed, "weights"))
    use_norm, by_fixup = arm == "batch norm", arm.startswith("fixup")
    activation: type[ShiftedReLU | nn.ReLU] = ShiftedReLU if by_fixup else nn.ReLU
    stages = [
        Block(max(16, width // 2) if first else width, width, 2 if first and width > 16 else 1, use_norm, activation)
        for width in (16, 32, 64)
        for first in [True] + [False] * (blocks - 1)
    ]
    net = nn.Sequential(Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16) if use_norm else nn.Identity(), activation(),
                        *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), Linear(64, 10))  # fmt: skip
    for layer in net.modules():
        if isinstance(layer, Layer):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    if by_fixup:
        ends = [block.branch[3] for block in stages]
        with torch.no_grad():
            for block in stages:
                block.branch[0].weight.mul_(len(stages) ** -0.5)  # type: ignore[operator]  # L^(-1 / (2m - 2)), m = 2
            for layer in (*ends, net[-1]):
                layer.weight.zero_()  # type: ignore[operator]
        add_scalars(net, ends)  # type: ignore[arg-type]
    return net


def train(
    net: nn.Sequential, rate: float, seed: int, x: Tensor, y: Tensor, steps: int = STEPS, clip: float = math.inf
) -> list[float]:
    """The losses of `steps` steps; they end where one is not finite."""
    few = scalars(net)
    others = [p for p in net.parameters() if all(p is not scalar for scalar in few)]
    groups: list[dict[str, Any]] = [{"params": others}, {"params": few, "lr": rate / 10}]
    optimizer = torch.optim.SGD(groups if few else groups[:1], rate, momentum=0.9)
    losses: list[float] = []
    for step in range(steps):
        batch = batch_indices(len(x), BATCH_SIZE, seed, step)
        loss = F.cross_entropy(net(x[batch]), y[batch])
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return losses


@torch.no_grad()
def accuracy(net: nn.Sequential, x: Tensor, y: Tensor) -> float:
    """Images (N, 1, 14, 14) told apart, in percent."""
    net.eval()
    return 100 * (net(x).argmax(1) == y).double().mean().item()


def data(path: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test images, standardised as there, each with its labels."""
    found = []
    for split in ("train", "test"):
        dataset = MNIST(path=path, image_size=14).open(split)
        count = len(dataset) if split == "train" else TEST_IMAGES
        found += [to_x_start(dataset.images[:count]), dataset.labels[:count]]
    x, y, test_x, test_y = found
    return (x - x.mean()) / x.std(), y, (test_x - x.mean()) / x.std(), test_y


def results_table(results: dict[str, Any]) -> str:
    heads = ["network"]
    for rate in RATES:
        heads += [f"rate {rate:g}: right on test images, each seed", "loss of the last 20 steps"]
    rows = []
    for arm in ARMS:
        rows.append([arm])
        for rate in RATES:
            runs = [results[f"{arm} {rate:g} {seed}"] for seed in SEEDS]
            broke = sum(len(r["losses"]) < STEPS for r in runs)
            right = ", ".join(f"{r['accuracy']:.1f}" for r in runs)
            loss = sum(sum(r["losses"][-20:]) / 20 for r in runs) / len(runs)
            rows[-1] += [f"{right}%", f"{loss:.3f}"] if not broke else [f"{broke} broke", ""]
    return table(heads, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", required=True, help="the folder that holds MNIST/raw")
    parser.add_argument("--results", type=Path, default=ROOT / "runs" / "studies" / "fixup_resnet.json")
    args = parser.parse_args()
    x, y, test_x, test_y = data(args.mnist)
    results: dict[str, Any] = json.loads(args.results.read_text()) if args.results.exists() else {}
    torch.set_num_threads(1)
    jobs = [(arm, rate, seed) for seed in SEEDS for arm in ARMS for rate in RATES]
    for arm, rate, seed in tqdm(jobs, unit="run"):
        name = f"{arm} {rate:g} {seed}"
        if name in results:
            continue
        net = network(arm, seed)
        losses = train(net, rate, seed, x, y, clip=1.0 if arm.endswith("clipped") else math.inf)
        results[name] = {"losses": losses, "accuracy": accuracy(net, test_x, test_y)}
        keep(args.results, results)
    put_tables(DOCUMENT, {"resnet": results_table(results)})
    print(f"{DOCUMENT} is written")


if __name__ == "__main__":
    sys.exit(exit_code(main))
