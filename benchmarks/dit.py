"""A training step and a forward pass of DiT beside diffusers' and, if it is there, the published one's, in alternation.

    pip install -e '.[test]'
    [PYTHONPATH=CLONE_OF_DIT] python benchmarks/dit.py [--size S/2] [--images 8] [--rounds 15]

The published module is `models.DiT` of facebookresearch/DiT, which needs timm. All have AdamW of torch's fused kind.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from diffusers import DiTTransformer2DModel

from diffusion.models.dit import DiT

SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}


def networks(size: str) -> dict[str, Any]:
    """The networks of a published size for latents of 32x32."""
    name, patch = size.split("/")
    width, depth, heads = SIZES[name]
    found: dict[str, Any] = {"ours": DiT(32, int(patch), 4, width, depth, heads)}
    found["diffusers"] = DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=width // heads, in_channels=4, out_channels=8,
        num_layers=depth, sample_size=32, patch_size=int(patch), num_embeds_ada_norm=1000,
    )  # fmt: skip
    try:
        from models import DiT as Published  # type: ignore[import-not-found]

        found["published"] = Published(
            input_size=32, patch_size=int(patch), in_channels=4, hidden_size=width, depth=depth, num_heads=heads
        )
    except ImportError:
        print("the published module is not on PYTHONPATH")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="S/2")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = {name: network.to(device) for name, network in networks(args.size).items()}
    optimizers = {
        name: torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)  # pos_embed has no gradient
        for name, model in models.items()
    }
    x, t, y = torch.randn(args.images, 4, 32, 32), torch.arange(args.images) * 50, torch.arange(args.images)
    inputs = [value.to(device) for value in (x, t, y)]

    def seconds(name: str, train: bool) -> float:
        began = time.perf_counter()
        with torch.set_grad_enabled(train):
            out: Any = models[name].train(train)(*inputs)
            loss = (out if isinstance(out, torch.Tensor) else out.sample).square().mean()
            if train:
                optimizers[name].zero_grad()
                loss.backward()
                optimizers[name].step()
        loss.item()  # waits for the device
        return time.perf_counter() - began

    for train in (True, False):
        times: dict[str, list[float]] = {name: [seconds(name, train) for _ in range(2)][2:] for name in models}
        for i in range(args.rounds):
            for name in list(models)[:: -1 if i % 2 else 1]:
                times[name].append(seconds(name, train))
        for name in models:
            ratios = [other / own for own, other in zip(times["ours"], times[name], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            kind, speed = "step" if train else "forward", statistics.median(times[name])
            print(
                f"{kind}, {name}: {speed:.3f} s, ours is {middle:.3f} times as fast (quartiles {low:.3f}, {high:.3f})"
            )


if __name__ == "__main__":
    main()
