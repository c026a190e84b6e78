"""Samplers: free functions with one signature. (`ddim_reverse` encodes an image, and needs no noise.)

    x_0 = ddpm(process, model, x_T, noise)

A sampler works step by step from noise, without gradients. `noise(step)` returns the standard normal noise of the
loop's iteration `step` (0, 1, ...), shaped like x, so the caller decides what an image depends on. `progress` wraps the
loop's range, e.g. `tqdm.tqdm`. Keyword-only parameters are the sampler's options in configuration, on the command line
and in error messages; a tuple in an `Annotated` type is the option's range.

To add a sampler, write such a function and add it to `SAMPLERS`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, get_type_hints

import torch
from torch import Tensor

from diffusion.errors import UsageError, check_name, did_you_mean
from diffusion.losses import Denoiser
from diffusion.process import GaussianDiffusion

Noise = Callable[[int], Tensor]
Progress = Callable[[Iterable[int]], Iterable[int]]


@torch.no_grad()
def ddpm(
    process: GaussianDiffusion,
    model: Denoiser,
    x: Tensor,
    noise: Noise,
    progress: Progress = iter,
    *,
    clip_denoised: bool = True,
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
    progress: Progress = iter,
    *,
    eta: Annotated[float, (0, 1)] = 0.0,
    clip_denoised: bool = True,
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
    process: GaussianDiffusion, model: Denoiser, x: Tensor, progress: Progress = iter, *, clip_denoised: bool = True
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


SAMPLERS: dict[str, Callable[..., Tensor]] = {"ddpm": ddpm, "ddim": ddim}


def sampler_options(name: str) -> dict[str, Any]:
    """The options of a sampler, its keyword-only parameters, with their defaults."""
    parameters = inspect.signature(SAMPLERS[name]).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Raise UsageError, which begins with the option's name, where a sampler does not take `options`."""
    check_name("sampler", name, SAMPLERS)
    known, hints = sampler_options(name), get_type_hints(SAMPLERS[name], include_extras=True)
    for option, value in options.items():
        if option not in known:
            raise UsageError(f"{option} is not an option of {name}: {did_you_mean(option, known, 'it has')}")
        kind = type(known[option])
        numeric = (int, float) if kind is float else kind
        if not isinstance(value, numeric) or isinstance(value, bool) != (kind is bool):
            raise UsageError(f"{option} is {value}; it must be of type {kind.__name__}")
        for low, high in getattr(hints[option], "__metadata__", ()):
            if not low <= value <= high:
                raise UsageError(f"{option} is {value}; it must be from {low} to {high}")


def guided(model: Callable[..., Tensor], scale: float, channels: int, y: Tensor, **inputs: Tensor) -> Denoiser:
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6, whose 1 + w is `scale`).

    The mean channels of the output are extrapolated from those without a class through those for `y`; the variance
    channels are those for `y`.
    """
    twice = {name: torch.cat([value, value]) for name, value in inputs.items()}
    both = torch.cat([torch.full_like(y, -1), y])

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        without, conditional = model(torch.cat([x, x]), torch.cat([t, t]), y=both, **twice).chunk(2)
        mean = torch.lerp(without[:, :channels], conditional[:, :channels], scale)
        return torch.cat([mean, conditional[:, channels:]], dim=1)

    return denoiser
