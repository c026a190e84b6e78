"""Training losses: simple, variational and hybrid (Nichol & Dhariwal 2021, sections 2.2 and 3.1)."""

import math
from collections.abc import Callable
from typing import Annotated, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion.errors import check_name
from diffusion.process import GaussianDiffusion

LossType = Literal["mse", "rescaled_mse", "kl", "rescaled_kl"]
Denoiser = Callable[[Tensor, Tensor], Tensor]
"""The interface of a network to losses and samplers: (x_t (B, C, ...), timestep input (B,)) -> output."""


def training_losses(
    process: GaussianDiffusion, model: Denoiser, x_start: Tensor, t: Tensor, noise: Tensor, loss_type: LossType,
    weights: Tensor | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """The loss of each image at its timestep, and its parts.

    `mse` is the simple loss (eq. 14). If the variance is learned, the variational bound is added, which trains the
    variance only: the mean is detached in it. `rescaled_mse` weights that bound by T / 1000, which is the paper's
    L_hybrid (eq. 16), whose factor is 0.001, at any T. `kl` is the variational bound of one step in bits per dimension
    (eqs. 4 to 7), `rescaled_kl` that times T, an estimate of the whole bound.

    Args:
        x_start: (B, C, ...) in [-1, 1].
        t: (B,), int64, in [0, T).
        noise: like `x_start`, standard normal.
        weights: (B,), factors of `mse` (see `WEIGHTINGS`).

    Returns `loss`, each (B,), and with the mse losses also their parts `mse` and, if the variance is learned, `vb`.
    """
    check_name("loss_type", loss_type, get_args(LossType))
    x_t = process.q_sample(x_start, t, noise)
    output = model(x_t, process.network_t(t))
    process.check_output(output, x_t)
    if loss_type in ("kl", "rescaled_kl"):
        vb = variational_bound(process, output, x_start, x_t, t)
        return {"loss": vb * process.num_timesteps if loss_type == "rescaled_kl" else vb}
    mean_output = output.chunk(2, dim=1)[0] if process.learns_variance else output
    mse = mean_flat((process.mean_target(x_start, x_t, t, noise) - mean_output) ** 2)
    mse = mse if weights is None else mse * weights
    if not process.learns_variance:
        return {"loss": mse, "mse": mse}
    frozen = torch.cat([mean_output.detach(), output.chunk(2, dim=1)[1]], dim=1)
    vb = variational_bound(process, frozen, x_start, x_t, t)
    vb = vb * (process.num_timesteps / 1000) if loss_type == "rescaled_mse" else vb
    return {"loss": mse + vb, "mse": mse, "vb": vb}


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
