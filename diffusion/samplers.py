"""Samplers: free functions with one signature. (`ddim_reverse` encodes an image, and needs no noise.)

    x_0 = ddpm(process, model, x_T, noise)

A sampler works step by step from noise, without gradients. `noise(step)` returns the standard normal noise of the
loop's iteration `step` (0, 1, ...), shaped like x, so the caller decides what an image depends on. `progress` wraps the
loop's range, e.g. `tqdm.tqdm`. Keyword-only parameters are the sampler's options in configuration, on the command line
and in error messages; a tuple in an `Annotated` type is the option's range. `SAMPLERS` lists them.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion.errors import UsageError, options_of
from diffusion.losses import Denoiser
from diffusion.process import GaussianDiffusion

Noise = Callable[[int], Tensor]
Progress = Callable[[Iterable[int]], Iterable[int]]


@torch.no_grad()
def ddpm(
    process: GaussianDiffusion, model: Denoiser, x: Tensor, noise: Noise, progress: Progress = iter, *,
    clip_denoised: bool = True,
) -> Tensor:  # fmt: skip
    """Ancestral sampling (Ho et al. 2020, algorithm 2) with the process's variance: x_T (B, C, ...) -> x_0."""
    for step in progress(range(process.num_timesteps)):
        t = _timestep(process.num_timesteps - 1 - step, x)
        p = process.p_mean_variance(model(x, process.network_t(t)), x, t, clip_denoised)
        z = noise(step)  # drawn at the last step too, as in the published code, and left out there
        x = p.mean if step == process.num_timesteps - 1 else p.mean + torch.exp(0.5 * p.log_variance) * z
    return x


@torch.no_grad()
def ddim(
    process: GaussianDiffusion, model: Denoiser, x: Tensor, noise: Noise, progress: Progress = iter, *,
    eta: Annotated[float, (0, 1)] = 0.0, clip_denoised: bool = True,
) -> Tensor:  # fmt: skip
    """DDIM (Song et al. 2020, eq. 12): x_T (B, C, ...) -> x_0. `eta` 0 is deterministic, 1 adds DDPM's noise."""
    is_flow, squares = process.schedule.is_flow, ((process.tables[name] ** 2) for name in ("alpha", "sigma"))
    alphas2, sigmas2 = (
        torch.tensor([*square, end], dtype=x.dtype) for square, end in zip(squares, (1, 0), strict=True)
    )
    if not is_flow:
        sigmas2 = 1 - alphas2  # rounded as in the published code, which shows in the samples
    for step in progress(range(process.num_timesteps)):
        i = process.num_timesteps - 1 - step  # the step after 0 is -1, the data
        pred_xstart, eps = _predict(process, model, x, _timestep(i, x), clip_denoised)
        ratio = alphas2[i] / alphas2[i - 1]
        between = sigmas2[i] - ratio * sigmas2[i - 1] if is_flow else 1 - ratio  # the variance of q(x_t | x_{t-1})
        spread = eta * torch.sqrt(sigmas2[i - 1] / sigmas2[i]) * torch.sqrt(between)
        rest = torch.sqrt((sigmas2[i - 1] - spread**2).clamp(min=0))  # rounding can take it below 0
        x = torch.sqrt(alphas2[i - 1]) * pred_xstart + rest * eps + spread * noise(step)  # spread is 0 at the last step
    return x


@torch.no_grad()
def ddim_reverse(
    process: GaussianDiffusion, model: Denoiser, x: Tensor, progress: Progress = iter, *, clip_denoised: bool = True
) -> Tensor:
    """The deterministic DDIM run backwards (Song et al. 2020, section 4.3): x_0 (B, C, ...) -> its x_T."""
    for step in progress(range(process.num_timesteps)):
        t = _timestep(step, x)
        pred_xstart, eps = _predict(process, model, x, t, clip_denoised)
        next_alpha, next_sigma = process.path(step + 1)
        x = next_alpha * pred_xstart + next_sigma * eps
    return x


