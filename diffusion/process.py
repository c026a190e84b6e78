"""The diffusion process: q(x_t | x_0), its posterior, and p(x_{t-1} | x_t) from the network's output.

Equation numbers are those of Nichol & Dhariwal (2021). Images are (B, C, ...) in [-1, 1]; t is (B,), int64,
from 0 (nearly clean) to T - 1 (nearly noise).
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion.errors import UsageError, check_name
from diffusion.schedule import Schedule

VarianceType = Literal["fixed_small", "fixed_large", "learned", "learned_range"]


class PMeanVariance(NamedTuple):
    """Mean and log variance of p(x_{t-1} | x_t), and the predicted x_0. Each is shaped like x_t."""

    mean: Tensor
    log_variance: Tensor
    pred_xstart: Tensor


class GaussianDiffusion:
    """A Gaussian diffusion process and the meaning of a network's output in it.

    Args:
        schedule: the betas.
        prediction: what the network predicts: the noise (epsilon), x_0 (x_start), the mean of x_{t-1} (previous_x), or
            v = alpha epsilon - sigma x_0 (Salimans & Ho 2022, section 4), with x_t = alpha x_0 + sigma epsilon.
        variance_type: where the variance of p comes from. `fixed_small` is the posterior's, `fixed_large` is beta;
            `learned` reads its logarithm from a second half of the output's channels, `learned_range` reads there
            how far it lies between the two fixed ones (eq. 15).
        rescale_timesteps: give the network t as if the original process had 1000 steps.

    Attributes:
        tables: the coefficients of the equations by name: float64 arrays (T,), looked up in float32.
    """

    def __init__(
        self, schedule: Schedule, prediction: str = "epsilon", variance_type: VarianceType = "learned_range",
        rescale_timesteps: bool = True,
    ):  # fmt: skip
        check_name("prediction", prediction, PREDICTIONS)
        check_name("variance_type", variance_type, get_args(VarianceType))
        self.schedule, self.prediction, self.variance_type = schedule, prediction, variance_type
        betas = schedule.betas
        alphas_cumprod = np.cumprod(1 - betas)
        if alphas_cumprod[-1] == 0 and prediction not in ("v", "x_start"):
            right = "where the schedule ends in pure noise, it must be v or x_start"
            raise UsageError(f"prediction is {prediction}, which does not determine x_0 in pure noise: {right}")
        alphas_cumprod_prev = np.append(1.0, alphas_cumprod[:-1])
        # q(x_{t-1} | x_t, x_0), eqs. 10 and 11. Its variance is 0 at t = 0, so its logarithm uses that of t = 1.
        posterior_variance = betas * (1 - alphas_cumprod_prev) / (1 - alphas_cumprod)
        first_variance = posterior_variance[1:2] if len(betas) > 1 else betas
        coef1 = betas * np.sqrt(alphas_cumprod_prev) / (1 - alphas_cumprod)
        coef2 = (1 - alphas_cumprod_prev) * np.sqrt(1 - betas) / (1 - alphas_cumprod)
        with np.errstate(divide="ignore"):  # infinite in pure noise, and read there by no prediction that is allowed
            recip_alphas_cumprod, recip_coef1 = 1 / alphas_cumprod, 1 / coef1
        network_t = np.array(schedule.timestep_map, dtype=np.float32)
        if rescale_timesteps:  # float32 as in the published code: the embedding's fastest sinusoid sees the difference
            network_t = network_t * np.float32(1000 / schedule.original_steps)
        self.tables: dict[str, NDArray[Any]] = {
            "betas": betas,
            "log_betas": np.log(betas),
            "alphas_cumprod": alphas_cumprod,
            "alphas_cumprod_prev": alphas_cumprod_prev,
            "alphas_cumprod_next": np.append(alphas_cumprod[1:], 0.0),
            "sqrt_alphas_cumprod": np.sqrt(alphas_cumprod),
            "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - alphas_cumprod),
            "log_one_minus_alphas_cumprod": np.log(1 - alphas_cumprod),
            "sqrt_recip_alphas_cumprod": np.sqrt(recip_alphas_cumprod),
            "sqrt_recipm1_alphas_cumprod": np.sqrt(recip_alphas_cumprod - 1),
            "posterior_variance": posterior_variance,
            "posterior_log_variance_clipped": np.log(np.append(first_variance, posterior_variance[1:])),
            "posterior_mean_coef1": coef1,
            "posterior_mean_coef2": coef2,
            "recip_posterior_mean_coef1": recip_coef1,
            "posterior_mean_coef2_over_coef1": coef2 / coef1,
            "fixed_large_log_variance": np.log(np.append(first_variance, betas[1:])),
            "network_t": network_t,
            "snr": alphas_cumprod / (1 - alphas_cumprod),
        }
        self._on_device: dict[tuple[str, torch.device], Tensor] = {}

    @property
    def num_timesteps(self) -> int:
        """T, the number of steps left after respacing."""
        return len(self.schedule.betas)

    @property
    def learns_variance(self) -> bool:
        """Whether the network's output has a second half for the variance."""
        return self.variance_type in ("learned", "learned_range")

    def network_t(self, t: Tensor) -> Tensor:
        """The network's timestep input for the steps `t`: (B,), in the original process's numbering."""
        return self._table("network_t", t.device)[t]

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t given x_0 and the noise (eq. 9)."""
        signal = self.at("sqrt_alphas_cumprod", t, x_start)
        return signal * x_start + self.at("sqrt_one_minus_alphas_cumprod", t, x_start) * noise

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of q(x_t | x_0) (eq. 8)."""
        log_variance = self.at("log_one_minus_alphas_cumprod", t, x_start)
        return self.at("sqrt_alphas_cumprod", t, x_start) * x_start, log_variance

    def q_posterior(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance (clipped at t = 0) of q(x_{t-1} | x_t, x_0) (eqs. 10 to 12)."""
        mean = self.at("posterior_mean_coef1", t, x_t) * x_start + self.at("posterior_mean_coef2", t, x_t) * x_t
        return mean, self.at("posterior_log_variance_clipped", t, x_t)

    def p_mean_variance(self, output: Tensor, x_t: Tensor, t: Tensor, clip_denoised: bool = True) -> PMeanVariance:
        """p(x_{t-1} | x_t) from the network's output at x_t.

        Args:
            output: (B, C, ...), or (B, 2C, ...) where the variance is learned.
            clip_denoised: keep the predicted x_0 in [-1, 1].
        """
        mean_output, log_variance = self._split(output, x_t, t)
        pred_xstart = PREDICTIONS[self.prediction].x_start(self, mean_output, x_t, t)
        if clip_denoised:
            pred_xstart = pred_xstart.clamp(-1, 1)
        # The mean follows from the predicted x_0, except where the network predicts the mean itself.
        mean = mean_output if self.prediction == "previous_x" else self.q_posterior(pred_xstart, x_t, t)[0]
        return PMeanVariance(mean, log_variance.expand_as(x_t), pred_xstart)

    def predict_eps(self, x_t: Tensor, t: Tensor, pred_xstart: Tensor) -> Tensor:
        """The noise that leads from `pred_xstart` to x_t: eq. 9 solved for epsilon."""
        noise = x_t - self.at("sqrt_alphas_cumprod", t, x_t) * pred_xstart
        return noise / self.at("sqrt_one_minus_alphas_cumprod", t, x_t)

    def mean_target(self, x_start: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The target of the network's mean channels at x_t."""
        return PREDICTIONS[self.prediction].target(self, x_start, x_t, t, noise)

    def ddim_alphas(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """alphas_cumprod at t, one step towards the data, and one step towards the noise, to multiply with `like`."""
        now, before, after = (self.at(f"alphas_cumprod{suffix}", t, like) for suffix in ("", "_prev", "_next"))
        return now, before, after

    def check_output(self, output: Tensor, x_t: Tensor) -> None:
        """Raise UsageError if the network's output does not have the channels of this process."""
        wanted = x_t.shape[1] * (2 if self.learns_variance else 1)
        if output.shape[1] != wanted:
            right = f"variance_type {self.variance_type} needs {wanted} for images of {x_t.shape[1]}"
            raise UsageError(f"the network's output has {output.shape[1]} channels; {right}")

    def _split(self, output: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The mean's part of the output, and the log variance."""
        self.check_output(output, x_t)
        if self.variance_type == "fixed_small":
            return output, self.at("posterior_log_variance_clipped", t, x_t)
        if self.variance_type == "fixed_large":
            return output, self.at("fixed_large_log_variance", t, x_t)
        mean_output, variance_output = output.chunk(2, dim=1)
        if self.variance_type == "learned":
            return mean_output, variance_output
        smallest, largest = (self.at(name, t, x_t) for name in ("posterior_log_variance_clipped", "log_betas"))
        fraction = (variance_output + 1) / 2
        return mean_output, fraction * largest + (1 - fraction) * smallest

    def at(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """The table `name` at `t`, shaped (B, 1, ...) to multiply with `like`."""
        return self._table(name, t.device)[t].view(-1, *[1] * (like.ndim - 1))

    def _table(self, name: str, device: torch.device) -> Tensor:
        """The table `name` in float32 on `device`, created at its first use."""
        if (name, device) not in self._on_device:
            self._on_device[name, device] = torch.tensor(self.tables[name], dtype=torch.float32, device=device)
        return self._on_device[name, device]


class Prediction(NamedTuple):
    """What the network's mean channels stand for."""

    target: Callable[[GaussianDiffusion, Tensor, Tensor, Tensor, Tensor], Tensor]
    """(process, x_start, x_t, t, noise) -> what they are trained to be."""
    x_start: Callable[[GaussianDiffusion, Tensor, Tensor, Tensor], Tensor]
    """(process, mean channels, x_t, t) -> the predicted x_0."""
    error: Callable[[GaussianDiffusion], NDArray[np.float64]]
    """process -> (T,), the squared error of these channels where that of the predicted x_0 is 1."""


def _x_start_from_epsilon(process: GaussianDiffusion, epsilon: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """Eq. 9 solved for x_0."""
    noise = process.at("sqrt_recipm1_alphas_cumprod", t, x_t) * epsilon
    return process.at("sqrt_recip_alphas_cumprod", t, x_t) * x_t - noise


def _x_start_from_previous_x(process: GaussianDiffusion, mean: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """Eq. 11 solved for x_0."""
    share_of_x_t = process.at("posterior_mean_coef2_over_coef1", t, x_t) * x_t
    return process.at("recip_posterior_mean_coef1", t, x_t) * mean - share_of_x_t


def _v(process: GaussianDiffusion, x_start: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Salimans & Ho (2022), section 4."""
    signal = process.at("sqrt_alphas_cumprod", t, x_t)
    return signal * noise - process.at("sqrt_one_minus_alphas_cumprod", t, x_t) * x_start


def _x_start_from_v(process: GaussianDiffusion, v: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    noise = process.at("sqrt_one_minus_alphas_cumprod", t, x_t) * v
    return process.at("sqrt_alphas_cumprod", t, x_t) * x_t - noise


PREDICTIONS = {
    "epsilon": Prediction(
        lambda process, x_start, x_t, t, noise: noise, _x_start_from_epsilon, lambda process: process.tables["snr"]
    ),
    "x_start": Prediction(
        lambda process, x_start, x_t, t, noise: x_start,
        lambda process, x_start, x_t, t: x_start,
        lambda process: np.ones(process.num_timesteps),
    ),
    "previous_x": Prediction(
        lambda process, x_start, x_t, t, noise: process.q_posterior(x_start, x_t, t)[0],
        _x_start_from_previous_x,
        lambda process: process.tables["posterior_mean_coef1"] ** 2,
    ),
    "v": Prediction(_v, _x_start_from_v, lambda process: process.tables["snr"] + 1),
}
