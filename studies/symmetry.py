"""What constant weights lead to, and zeros in the last layer alone: small classifiers of the 8x8 digits.

    pip install -e '.[studies]'
    python studies/symmetry.py

A fully connected and a convolutional network of two hidden layers of 32 channels, 300 steps of Adam from four starts.
Counted along the way: the channels of the second hidden layer that compute something of their own, and the rank of its
weights and of the last layer's. Pixels are in [0, 1]: with negative ones a constant start could switch every ReLU off,
and show nothing. Rewrites the table of docs/zero-init.md; takes half a minute.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from tables import put_tables, table
from torch import Tensor, nn

from diffusion.data.loader import batch_indices
from diffusion.data.sources.digits import Digits
from diffusion.data.values import to_x_start

DOCUMENT = Path(__file__).parents[1] / "docs" / "zero-init.md"
CHANNELS, STEPS, BATCH_SIZE, RATE = 32, 300, 64, 1e-3
LOOKS = (0, 1, 10, 100, 300)
Start = Literal["random", "last layer zero", "constant", "all zero"]
STARTS: tuple[Start, ...] = ("random", "last layer zero", "constant", "all zero")


class Result(NamedTuple):
    channels: dict[int, int]
    """step -> different channels of the second hidden layer"""
    last_rank: dict[int, int]
    """step -> rank of the last layer's weights"""
    active: float
    """the share of the second layer's outputs on held-out digits that ReLU lets pass, at the end"""
    rank: int
    """of its weights, at the end"""
    accuracy: float
    """on held-out digits, at the end"""


def network(convolutional: bool) -> nn.Sequential:
    if convolutional:
        return nn.Sequential(nn.Conv2d(1, CHANNELS, 3, padding=1), nn.ReLU(),
                             nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.ReLU(),
                             nn.Flatten(), nn.Linear(64 * CHANNELS, 10))  # fmt: skip
    return nn.Sequential(nn.Flatten(), nn.Linear(64, CHANNELS), nn.ReLU(), nn.Linear(CHANNELS, CHANNELS), nn.ReLU(),
                         nn.Linear(CHANNELS, 10))  # fmt: skip


def make_alike(layers: Iterable[nn.Module], start: Start) -> None:
    """Make all channels of each layer the same: constant, scaled to keep the size of signals, or all zero."""
    for layer in layers:
        assert isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
        nn.init.constant_(layer.weight, 1 / layer.weight[0].numel() if start == "constant" else 0.0)
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]


def begin(net: nn.Sequential, start: Start) -> list[nn.Module]:
    """Initialise the weights. Returns the layers that have any."""
    layers = [layer for layer in net if isinstance(layer, nn.Linear | nn.Conv2d)]
    if start != "random":
        make_alike(layers[-1:] if start == "last layer zero" else layers, start)
    return list(layers)


def different_channels(weight: Tensor) -> int:
    """How many rows differ from all others by more than rounding."""
    rows = weight.detach().flatten(1).double()
    apart = torch.cdist(rows, rows) > 1e-4 * rows.norm(dim=1).max().clamp(min=1e-12)
    return len({tuple(row) for row in (~apart).int().tolist()})


def rank(weight: Tensor) -> int:
    return int(torch.linalg.matrix_rank(weight.detach().flatten(1).double(), rtol=1e-4))


def train(convolutional: bool, start: Start, steps: int = STEPS) -> Result:
    dataset = Digits().open()
    x, y = (to_x_start(dataset.images) + 1) / 2, dataset.labels
    held_out = torch.arange(len(x)) % 10 == 0
    train_x, train_y = x[~held_out], y[~held_out]
    torch.manual_seed(0)
    net = network(convolutional)
    layers = begin(net, start)
    optimizer = torch.optim.Adam(net.parameters(), RATE)
    channels, last_rank = {}, {}
    for step in range(steps + 1):
        if step in LOOKS:
            channels[step] = different_channels(layers[1].weight)  # type: ignore[arg-type]
            last_rank[step] = rank(layers[2].weight)  # type: ignore[arg-type]
        if step == steps:
            break
        batch = batch_indices(len(train_x), BATCH_SIZE, 0, step)
        F.cross_entropy(net(train_x[batch]), train_y[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
    accuracy = (net(x[held_out]).argmax(1) == y[held_out]).float().mean().item()
    hidden = net[:4] if convolutional else net[:5]
    active = (hidden(x[held_out]) > 0).float().mean().item()
    return Result(channels, last_rank, active, rank(layers[1].weight), accuracy)  # type: ignore[arg-type]


def results_table() -> str:
    looks = [f"after {step}" for step in LOOKS]
    heads = ["network", "start", f"different channels of {CHANNELS}: {looks[0]}", *looks[1:-1], f"{looks[-1]} steps",
             "rank of the weights", "rank of the last layer, of 10: after 0", "after 1", "300 steps",
             "right on held-out digits"]  # fmt: skip
    rows = []
    for convolutional in (False, True):
        for start in STARTS:
            r = train(convolutional, start)
            name = "convolutional" if convolutional else "fully connected"
            cells = [str(r.channels[step]) for step in LOOKS]
            last = [str(r.last_rank[step]) for step in (0, 1, STEPS)]
            rows.append([name, start, *cells, str(r.rank), *last, f"{100 * r.accuracy:.0f}%"])
    return table(heads, rows)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    put_tables(DOCUMENT, {"symmetry": results_table()})
    print(f"{DOCUMENT} is written")


if __name__ == "__main__":
    main()