@torch.no_grad()
def dpmpp(
    process: GaussianDiffusion, model: Denoiser, x: Tensor, noise: Noise, progress: Progress = iter, *,
    order: Annotated[int, (1, 3)] = 2, clip_denoised: bool = True,
) -> Tensor:  # fmt: skip
    """DPM-Solver++ (Lu et al. 2022, algorithm 2), multistep: x_T (B, C, ...) -> x_0, deterministic.

    The exact solution between two steps (their eq. 8) is an integral of exp(lambda) times the predicted x_0, over
    lambda = log(alpha / sigma). The last `order` predictions are interpolated by a polynomial, whose integral is exact.
    Order 1 is DDIM.
    """
    alphas, sigmas = process.tables["alpha"], process.tables["sigma"]
    with np.errstate(divide="ignore"):
        lambdas = np.log(alphas / sigmas)
    history: list[Tensor] = []
    for i in progress(range(process.num_timesteps)[::-1]):
        history = [_predict(process, model, x, _timestep(i, x), clip_denoised)[0], *history[: order - 1]]
        if i == 0:
            x = history[0]  # the integral up to an infinite lambda
            continue
        nodes = lambdas[i : i + len(history)]
        weights = _exponential_weights(nodes[np.isfinite(nodes)], lambdas[i - 1])  # pure noise is infinitely far away
        x = float(sigmas[i - 1] / sigmas[i]) * x
        for weight, pred_xstart in zip(weights, history, strict=False):
            x = x + float(alphas[i - 1] * weight) * pred_xstart
    return x


@torch.no_grad()
def ipndm(
    process: GaussianDiffusion, model: Denoiser, x: Tensor, noise: Noise, progress: Progress = iter, *,
    order: Annotated[int, (1, 4)] = 4, clip_denoised: bool = True,
) -> Tensor:  # fmt: skip
    """iPNDM (Zhang & Chen 2022, section 3.3 and appendix): x_T (B, C, ...) -> x_0, deterministic.

    Adams-Bashforth with the coefficients of equal steps, on the predicted noise, in sigma / alpha. Order 1 is DDIM.
    """
    history: list[Tensor] = []
    for i in progress(range(process.num_timesteps)[::-1]):
        pred_xstart, eps = _predict(process, model, x, _timestep(i, x), clip_denoised)
        history = [eps, *history[: order - 1]]
        weights = ADAMS_BASHFORTH[len(history) - 1] if i else ADAMS_BASHFORTH[0]
        slope = torch.stack(history[: len(weights)], dim=-1) @ eps.new_tensor(weights)
        x = _follow(process, i, pred_xstart, eps, slope if len(weights) > 1 else eps)
    return x


@torch.no_grad()
def heun(
    process: GaussianDiffusion, model: Denoiser, x: Tensor, noise: Noise, progress: Progress = iter, *,
    clip_denoised: bool = True,
) -> Tensor:  # fmt: skip
    """Heun's method (Karras et al. 2022, algorithm 1), order 2, in sigma / alpha: x_T (B, C, ...) -> x_0.

    Deterministic. T steps take 2 T - 1 evaluations of the network.
    """
    for i in progress(range(process.num_timesteps)[::-1]):
        pred_xstart, eps = _predict(process, model, x, _timestep(i, x), clip_denoised)
        x = _follow(process, i, pred_xstart, eps, eps)
        if i and process.path(i)[0]:
            eps_next = _predict(process, model, x, _timestep(i - 1, x), clip_denoised)[1]
            x = _follow(process, i, pred_xstart, eps, (eps + eps_next) / 2)
    return x


