"""Bits per dimension of the data under the model."""

import math
from functools import partial

import torch
from torch import Tensor

from diffusion import likelihood
from diffusion.data.base import load, part
from diffusion.errors import UsageError, prefixed
from diffusion.metrics.base import Score, Subject
from diffusion.parallel.cores import CORES
from diffusion.randomness import image_noise


def check_likelihood(subject: Subject) -> None:
    """Raise UsageError if the model has no likelihood, or some of the images are not of 8 bits."""
    run, dataset = subject.run, subject.dataset
    if run.config.is_consistency_model:
        raise UsageError(f"{run.path} is a consistency model, which has no likelihood: leave out bits_per_dim")
    with prefixed("--steps: "):
        process = run.config.diffusion.process(subject.steps)
    process.check_diffusion("--metric bits_per_dim", "score samples, with --metric frechet")
    if load(dataset, part(len(dataset), 256).tolist()).images.dtype != torch.uint8:
        raise UsageError("bits_per_dim is defined for 8-bit images, and these data have 16 bits or a data.range")


def bits_per_dim(subject: Subject) -> Score:
    """The variational bound in bits per dimension, with its standard error over images. Each image is scored once.

    Raises UsageError if the bound is not finite.
    """
    from accelerate.utils import gather_object  # takes long to import

    run, device = subject.run, subject.state.device
    process = run.config.diffusion.process(subject.steps)
    bounds, sums = list[Tensor](), torch.zeros(1 + process.num_timesteps, dtype=torch.float64)
    batches = list(subject.data_batches())
    progress = subject.bar(len(batches) * process.num_timesteps)
    for batch, indices in batches:
        x_start, inputs = run.given(load(subject.dataset, indices))
        noise = partial(image_noise, batch, x_start.shape[1:], device, subject.seed)
        with CORES.followed(run.network) as network:
            bits = likelihood.bits_per_dim(process, partial(network, **inputs), x_start, noise, progress)
        bounds.append(bits.total.double().cpu())
        sums += torch.cat([bits.prior[:, None], bits.vb], 1).double().sum(0).cpu()
    total = torch.cat(gather_object(bounds))
    prior, *terms = (torch.stack(gather_object([sums])).sum(0) / len(total)).tolist()
    bound, count, steps = total.mean().item(), len(total), len(terms)
    if not math.isfinite(bound):
        raise UsageError(f"the bound is {bound}: the weights of {run.path} or their process give no likelihood")
    error = total.std().item() / math.sqrt(count) if count > 1 else math.nan
    figures = {"bits_per_dim": bound, "bits_per_dim_interval": 1.96 * error, "standard_error": error, "prior": prior}
    interval = f" +- {1.96 * error:.4f} (95% interval)" if count > 1 else ""
    line = f"{bound:.4f}{interval} bits per dimension: {count} images, {steps} steps, prior {prior:.6f}, {run.path}"
    return Score(figures | {"terms": terms, "images": count, "steps": steps}, [line], best="bits_per_dim")
