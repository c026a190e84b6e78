"""Training losses: simple, variational and hybrid (Nichol & Dhariwal 2021, sections 2.2 and 3.1)."""

import math
from collections.abc import Callable
from typing import Annotated, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion.errors import check_name
from diffusion.process import GaussianDiffusion

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""The interface of a network to losses and samplers: (x_t (B, C, ...), timestep input (B,)) -> output."""
Parts = dict[str, Tensor]
"""What the loss of each image is the sum of, by name: each (B,)."""
HUBER, FIRST_GAP = 0.03, 0.7
"""Of consistency: the distance below which it is a square, above which a norm; its gap when training begins."""


class Case(NamedTuple):
    """Images (B, C, ...) in [-1, 1], the timesteps (B,) and noise at which a network is trained on them, and which
    share of its training is done."""

    process: GaussianDiffusion
    model: Denoiser
    x_start: Tensor
    t: Tensor
    noise: Tensor
    done: float = 1.0

    def noised(self) -> tuple[Tensor, Tensor]:
        """x_t, and the network's output there."""
        x_t = self.process.q_sample(self.x_start, self.t, self.noise)
        output = self.model(x_t, self.process.network_t(self.t))
        self.process.check_output(output, x_t)
        return x_t, output


Loss = Callable[[Case], Parts]


def training_losses(
    process: GaussianDiffusion, model: Denoiser, x_start: Tensor, t: Tensor, noise: Tensor, loss_type: Loss | str,
    weights: Tensor | None = None, done: float = 1.0,
) -> Parts:  # fmt: skip
    """The loss of each image at its timestep, and its parts. The arguments are those of a `Case`, and these:

    Args:
        loss_type: a loss, or its name in `LOSSES`.
        weights: (B,), factors of the part `mse` (see `WEIGHTINGS`).

    Returns `loss`, (B,), and with the mse losses also their parts `mse` and, if the variance is learned, `vb`.
    """
    if isinstance(loss_type, str):
        check_name("loss_type", loss_type, LOSSES)
        loss_type = LOSSES[loss_type]
    parts = loss_type(Case(process, model, x_start, t, noise, done))
    if weights is not None and "mse" in parts:
        parts["mse"] = parts["mse"] * weights
    return parts | {"loss": torch.stack(list(parts.values())).sum(0)}


def mse(case: Case, vb_factor: float = 1.0) -> Parts:
    """The simple loss (eq. 14). If the variance is learned, the variational bound is added, which trains the variance
    only: the mean is detached in it."""
    process, x_start, t = case.process, case.x_start, case.t
    x_t, output = case.noised()
    mean_output, variance_output = output[:, : x_t.shape[1]], output[:, x_t.shape[1] :]
    mse = mean_flat((process.mean_target(x_start, x_t, t, case.noise) - mean_output) ** 2)
    if not process.learns_variance:
        return {"mse": mse}
    frozen = torch.cat([mean_output.detach(), variance_output], dim=1)
    return {"mse": mse, "vb": variational_bound(process, frozen, x_start, x_t, t) * vb_factor}


def rescaled_mse(case: Case) -> Parts:
    """`mse` with the bound weighted by T / 1000: the paper's L_hybrid (eq. 16), whose factor is 0.001, at any T."""
    return mse(case, case.process.num_timesteps / 1000)


def kl(case: Case) -> Parts:
    """The variational bound of one step in bits per dimension (eqs. 4 to 7)."""
    x_t, output = case.noised()
    return {"loss": variational_bound(case.process, output, case.x_start, x_t, case.t)}


def rescaled_kl(case: Case) -> Parts:
    """`kl` times T, an estimate of the whole bound."""
    return {"loss": kl(case)["loss"] * case.process.num_timesteps}


def consistency(case: Case, *, gap: Annotated[float, (1e-9, 0.999)] = 0.05) -> Parts:
    """Consistency training of a finished diffusion model (Geng et al. 2024, "Consistency models made easy", section 3).

    The distance of the predicted x_0 to that at a lower level sigma / alpha of the same noise (at the data, x_0
    itself), over the share by which the level is lower, which falls to `gap`, and over the root of the level.
    """
    process, t, gap = case.process, case.t, FIRST_GAP * (gap / FIRST_GAP) ** case.done
    with np.errstate(divide="ignore"):  # infinite in pure noise
        levels = process.tables["sigma"] / process.tables["alpha"]
    lower = np.minimum(np.searchsorted(levels, levels * (1 - gap), side="right"), np.arange(len(levels))) - 1
    share = 1 - np.append(levels, 0.0)[lower] / levels
    weight = 1 / (share * np.sqrt(np.minimum(levels, levels[np.isfinite(levels)].max(initial=1.0))))
    r, weights = (torch.from_numpy(each).to(t.device)[t] for each in (lower, weight.astype(np.float32)))

    def predicted(t: Tensor) -> Tensor:
        x_t, output = case._replace(t=t).noised()
        return process.predict_xstart(output, x_t, t, clip_denoised=False)

    with torch.no_grad(), torch.random.fork_rng([t.device] if t.is_cuda else []):  # the same dropout in both
        target = torch.where((r < 0).view(-1, *[1] * (case.x_start.ndim - 1)), case.x_start, predicted(r.clamp(min=0)))
    squared = mean_flat((predicted(t) - target) ** 2)
    return {"loss": ((squared + HUBER**2).sqrt() - HUBER) * weights}