@torch.no_grad()
def ode(
    process: GaussianDiffusion, model: Denoiser, x: Tensor, noise: Noise, progress: Progress = iter, *,
    order: Annotated[int, (1, 2)] = 2, clip_denoised: bool = True,
) -> Tensor:  # fmt: skip
    """Euler's (order 1) or Heun's method (2) for dx / ds = velocity, as flow matching samples (Ma et al. 2024, SiT):
    x_T (B, C, ...) -> x_0, deterministic.

    Of order 2, T steps take 2 T evaluations where the network predicts the velocity of a flow, of another flow 2 T - 1,
    and of a diffusion 2 T - 2.
    """
    s = np.append(process.schedule.path.s, 0.0)  # of step -1, the data
    # The slope of a diffusion's sigma is too steep at its first step, and the velocity alone is known at the data.
    cleanest = 1 if not process.schedule.is_flow else -1 if process.prediction == "velocity" else 0

    def velocity(x: Tensor, i: int) -> Tensor:
        t = _timestep(i, x)
        if i < 0:
            return model(x, process.network_t(t))[:, : x.shape[1]]
        pred_xstart, eps = _predict(process, model, x, t, clip_denoised)
        alpha_slope, sigma_slope = (float(process.tables[f"{name}_slope"][i]) for name in ("alpha", "sigma"))
        return alpha_slope * pred_xstart + sigma_slope * eps

    for i in progress(range(process.num_timesteps)[::-1]):
        step, slope = float(s[i - 1] - s[i]), velocity(x, i)
        if order == 2 and i > cleanest:
            slope = (slope + velocity(x + step * slope, i - 1)) / 2
        x = x + step * slope
    return x.clamp(-1, 1) if clip_denoised else x


@torch.no_grad()
def consistency(
    process: GaussianDiffusion, model: Denoiser, x: Tensor, noise: Noise, progress: Progress = iter, *,
    clip_denoised: bool = True,
) -> Tensor:  # fmt: skip
    """Sampling from a consistency model (Song et al. 2023, algorithm 1): x_T (B, C, ...) -> x_0.

    Each step predicts x_0, and the next one puts new noise on it, of a lower level.
    """
    pred_xstart = x
    for step in progress(range(process.num_timesteps)):
        t = _timestep(process.num_timesteps - 1 - step, x)
        x = process.q_sample(pred_xstart, t, noise(step)) if step else x
        pred_xstart = process.predict_xstart(model(x, process.network_t(t)), x, t, clip_denoised=False)
    return pred_xstart.clamp(-1, 1) if clip_denoised else pred_xstart


ADAMS_BASHFORTH = (1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24)


def _follow(process: GaussianDiffusion, i: int, pred_xstart: Tensor, eps: Tensor, slope: Tensor) -> Tensor:
    """From step i to the next cleaner one, in y = x / alpha and s = sigma / alpha, where dy / ds = epsilon: DDIM's step
    along `eps`, and what `slope` adds to it."""
    (alpha, sigma), (next_alpha, next_sigma) = process.path(i), process.path(i - 1)
    x = next_alpha * pred_xstart + next_sigma * eps
    return x if slope is eps else x + (next_sigma - next_alpha * (sigma / alpha)) * (slope - eps)


def _exponential_weights(nodes: NDArray[np.float64], end: float) -> NDArray[np.float64]:
    """The weights w_k, for which sum_k w_k f(nodes_k) is the integral of exp(lambda - end) f(lambda) from nodes_0 to
    `end`, for every polynomial f of a degree below the number of nodes. Without nodes, the one weight of a constant."""
    if not len(nodes):
        return np.ones(1)  # from an infinite distance, a constant
    h = end - nodes[0]
    moments = [-math.expm1(-h)]  # of ((lambda - nodes_0) / h)^j, by parts
    for j in range(1, len(nodes)):
        moments.append(1 - j * moments[-1] / h)
    return np.linalg.solve(np.vander((nodes - nodes[0]) / h, increasing=True).T, np.array(moments))


def _predict(
    process: GaussianDiffusion, model: Denoiser, x: Tensor, t: Tensor, clip_denoised: bool
) -> tuple[Tensor, Tensor]:
    """The predicted x_0, and the noise that leads from it to x."""
    pred_xstart = process.predict_xstart(model(x, process.network_t(t)), x, t, clip_denoised)
    return pred_xstart, process.predict_eps(x, t, pred_xstart)


def _timestep(t: int, x: Tensor) -> Tensor:
    return torch.full((x.shape[0],), t, dtype=torch.int64, device=x.device)


