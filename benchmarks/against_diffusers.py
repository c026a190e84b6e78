"""Training steps of this U-Net and of the same U-Net written with diffusers, in alternation.

    python benchmarks/against_diffusers.py [digits|cifar10]

Same data, loss, optimizer and averages; only the network differs. Prints each one's images a second and the ratio
of neighbouring windows.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel

from diffusion.config import Config
from diffusion.config_file import load_config
from diffusion.interop.diffusers import unet_config
from diffusion.training.step import TrainingStep


def diffusers_unet(config: Config, num_classes: int) -> Any:
    """The network of a configuration, in diffusers' words; here it is told the timestep on the same scale as ours."""
    return UNet2DModel(**unet_config(config, num_classes) | dict(time_embedding_type="positional"))


class Wrapped(torch.nn.Module):
    """diffusers' network, called as ours is."""

    def __init__(self, unet: Any):
        super().__init__()
        self.unet = unet

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        return self.unet(x, t, y).sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="digits", choices=["digits", "cifar10"])
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--steps", type=int, default=20, help="training steps in a window")
    parser.add_argument("--windows", type=int, default=9)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    config = load_config(Path(__file__).parents[1] / f"configs/{args.config}.yaml")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = args.batch_size or config.train.batch_size
    classes = 10 if config.model.class_cond else 0
    generator = torch.Generator(device).manual_seed(0)
    x_start = torch.rand(batch, *config.data.shape, device=device, generator=generator) * 2 - 1
    y = torch.randint(10, (batch,), device=device, generator=generator) if classes else None

    models = {"ours": config.network(classes), "diffusers": Wrapped(diffusers_unet(config, classes))}
    sizes = [sum(p.numel() for p in model.parameters()) for model in models.values()]
    assert sizes[0] == sizes[1], sizes
    steps = {}
    for name, model in models.items():
        if args.compile:
            model.compile()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
        steps[name] = TrainingStep(model, config.diffusion.process(), optimizer, ema_rates=[0.999],
                                   loss=config.diffusion.loss)  # fmt: skip

    def window(name: str) -> float:
        began = time.perf_counter()
        for _ in range(args.steps):
            steps[name](x_start, y)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return args.steps * batch / (time.perf_counter() - began)

    for name in models:
        window(name)
    pairs = [(window("ours"), window("diffusers")) for _ in range(args.windows)]
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}, {where}: {args.config}, batch {batch}, "
          f"{sizes[0] / 1e6:.2f}M parameters, {args.windows} pairs of windows of {args.steps} steps")  # fmt: skip
    for name, figures in zip(models, zip(*pairs, strict=True), strict=True):
        print(f"{name}: {statistics.median(figures):.1f} images/s ({min(figures):.1f} to {max(figures):.1f})")
    ratios = [a / b for a, b in pairs]
    print(f"ours / diffusers: {statistics.median(ratios):.3f} (median; {min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()
