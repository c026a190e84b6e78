"""What else a trained model can do: show its steps, and fill in a part of an image.

Encoding is `samplers.ddim_reverse`; interpolations and variations are recipes in docs/sampling.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffusion.errors import UsageError
from diffusion.process import GaussianDiffusion
from diffusion.samplers import Progress


class Recorder:
    """A model for a sampler, which keeps x_t and the predicted x_0 of each evaluation, on the CPU.

    `timesteps` maps what the network is given of a timestep to its number in the process.
    """

    def __init__(self, process: GaussianDiffusion, model: Callable[..., Tensor]):
        self.process, self.model = process, model
        self.steps: list[tuple[Tensor, Tensor]] = []
        inputs = process.network_t(torch.arange(process.num_timesteps))
        self.timesteps = {float(value): i for i, value in enumerate(inputs)}

    def __call__(self, x: Tensor, t: Tensor, **conditions: Any) -> Tensor:
        output = self.model(x, t, **conditions)
        number = torch.full((len(x),), self.timesteps[float(t[0])], device=x.device)
        self.steps.append((x.cpu(), self.process.p_mean_variance(output, x, number).pred_xstart.cpu()))
        return output


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