LARGEST_SIGNAL = 0.1
"""alpha of the noisiest step with which a solver begins."""


class Sampler(NamedTuple):
    """A sampler, and how it is used."""

    run: Callable[..., Tensor]
    usual_steps: str = "250"
    """the steps if none are given (see `place_timesteps`)"""
    solver: bool = False
    """whether it needs to begin with almost pure noise"""
    ancestral: bool = False
    """whether it draws from p(x_{t-1} | x_t), which a flow does not have"""
    placed: str = ""
    """the way in which a plain count of steps is placed"""


SAMPLERS = {
    "ddpm": Sampler(ddpm, ancestral=True),
    "ddim": Sampler(ddim, "50"),
    "dpmpp": Sampler(dpmpp, "logsnr12", solver=True),
    "ipndm": Sampler(ipndm, "logsnr12", solver=True),
    "heun": Sampler(heun, "logsnr10", solver=True),
    "ode": Sampler(ode, "25", solver=True),
    "consistency": Sampler(consistency, "2", solver=True, placed="jumps"),
}


def usual_steps(name: str, num_timesteps: int) -> str:
    """The steps of a sampler if none are given: all of a process with less than twice as many as its usual ones."""
    steps = SAMPLERS[name].usual_steps
    return steps if num_timesteps >= 2 * int(re.sub(r"\D", "", steps)) else ""


def check_process(name: str, options: Mapping[str, Any], process: GaussianDiffusion) -> None:
    """Raise UsageError where a sampler cannot work in a process: with fewer steps than its order, in a flow, or, for a
    solver, from a last step that is far from the pure noise it begins with."""
    sampler = SAMPLERS[name]
    if sampler.ancestral:
        process.check_diffusion(f"sampler {name}", "take ddim, dpmpp, ipndm, heun or ode")
    order, steps = {**options_of(sampler.run), **options}.get("order", 1), process.num_timesteps
    if steps < order:
        raise UsageError(f"{name} of order {order} needs at least {order} steps, and is given {steps}")
    signal = process.path(steps - 1)[0]
    if sampler.solver and signal > LARGEST_SIGNAL:
        step = f"the noisiest step, {process.schedule.timestep_map[-1]} of {process.schedule.original_steps}"
        right = f"it may hold {LARGEST_SIGNAL:.0%}, as that of logsnr10 does"
        raise UsageError(f"{name} begins with pure noise, and {step}, still holds {signal:.0%} of the image: {right}")


def guided(
    model: Denoiser, guide: Denoiser, scale: float, channels: int, within: Callable[[Tensor], bool] = lambda t: True
) -> Denoiser:
    """The mean channels of `guide`'s output, extrapolated through the model's where `within` holds: classifier-free
    guidance (Ho & Salimans 2022, eq. 6, whose 1 + w is `scale`) if the guide is the model without conditions,
    autoguidance (Karras et al. 2024, eq. 3) if it is a worse version."""

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        output = model(x, t)
        if not within(t):
            return output
        mean = torch.lerp(guide(x, t)[:, :channels], output[:, :channels], scale)
        return torch.cat([mean, output[:, channels:]], dim=1)

    return denoiser


def noise_between(process: GaussianDiffusion, low: float, high: float) -> Callable[[Tensor], bool]:
    """Whether sigma / alpha at a network's timesteps lies from `low` to `high`. Raises UsageError where none does."""
    levels = process.tables["sigma"] / np.maximum(process.tables["alpha"], 1e-300)
    data = [-1] if low <= 0 and process.schedule.is_flow else []
    steps = [*np.flatnonzero((low <= levels) & (levels <= high)), *data]
    inside = set(process.tables["network_t"].astype(np.float32)[np.array(steps, np.int64)].tolist())
    if low >= high or not steps:
        span = f"the steps' noise levels sigma / alpha are from {levels.min():.3g} to {levels.max():.3g}"
        raise UsageError(f"guide_between is [{low:g}, {high:g}], and {span}")
    return lambda t: t[0].item() in inside
