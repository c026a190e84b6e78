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

from diffusion.config import Config, load_config
from diffusion.ema import EMA
from diffusion.interop_diffusers import unet_config
from diffusion.losses import training_losses


def diffusers_unet(config: Config, num_classes: int) -> Any:
    """The network of a configuration, in diffusers' words; here it is told the timestep on the same scale as ours."""
    return UNet2DModel(**unet_config(config, num_classes) | dict(time_embedding_type="positional"))


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
    process = config.diffusion.process()
    generator = torch.Generator(device).manual_seed(0)
    shape = (batch, config.data.channels, config.data.image_size, config.data.image_size)
    x0 = torch.rand(shape, device=device, generator=generator) * 2 - 1
    noise = torch.randn(shape, device=device, generator=generator)
    t = torch.randint(process.num_timesteps, (batch,), device=device, generator=generator)
    y = torch.randint(10, (batch,), device=device, generator=generator) if classes else None

    ours, theirs = config.network(classes).to(device), diffusers_unet(config, classes).to(device)
    sizes = [sum(p.numel() for p in model.parameters()) for model in (ours, theirs)]
    assert sizes[0] == sizes[1], sizes
    denoisers = {"ours": lambda x, t: ours(x, t, y), "diffusers": lambda x, t: theirs(x, t, y).sample}
    models: dict[str, torch.nn.Module] = {"ours": ours, "diffusers": theirs}
    steppers = {}
    for name, model in models.items():
        if args.compile:
            model.compile()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
        steppers[name] = (optimizer, EMA(model, [0.999]))

    def window(name: str) -> float:
        optimizer, ema = steppers[name]
        began = time.perf_counter()
        for step in range(args.steps):
            training_losses(process, denoisers[name], x0, t, noise, config.diffusion.loss)["loss"].mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            ema.update(step)
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
