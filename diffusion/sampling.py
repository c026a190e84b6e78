"""Generating numbered images: image i of a seed is the same whatever others are generated with it.

Encoding is `samplers.ddim_reverse`. Interpolations, variations, filling in, and an image's steps are recipes in
docs/sampling.md.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffusion.errors import UsageError, check_name, check_options
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
    progress: Progress = iter,
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
    return SAMPLERS[sampler].run(process, denoiser, x_T, noise, progress, **options or {}).cpu()


def check_finite(images: Tensor) -> Tensor:
    """Generated images as they are. Raises UsageError if they are not finite: no grey level stands for that."""
    if not images.isfinite().all():
        raise UsageError("the generated images hold numbers that are not finite: the weights have diverged")
    return images
