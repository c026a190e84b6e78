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
from diffusion.losses import Denoiser
from diffusion.models.conditions import ABSENT, drop
from diffusion.process import GaussianDiffusion
from diffusion.randomness import image_noise
from diffusion.samplers import SAMPLERS, Progress, check_process, guided, noise_between


def batches(indices: range, size: int) -> list[range]:
    """`indices` in batches of up to `size`."""
    return [range(start, min(start + size, indices.stop)) for start in range(indices.start, indices.stop, size)]


def sample_batch(
    process: GaussianDiffusion, model: Callable[..., Tensor], shape: Sequence[int], batch: range, *,
    sampler: str = "ddpm", options: Mapping[str, Any] | None = None, labels: Tensor | None = None,
    conditions: Mapping[str, Tensor] | None = None, guidance: float = 1.0, guide: Denoiser | None = None,
    guide_between: Sequence[float] | None = None, seed: int = 0, device: torch.device | str = "cpu",
    progress: Progress = iter,
) -> Tensor:  # fmt: skip
    """Generate images `batch` of `seed`. Each is the same whatever other images are generated with it.

    Args:
        model: called with x_t, its timestep input, and by keyword the labels y, if given, and the conditions.
        shape: of one image, (C, *sizes).
        options: the sampler's keyword-only parameters.
        labels: (len(batch),), or None for a model without classes; also given as the condition y.
        conditions: the network's by name: y, vector, image, low_res, each of len(batch) rows.
        guidance: see `guided`; 1 is none.
        guide: called with x_t and its timestep input; None: the model without labels, vector and image.
        guide_between: the noise levels sigma / alpha that are guided.
        progress: wraps the steps.

    Returns images (len(batch), *shape) in [-1, 1] on the CPU.
    """
    if not isinstance(batch, range):
        raise UsageError(f"batch is {batch}; it must be the numbers of the images, such as range(4)")
    check_name("sampler", sampler, SAMPLERS)
    check_options(SAMPLERS[sampler].run, options or {})
    check_process(sampler, options or {}, process)
    given = {**({} if labels is None else {"y": labels}), **(conditions or {})}
    if not 0 <= guidance < math.inf or (guidance != 1 and guide is None and not given.keys() & ABSENT.keys()):
        raise UsageError(f"guidance is {guidance}; it must be at least 0, and without labels, conditions or a guide 1")
    y = given.get("y")
    if not batch or (y is not None and y.min() < -1):
        raise UsageError(f"batch is {batch} and labels {y}; there must be images, and labels from -1 (no class)")
    inputs = {name: value.to(device) for name, value in given.items()}
    denoiser: Denoiser = partial(model, **inputs)
    if guidance != 1:
        guide = guide or partial(model, **drop(inputs, torch.ones(len(batch), dtype=torch.bool, device=device)))
        within = [noise_between(process, *guide_between)] if guide_between is not None else []
        denoiser = guided(denoiser, guide, guidance, shape[0], *within)
    x_T = image_noise(batch, shape, device, seed, "x_T")
    noise = partial(image_noise, batch, shape, device, seed)
    return SAMPLERS[sampler].run(process, denoiser, x_T, noise, progress, **options or {}).cpu()


def check_finite(images: Tensor) -> Tensor:
    """Generated images as they are. Raises UsageError if they are not finite: no grey level stands for that."""
    if not images.isfinite().all():
        raise UsageError("the generated images hold numbers that are not finite: the weights have diverged")
    return images