def variational_bound(
    process: GaussianDiffusion, output: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor, clip_denoised: bool = False
) -> Tensor:
    """One term of the variational bound in bits per dimension, (B,): L_0 at t = 0 (eq. 5), else L_{t-1} (eq. 6)."""
    true_mean, true_log_variance = process.q_posterior(x_start, x_t, t)
    p = process.p_mean_variance(output, x_t, t, clip_denoised)
    kl = mean_flat(normal_kl(true_mean, true_log_variance, p.mean, p.log_variance))
    nll = -mean_flat(discretized_gaussian_log_likelihood(x_start, p.mean, 0.5 * p.log_variance))
    return torch.where(t == 0, nll, kl) / math.log(2)


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N(mean1, exp(log_variance1)) || N(mean2, exp(log_variance2))) in nats, element by element."""
    # In the published order of the sum: near t = T the terms cancel, and float32 keeps three digits of the rest.
    variances = -1 + log_variance2 - log_variance1 + torch.exp(log_variance1 - log_variance2)
    return 0.5 * (variances + (mean1 - mean2) ** 2 * torch.exp(-log_variance2))


def discretized_gaussian_log_likelihood(x: Tensor, means: Tensor, log_scales: Tensor) -> Tensor:
    """Log probability in nats of 8-bit values under a Gaussian, element by element.

    A value owns the interval of half a level around it, the outermost two everything beyond (Ho et al. 2020,
    eq. 13). `x` holds levels scaled to [-1, 1].
    """
    inverse_scale = torch.exp(-log_scales)
    cdf_above = _approx_standard_normal_cdf(inverse_scale * (x - means + 1 / 255))
    cdf_below = _approx_standard_normal_cdf(inverse_scale * (x - means - 1 / 255))
    probability = torch.where(x < -0.999, cdf_above, torch.where(x > 0.999, 1 - cdf_below, cdf_above - cdf_below))
    return probability.clamp(min=1e-12).log()


def _approx_standard_normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation with which the published models were trained and scored."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def mean_flat(x: Tensor) -> Tensor:
    """The mean of each image: (B, ...) -> (B,)."""
    return x.flatten(1).mean(1)


def unweighted(process: GaussianDiffusion) -> NDArray[np.float64]:
    """The simple loss, eq. 14."""
    return np.ones(process.num_timesteps)


def min_snr(process: GaussianDiffusion, *, gamma: Annotated[float, (1e-9, 1e9)] = 5.0) -> NDArray[np.float64]:
    """Errors of the predicted x_0 by min(signal-to-noise ratio, `gamma`) (Hang et al. 2023, section 3.4)."""
    return np.minimum(process.tables["snr"], gamma) / process.squared_error(process.prediction)


def as_velocity(process: GaussianDiffusion) -> NDArray[np.float64]:
    """Errors of the predicted velocity, whatever the network predicts."""
    return process.squared_error("velocity") / process.squared_error(process.prediction)


def likelihood(process: GaussianDiffusion) -> NDArray[np.float64]:
    """Errors of the predicted noise by -d log(alpha / sigma) / ds, as in a continuous variational bound (Kingma et al.
    2021, eq. 17; SiT)."""
    table = process.tables
    turned = table["alpha"] * table["sigma_slope"] - table["sigma"] * table["alpha_slope"]
    return turned * table["alpha"] / table["sigma"] ** 3 / process.squared_error(process.prediction)


WEIGHTINGS: dict[str, Callable[..., NDArray[np.float64]]] = {
    "none": unweighted,
    "min_snr": min_snr,
    "velocity": as_velocity,
    "likelihood": likelihood,
}
"""process -> (T,), factors of the simple loss of each timestep."""

LOSSES: dict[str, Loss] = {
    "mse": mse,
    "rescaled_mse": rescaled_mse,
    "kl": kl,
    "rescaled_kl": rescaled_kl,
    "consistency": consistency,
}
"""The parts of the loss of each image."""
