"""Generating numbered images: image i of a seed is the same whatever others are generated with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffusion.config import Config
from diffusion.errors import UsageError
from diffusion.losses import Denoiser
from diffusion.process import GaussianDiffusion
from diffusion.randomness import image_noise
from diffusion.samplers import SAMPLERS, Progress, check_options, check_process, guided


def batches(indices: range, size: int) -> list[range]:
    """`indices` in batches of up to `size`."""
    return [range(start, min(start + size, indices.stop)) for start in range(indices.start, indices.stop, size)]


def sample_batch(
    process: GaussianDiffusion,
    model: Callable[..., Tensor],
    shape: Sequence[int],
    batch: range,
    *,
    sampler: str = "ddpm",
    options: Mapping[str, Any] | None = None,
    labels: Tensor | None = None,
    low_res: Tensor | None = None,
    guidance: float = 1.0,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress = iter,
    watch: Callable[[Denoiser], Denoiser] = lambda denoiser: denoiser,
) -> Tensor:
    """Generate images `batch` of `seed`. Each is the same whatever other images are generated with it.

    Args:
        model: called with x_t, its timestep input, and by keyword those of y and low_res that are given.
        shape: of one image, (C, *sizes).
        options: the sampler's (see `sampler_options`).
        labels: (len(batch),), or None for a model without classes.
        low_res: the images that an upsampler enlarges, (len(batch), C, *sizes) in [-1, 1], else None.
        guidance: see `guided`.
        progress: wraps the steps.
        watch: wraps what the sampler calls at each step, after conditions and guidance.

    Returns images (len(batch), *shape) in [-1, 1] on the CPU.
    """
    if not isinstance(batch, range):
        raise UsageError(f"batch is {batch}; it must be the numbers of the images, such as range(4)")
    check_options(sampler, options or {})
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
    return SAMPLERS[sampler](process, watch(denoiser), x_T, noise, progress, **options or {}).cpu()


def check_finite(images: Tensor) -> Tensor:
    """Generated images as they are. Raises UsageError if they are not finite: no grey level stands for that."""
    if not images.isfinite().all():
        raise UsageError("the generated images hold numbers that are not finite: the weights have diverged")
    return images


def generate(
    config: Config,
    network: Callable[..., Tensor],
    indices: Sequence[range],
    *,
    labels: Sequence[int] | None = None,
    low_res: Callable[[range], Tensor] | None = None,
    **options: Any,
) -> Iterator[tuple[range, Tensor]]:
    """Generate images of a run, with the sampler, steps, options and guidance of its section `sample`.

    Args:
        network: the run's, in evaluation mode.
        indices: the numbers of the images, in batches. Image i of a seed is the same in any batch.
        labels: class numbers, of which image i takes number i modulo their count; None without classes.
        low_res: for an upsampler, a function from a batch to its small images in [-1, 1].
        options: seed, device, progress and watch (see `sample_batch`).

    Yields each batch and its images (N, C, *sizes) in [-1, 1], on the CPU.
    """
    settings = config.sample
    process, shape = config.sampling_process(), config.data.shape
    options |= {"sampler": settings.sampler, "options": settings.options, "guidance": settings.guidance}
    for batch in indices:
        y = torch.tensor([labels[i % len(labels)] for i in batch]) if labels else None
        small = low_res(batch) if low_res else None
        yield batch, sample_batch(process, network, shape, batch, labels=y, low_res=small, **options)
