"""What else a trained model can do: show its steps, and fill in a part of an image.

Encoding is `samplers.ddim_reverse`; interpolations and variations are recipes in docs/sampling.md.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffusion.errors import UsageError
from diffusion.losses import Denoiser
from diffusion.process import GaussianDiffusion
from diffusion.samplers import Progress


class Recorder:
    """Keeps x_t and the predicted x_0 of each evaluation of a sampler, on the CPU, in `steps`.

    `watch` is for `sample_batch`: what it wraps is conditioned and guided.
    """

    def __init__(self, process: GaussianDiffusion):
        self.process = process
        self.steps: list[tuple[Tensor, Tensor]] = []

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
    process: GaussianDiffusion,
    model: Callable[..., Tensor],
    known: Tensor,
    mask: Tensor,
    noise: Callable[[int], Tensor],
    progress: Progress = iter,
    *,
    resample: int = 5,
) -> Tensor:
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
