"""Samplers: free functions with one signature. All work step by step from noise, without gradients.

    x_0 = ddpm(process, model, x_T, noise)

`noise(step)` gives the standard normal noise of the loop's `step`-th pass (0, 1, ...), shaped like x. The caller so
decides what a picture depends on. `progress` wraps the loop's range, e.g. `tqdm.tqdm`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from diffusion.losses import Denoiser
from diffusion.process import GaussianDiffusion
from diffusion.randomness import picture_noise

SamplerName = Literal["ddpm", "ddim"]
Noise = Callable[[int], Tensor]
Progress = Callable[[Iterable[int]], Iterable[int]]


@torch.no_grad()
def ddpm(
    process: GaussianDiffusion,
    model: Denoiser,
    x: Tensor,
    noise: Noise,
    *,
    clip_denoised: bool = True,
    progress: Progress = iter,
) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, algorithm 2) with the process's variance: x_T (B, C, ...) -> x_0."""
    for step in progress(range(process.num_timesteps)):
        t = _timestep(process.num_timesteps - 1 - step, x)
        p = process.p_mean_variance(model(x, process.network_t(t)), x, t, clip_denoised)
        z = noise(step)  # drawn at the last step too, as in the published code, and left out there
        x = p.mean if step == process.num_timesteps - 1 else p.mean + torch.exp(0.5 * p.log_variance) * z
    return x


@torch.no_grad()
def ddim(
    process: GaussianDiffusion,
    model: Denoiser,
    x: Tensor,
    noise: Noise,
    *,
    eta: float = 0.0,
    clip_denoised: bool = True,
    progress: Progress = iter,
) -> Tensor:
    """DDIM (Song et al. 2020, eq. 12): x_T (B, C, ...) -> x_0. `eta` 0 is deterministic, 1 adds DDPM's noise."""
    for step in progress(range(process.num_timesteps)):
        t = _timestep(process.num_timesteps - 1 - step, x)
        pred_xstart = process.p_mean_variance(model(x, process.network_t(t)), x, t, clip_denoised).pred_xstart
        eps = process.predict_eps(x, t, pred_xstart)
        alpha_bar, alpha_bar_prev, _ = process.ddim_alphas(t, x)
        sigma = eta * torch.sqrt((1 - alpha_bar_prev) / (1 - alpha_bar)) * torch.sqrt(1 - alpha_bar / alpha_bar_prev)
        mean = pred_xstart * torch.sqrt(alpha_bar_prev) + torch.sqrt(1 - alpha_bar_prev - sigma**2) * eps
        x = mean + sigma * noise(step)  # sigma is 0 at the last step
    return x


@torch.no_grad()
def ddim_reverse(
    process: GaussianDiffusion,
    model: Denoiser,
    x: Tensor,
    *,
    clip_denoised: bool = True,
    progress: Progress = iter,
) -> Tensor:
    """The deterministic DDIM run backwards (Song et al. 2020, section 4.3): x_0 (B, C, ...) -> its x_T."""
    for step in progress(range(process.num_timesteps)):
        t = _timestep(step, x)
        pred_xstart = process.p_mean_variance(model(x, process.network_t(t)), x, t, clip_denoised).pred_xstart
        eps = process.predict_eps(x, t, pred_xstart)
        _, _, alpha_bar_next = process.ddim_alphas(t, x)
        x = pred_xstart * torch.sqrt(alpha_bar_next) + torch.sqrt(1 - alpha_bar_next) * eps
    return x


def _timestep(t: int, x: Tensor) -> Tensor:
    return torch.full((x.shape[0],), t, dtype=torch.int64, device=x.device)


def guided(model: Callable[..., Tensor], scale: float, channels: int, y: Tensor, **inputs: Tensor) -> Denoiser:
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6, whose 1 + w is `scale`): the mean's channels of the output
    go from those without a class towards those for `y`, and beyond where `scale` is above 1. The variance is `y`'s."""
    twice = {name: torch.cat([value, value]) for name, value in inputs.items()}
    both = torch.cat([torch.full_like(y, -1), y])

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        without, conditional = model(torch.cat([x, x]), torch.cat([t, t]), y=both, **twice).chunk(2)
        mean = torch.lerp(without[:, :channels], conditional[:, :channels], scale)
        return torch.cat([mean, conditional[:, channels:]], dim=1)

    return denoiser


def batches(indices: range, size: int) -> list[tuple[range, slice]]:
    """`indices` in batches of up to `size`, and where each lies in a tensor of all of them."""
    starts = range(indices.start, indices.stop, size)
    parts = [range(start, min(start + size, indices.stop)) for start in starts]
    return [(part, slice(part.start - indices.start, part.stop - indices.start)) for part in parts]


def draw(
    sampler: SamplerName,
    process: GaussianDiffusion,
    model: Callable[..., Tensor],
    shape: Sequence[int],
    *,
    batch: range,
    labels: Tensor | None,
    low_res: Tensor | None = None,
    guidance: float = 1.0,
    seed: int,
    device: torch.device,
    eta: float = 0.0,
    progress: Progress = iter,
) -> Tensor:
    """Draw images `batch` of `seed`, each the same whatever other images are drawn with it.

    Args:
        model: (x_t, t as the network is told it, and by name those of y and low_res that are given) -> its output.
        shape: of one image, (C, ...).
        labels: (len(batch),), or None for a model without classes.
        low_res: what an upsampler is to enlarge, (len(batch), C, ...) in [-1, 1], else None.
        guidance: see `guided`.
        progress: wraps the steps.

    Returns images (len(batch), *shape) in [-1, 1] on the CPU.
    """
    conditions = {"y": labels, "low_res": low_res}
    inputs = {name: value.to(device) for name, value in conditions.items() if value is not None}
    denoiser = partial(model, **inputs) if guidance == 1 else guided(model, guidance, shape[0], **inputs)
    x_T = picture_noise(batch, shape, device, seed, "x_T")
    noise = partial(picture_noise, batch, shape, device, seed)
    sample = ddpm if sampler == "ddpm" else partial(ddim, eta=eta)
    return sample(process, denoiser, x_T, noise, progress=progress).cpu()
