"""The loss on images that are held out of training."""

from __future__ import annotations

from functools import partial

import torch
from accelerate import Accelerator
from accelerate.utils import reduce
from torch import nn

from diffusion.config import Config
from diffusion.data.base import DataSet, load
from diffusion.data.decode import shrink, to_x_start
from diffusion.losses import training_losses
from diffusion.process import GaussianDiffusion
from diffusion.randomness import image_noise
from diffusion.sampling import batches

MOST = 1000
"""How many images are scored at the most."""


@torch.no_grad()
def held_out_loss(
    config: Config,
    network: nn.Module,
    process: GaussianDiffusion,
    dataset: DataSet,
    accelerator: Accelerator,
    size: int,
) -> float:
    """The mean loss of the first held-out images, in batches of `size`, each process a share.

    Timesteps are spread evenly, and they and the noise of an image are the same at every call.
    """
    n, device = min(len(dataset), MOST), accelerator.device
    share = -(-n // accelerator.num_processes)  # all processes call the network as often, since FSDP gathers weights
    first = accelerator.process_index * share
    sums = torch.zeros(2, device=device)
    for batch in batches(range(first, first + share), size):
        images, y = load(dataset, [i % n for i in batch])
        x_start = to_x_start(images.to(device))
        inputs = {"y": y.to(device)} if config.model.class_cond else {}
        if config.data.low_res_size is not None:
            inputs["low_res"] = shrink(x_start, config.data.low_res_size)
        # Multiples of the golden ratio, modulo 1, are spread evenly for any number of images.
        numbers = torch.arange(batch.start, batch.stop, device=device)
        t = ((numbers * 0.6180339887) % 1 * process.num_timesteps).long()
        noise = image_noise(batch, x_start.shape[1:], device, config.train.seed, "held_out")
        losses = training_losses(process, partial(network, **inputs), x_start, t, noise, config.diffusion.loss,
                                 config.diffusion.weighting)["loss"]  # fmt: skip
        counted = numbers < n
        sums += torch.stack([losses[counted].sum(), counted.sum()])
    total, count = reduce(sums, reduction="sum").tolist()
    return total / count
