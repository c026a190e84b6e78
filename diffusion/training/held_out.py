"""The loss on images that are held out of training."""

from functools import partial

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import reduce
from numpy.typing import NDArray

from diffusion.data.base import DataSet, Labels, load, part
from diffusion.losses import training_losses
from diffusion.parallel.cores import CORES
from diffusion.randomness import generator_for, image_noise
from diffusion.run.loaded import Run
from diffusion.sampling import batches

MOST = 1000
"""How many images are scored at the most, spread over all."""


@torch.no_grad()
def held_out_loss(run: Run, dataset: DataSet, accelerator: Accelerator, size: int) -> float:
    """The mean loss over held-out images and timesteps, in batches of `size`, each process a share.

    Images, timesteps and noise are the same at every call.
    """
    config, process = run.config, run.process
    weights = torch.from_numpy(config.diffusion.component("weighting")(process)).float().to(accelerator.device)
    images_of, t_of, overlaps = pairs(part(len(dataset), MOST), process.num_timesteps)
    n, device = len(t_of), accelerator.device
    share = -(-n // accelerator.num_processes)  # all processes call the network as often, since FSDP gathers weights
    first = accelerator.process_index * share
    total = torch.zeros((), device=device)
    for batch in batches(range(first, first + share), size):
        chosen = np.arange(batch.start, batch.stop) % n
        x_start, inputs = run.given(load(dataset, images_of[chosen].tolist()))
        t = torch.from_numpy(t_of[chosen]).to(device)
        noise = image_noise(batch, x_start.shape[1:], device, config.train.seed, "held_out")
        with CORES.followed(run.network) as follow:
            model, loss = partial(follow, **inputs), config.diffusion.component("loss")
            losses = training_losses(process, model, x_start, t, noise, loss, weights[t])["loss"]
        weight = np.where(np.arange(batch.start, batch.stop) < n, overlaps[chosen], 0.0)
        total += (losses * torch.from_numpy(weight).to(losses)).sum()
    return reduce(total, reduction="sum").item()


def pairs(images: Labels, num_timesteps: int) -> tuple[Labels, Labels, NDArray[np.float64]]:
    """Pairs of an image and a timestep, and a weight for each, so that all images and all timesteps count alike.

    Both divide [0, 1) into equal parts, in a random order. A pair is where a part of an image overlaps one of a
    timestep, and its weight is their overlap: N + T pairs at most. Returns (images, timesteps, weights).
    """
    both = {"images": images, "timesteps": np.arange(num_timesteps)}
    order = {name: torch.randperm(len(x), generator=generator_for("cpu", 0, name)).numpy() for name, x in both.items()}
    images, t = (values[order[name]] for name, values in both.items())
    starts = np.union1d(np.arange(len(images)) * len(t), np.arange(len(t)) * len(images))
    whole = len(images) * len(t)
    return images[starts // len(t)], t[starts // len(images)], np.diff(np.append(starts, whole)) / whole
