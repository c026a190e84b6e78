"""Bits per dimension of the data under the model."""

from __future__ import annotations

import math
from functools import partial

import torch

from diffusion import likelihood
from diffusion.data.base import DataSet, load, part
from diffusion.data.values import shrink, to_x_start
from diffusion.errors import UsageError
from diffusion.metrics.base import Score, Subject
from diffusion.randomness import image_noise


def check_levels(dataset: DataSet) -> None:
    """Raise UsageError if images have other levels than those of 8 bits, as far as some of them show."""
    if load(dataset, part(len(dataset), 256).tolist())[0].dtype != torch.uint8:
        raise UsageError("bits_per_dim counts the 256 levels of 8-bit images, and some of these data have others "
                         "(data.range, or 16 bits): choose --metric frechet,nearest")  # fmt: skip


def bits_per_dim(subject: Subject) -> Score:
    """The variational bound in bits per dimension, with its standard error over images. Each image is scored once.

    Raises UsageError if the bound is not finite.
    """
    from accelerate.utils import gather_object  # takes long to import

    saved, device = subject.saved, subject.state.device
    process = saved.config.diffusion.process(subject.steps)
    # Sums over images of: 1, the bound, its square, the prior, and the terms of the bound.
    sums = torch.zeros(4 + process.num_timesteps, dtype=torch.float64)
    mine = list(subject.data_batches())
    progress = subject.bar(len(mine) * process.num_timesteps)
    for batch, indices in mine:
        images, y = load(subject.dataset, indices)
        x_start = to_x_start(images.to(device))
        inputs = {"y": y.to(device)} if saved.class_names else {}
        if saved.config.data.low_res_size is not None:
            inputs["low_res"] = shrink(x_start, saved.config.data.low_res_size)
        noise = partial(image_noise, batch, x_start.shape[1:], device, subject.seed)
        model = partial(subject.network, **inputs)
        bits = likelihood.bits_per_dim(process, model, x_start, noise, progress)
        total = bits.total.double().cpu()
        head = torch.stack([torch.ones_like(total), total, total**2, bits.prior.double().cpu()])
        sums += torch.cat([head.sum(1), bits.vb.double().sum(0).cpu()])
    count, bound, square, prior, *vb = torch.stack(gather_object([sums])).sum(0).tolist()
    if not math.isfinite(bound):
        raise UsageError(f"the bound is {bound}: the weights of {saved.path} or their process give no likelihood")
    variance = max(0.0, square / count - (bound / count) ** 2) * count / (count - 1) if count > 1 else math.nan
    terms, error = [term / count for term in vb], math.sqrt(variance / count)
    figures = {"bits_per_dim": bound / count, "bits_per_dim_interval": 1.96 * error, "standard_error": error,
               "prior": prior / count, "terms": terms, "images": int(count), "steps": len(terms)}  # fmt: skip
    interval = f" +- {1.96 * error:.4f} (95% interval)" if count > 1 else ""
    quarters = (sum(terms[q * len(vb) // 4 : (q + 1) * len(vb) // 4]) for q in range(4))
    return Score(figures, best="bits_per_dim", lines=[
        f"{bound / count:.4f}{interval} bits per dimension: {int(count)} images, {len(vb)} steps, {saved.path}",
        f"prior {prior / count:.6f}; terms by quarter of t: {', '.join(f'{q:.4f}' for q in quarters)}",
    ])  # fmt: skip
