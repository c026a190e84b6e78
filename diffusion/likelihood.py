"""The variational bound on the likelihood in bits per dimension (Nichol & Dhariwal 2021, section 2.1)."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.losses import Denoiser, mean_flat, normal_kl, variational_bound
from diffusion.process import GaussianDiffusion
from diffusion.samplers import Progress


class BitsPerDim(NamedTuple):
    """The bound for each image in bits per dimension, and its parts. Columns go from t = 0 to T - 1."""

    total: Tensor
    """(B,), the bound: `prior` plus the sum of `vb`."""
    prior: Tensor
    """(B,), KL(q(x_T | x_0) || N(0, 1)): what remains of the image at x_T."""
    vb: Tensor
    """(B, T), the terms L_0, L_1, ... (eqs. 5 and 6)."""
    xstart_mse: Tensor
    """(B, T), the mean squared error of the predicted x_0."""
    mse: Tensor
    """(B, T), the mean squared error of the predicted noise."""


@torch.no_grad()
def bits_per_dim(
    process: GaussianDiffusion, model: Denoiser, x_start: Tensor, noise: Callable[[int], Tensor],
    progress: Progress = iter, *, clip_denoised: bool = True,
) -> BitsPerDim:  # fmt: skip
    """Score images, with one noise sample per step.

    Args:
        x_start: (B, C, ...), 8-bit levels scaled to [-1, 1].
        noise: returns the noise of the loop's iteration 0, 1, ..., which goes from t = T - 1 down to 0.
    """
    terms = []
    for step in progress(range(process.num_timesteps)):
        t = torch.full((len(x_start),), process.num_timesteps - 1 - step, dtype=torch.int64, device=x_start.device)
        z = noise(step)
        x_t = process.q_sample(x_start, t, z)
        output = model(x_t, process.network_t(t))
        pred_xstart = process.predict_xstart(output, x_t, t, clip_denoised)
        eps = process.predict_eps(x_t, t, pred_xstart)
        vb = variational_bound(process, output, x_start, x_t, t, clip_denoised)
        terms.append((vb, mean_flat((pred_xstart - x_start) ** 2), mean_flat((eps - z) ** 2)))
    vb, xstart_mse, mse = (torch.stack(column[::-1], dim=1) for column in zip(*terms, strict=True))
    last = torch.full((len(x_start),), process.num_timesteps - 1, dtype=torch.int64, device=x_start.device)
    mean, log_variance = process.q_mean_variance(x_start, last)
    zero = torch.zeros_like(mean)
    prior = mean_flat(normal_kl(mean, log_variance, zero, zero)) / math.log(2)
    return BitsPerDim(prior + vb.sum(1), prior, vb, xstart_mse, mse)
