"""Weights of DiT and SiT, whose state dicts have our names: the shapes say all of the network but its heads."""

import math
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from diffusion.config.schema import Config, config_of
from diffusion.errors import UsageError, prefixed, refusing
from diffusion.interop.openai import EVERY, TRAIN, load_state_dict
from diffusion.models.networks import Transformer

HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
"""Attention heads of the published widths."""
LATENT_SCALE = 0.18215
"""Of Stable Diffusion's autoencoder, whose latents the published models draw: the network sees latents times this."""


def from_dit(path: Path, num_heads: int | None, flow: bool) -> tuple[Config, tuple[str, ...], dict[str, Tensor]]:
    """Read a checkpoint of DiT or, with `flow`, of SiT: the configuration, the classes by number, and weights.

    SiT's output is -velocity, with channels for a variance that it does not use: those are left out, and the others
    negated. Raises UsageError if it is neither, or of a width that is not published and without `num_heads`.
    """
    weights = load_state_dict(path)
    with refusing(lambda reason: f"{path} does not hold the weights of a DiT ({reason})"):
        patches, out = weights["x_embedder.proj.weight"], weights["final_layer.linear.weight"]
        positions, (width, channels, patch, _) = weights["pos_embed"].shape[1], patches.shape
        depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
        mlp_ratio = weights["blocks.0.mlp.fc1.weight"].shape[0] / width
        table = weights.get("y_embedder.embedding_table.weight", torch.empty(0))
        rows = min(len(table), table.numel())  # rows without columns take no room in a file
        learned = out.shape[0] == 2 * patch**2 * channels
        size = math.isqrt(positions) * patch
        for name in ("final_layer.linear.weight", "final_layer.linear.bias") if flow else ():
            weights[name] = -rearrange(weights[name], "(p two c) ... -> two (p c) ...", p=patch**2, two=1 + learned)[0]
    if num_heads is None and width not in HEADS:
        raise UsageError(f"--num_heads is missing: the weights do not say it, and {width} is no published width")
    data: dict[str, object] = dict(source="folder", image_size=size, channels=channels, random_flip=channels != 4)
    data |= dict(range=(-1 / LATENT_SCALE, 1 / LATENT_SCALE), unbounded=True) if channels == 4 else {}
    model = dict(network="dit", patch_size=patch, hidden_size=width, depth=depth, mlp_ratio=mlp_ratio)
    model |= dict(num_heads=num_heads or HEADS[width], class_cond=rows > 0)
    if flow:
        process: dict[str, object] = dict(schedule="flow", prediction="velocity", variance="fixed_small")
        sample = dict(sampler="ode", steps="25")
    else:
        process = dict(schedule="linear", prediction="epsilon", variance="learned_range" if learned else "fixed_large")
        sample = dict(sampler="ddpm", steps="250")
    train = TRAIN | dict(lr=1e-4, batch_size=256, ema_rates=(0.9999,), label_dropout=0.1 if rows else 0.0)
    section = EVERY | dict(n=16, clip_denoised=False) | sample
    process |= dict(loss="mse", rescale_timesteps=False)
    settings = dict(data=data, model=model, diffusion=process, train=train, sample=section, checkpoint=EVERY)
    with prefixed(f"{path}: "):
        return config_of(settings), tuple(map(str, range(rows - 1))), weights


def check_dit(config: Config) -> str:
    """The published class with the network of `config`. Raises UsageError if there is none."""
    if not isinstance(config.model, Transformer):
        raise UsageError(f"model.network is {config.model.network}; only a dit can be converted")
    if not config.model.class_cond or config.data.sizes[0] != config.data.sizes[1]:
        raise UsageError("the published DiT has classes and square images, and this run has not")
    return "DiT"
