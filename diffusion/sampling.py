"""Generating numbered images: image i of a seed is the same whatever others are generated with it.

Encoding is `samplers.ddim_reverse`; interpolations and variations are recipes in docs/sampling.md.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffusion.errors import UsageError, check_name, check_options
from diffusion.losses import Denoiser
from diffusion.process import GaussianDiffusion
from diffusion.randomness import image_noise
from diffusion.samplers import SAMPLERS, Progress, check_process, guided


def batches(indices: range, size: int) -> list[range]:
    """`indices` in batches of up to `size`."""
    return [range(start, min(start + size, indices.stop)) for start in range(indices.start, indices.stop, size)]


def sample_batch(
    process: GaussianDiffusion, model: Callable[..., Tensor], shape: Sequence[int], batch: range, *,
    sampler: str = "ddpm", options: Mapping[str, Any] | None = None, labels: Tensor | None = None,
    low_res: Tensor | None = None, guidance: float = 1.0, seed: int = 0, device: torch.device | str = "cpu",
    progress: Progress = iter, watch: Callable[[Denoiser], Denoiser] = lambda denoiser: denoiser,
) -> Tensor:  # fmt: skip
    """Generate images `batch` of `seed`. Each is the same whatever other images are generated with it.

    Args:
        model: called with x_t, its timestep input, and by keyword those of y and low_res that are given.
        shape: of one image, (C, *sizes).
        options: the sampler's keyword-only parameters.
        labels: (len(batch),), or None for a model without classes.
        low_res: the images that an upsampler enlarges, (len(batch), C, *sizes) in [-1, 1], else None.
        guidance: see `guided`.
        progress: wraps the steps.
        watch: wraps what the sampler calls at each step, after conditions and guidance.

    Returns images (len(batch), *shape) in [-1, 1] on the CPU.
    """
    if not isinstance(batch, range):
        raise UsageError(f"batch is {batch}; it must be the numbers of the images, such as range(4)")
    check_name("sampler", sampler, SAMPLERS)
    check_options(SAMPLERS[sampler].run, options or {})
    check_process(sampler, options or {}, process)
    if not 0 <= guidance < math.inf or (guidance != 1 and labels is None):
        raise UsageError(f"guidance is {guidance}; it must be a number of at least 0, and without labels 1")
    if not batch or (labels is not None and labels.min() < -1):
        raise UsageError(f"batch is {batch} and labels {labels}; there must be images, and labels from -1 (no class)")
    device, conditions = torch.device(device), {"y": labels, "low_res": low_res}
    inputs = {name: value.to(device) for name, value in conditions.items() if value is not None}
    denoiser = partial(model, **inputs) if guidance == 1 else guided(model, guidance, shape[0], **inputs)
    x_T = image_noise(batch, shape, device, seed, "x_T")
    noise = partial(image_noise, batch, shape, device, seed)
    return SAMPLERS[sampler].run(process, watch(denoiser), x_T, noise, progress, **options or {}).cpu()


def check_finite(images: Tensor) -> Tensor:
    """Generated images as they are. Raises UsageError if they are not finite: no grey level stands for that."""
    if not images.isfinite().all():
        raise UsageError("the generated images hold numbers that are not finite: the weights have diverged")
    return images


class Recorder:
    """Keeps x_t and the predicted x_0 of each evaluation of a sampler, on the CPU, in `steps`.

    `watch` is for `sample_batch`: what it wraps is conditioned and guided.
    """

    def __init__(self, process: GaussianDiffusion):
        self.process, self.steps = process, list[tuple[Tensor, Tensor]]()

    def watch(self, denoiser: Denoiser) -> Denoiser:
        def watched(x: Tensor, t: Tensor) -> Tensor:
            output = denoiser(x, t)
            every = torch.arange(self.process.num_timesteps, device=x.device)
            number = (t[:, None] - self.process.network_t(every)).abs().argmin(1)
            self.steps.append((x.cpu(), self.process.p_mean_variance(output, x, number).pred_xstart.cpu()))
            return output

        return watched


@torch.no_grad()
def inpaint(
    process: GaussianDiffusion, model: Callable[..., Tensor], known: Tensor, mask: Tensor,
    noise: Callable[[int], Tensor], progress: Progress = iter, *, resample: int = 5,
) -> Tensor:  # fmt: skip
    """Fill in images where `mask` is false (RePaint, Lugmayr et al. 2022, algorithm 1, with jumps of one step).

    Args:
        known: (B, C, *sizes) in [-1, 1], of which what the mask leaves is kept.
        mask: bool, of a shape that broadcasts to that of `known`.
        noise: returns the standard normal noise of each draw 0, 1, ..., shaped like `known`.
        resample: how often each step is done, so that the parts fit each other.

    Returns images in [-1, 1]. Raises UsageError if the mask does not fit.
    """
    try:
        mask = mask.expand(known.shape)
    except RuntimeError:
        raise UsageError(f"the mask is {tuple(mask.shape)}, and the images {tuple(known.shape)}") from None
    if mask.dtype != torch.bool:
        raise UsageError(f"the mask is {mask.dtype}; it must be torch.bool, true where an image is kept")
    draws = iter(range(10**9))
    x = noise(next(draws))
    for step in progress(range(process.num_timesteps)):
        t = torch.full((len(known),), process.num_timesteps - 1 - step, device=known.device)
        for again in range(resample if step < process.num_timesteps - 1 else 1):
            p = process.p_mean_variance(model(x, process.network_t(t)), x, t)
            if int(t[0]) == 0:
                return torch.where(mask, known, p.mean)
            before = p.mean + torch.exp(0.5 * p.log_variance) * noise(next(draws))
            x = torch.where(mask, process.q_sample(known, t - 1, noise(next(draws))), before)
            if again < resample - 1:  # back to t, by one step of q
                alpha_bar, alpha_bar_prev, _ = process.ddim_alphas(t, x)
                alpha = alpha_bar / alpha_bar_prev
                x = torch.sqrt(alpha) * x + torch.sqrt(1 - alpha) * noise(next(draws))
    return x
