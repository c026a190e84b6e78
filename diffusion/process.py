"""The diffusion process: q(x_t | x_0), its posterior, and p(x_{t-1} | x_t) from the network's output.

Equation numbers are those of Nichol & Dhariwal (2021). Images are (B, C, ...) in [-1, 1]; t is (B,), int64,
from 0 (nearly clean) to T - 1 (nearly noise).
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from diffusion.errors import UsageError, check_name
from diffusion.schedule import Array, Schedule

VarianceType = Literal["fixed_small", "fixed_large", "learned", "learned_range"]


class PMeanVariance(NamedTuple):
    """Mean and log variance of p(x_{t-1} | x_t), and the predicted x_0. Each is shaped like x_t."""

    mean: Tensor
    log_variance: Tensor
    pred_xstart: Tensor


class GaussianDiffusion:
    """A Gaussian process x_t = alpha x_0 + sigma epsilon, and the meaning of a network's output in it.

    Args:
        schedule: alpha and sigma at each step. Those of a diffusion come from betas; a flow has none, and so no
            posterior, no ancestral sampling and no variational bound.
        prediction: what the network predicts (see `PREDICTIONS`).
        variance_type: where the variance of p comes from. `fixed_small` is the posterior's, `fixed_large` is beta;
            `learned` reads its logarithm from a second half of the output's channels, `learned_range` reads there
            how far it lies between the two fixed ones (eq. 15). A flow does not use it.
        rescale_timesteps: give the network t as if the original process had 1000 steps. Of a flow, it is given 1000 s,
            or else 1 - s, the time of SiT, which goes from 0 (noise) to 1 (data).

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
        self.tables = _path_tables(schedule, rescale_timesteps)
        if schedule.betas is not None:
            self.tables |= _diffusion_tables(schedule.betas)
        elif self.learns_variance:
            raise UsageError(f"variance is {variance_type}, and a flow has none to learn: it must be fixed_small")
        # x_t and the output are two equations for x_0 and epsilon; this is what they give for x_0.
        alpha, sigma = self.tables["alpha"], self.tables["sigma"]
        of_x_start, of_noise = (part + np.zeros(len(alpha)) for part in PREDICTIONS[prediction](self))
        determinant = alpha * of_noise - sigma * of_x_start
        if abs(determinant[-1]) <= (1e-4 if schedule.is_flow else 0):
            right = "where the path ends in pure noise, it must be v, velocity or x_start, or a flow's s_max be below 1"
            raise UsageError(f"prediction is {prediction}, which does not determine x_0 in pure noise: {right}")
        self.tables |= {"target_x_start": of_x_start, "target_noise": of_noise}
        self.tables |= {"x_start_from_x_t": of_noise / determinant, "x_start_from_output": -sigma / determinant}
        self._on_device: dict[tuple[str, torch.device], Tensor] = {}

    @property
    def num_timesteps(self) -> int:
        """T, the number of steps left after respacing."""
        return len(self.schedule.timestep_map)

    @property
    def learns_variance(self) -> bool:
        """Whether the network's output has a second half for the variance."""
        return self.variance_type in ("learned", "learned_range")

    def network_t(self, t: Tensor) -> Tensor:
        """The network's timestep input for the steps `t`: (B,), in the original process's numbering."""
        return self._table("network_t", t.device)[t]

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t given x_0 and the noise (eq. 9)."""
        return self.at("alpha", t, x_start) * x_start + self.at("sigma", t, x_start) * noise

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of q(x_t | x_0) (eq. 8)."""
        return self.at("alpha", t, x_start) * x_start, self.at("log_one_minus_alphas_cumprod", t, x_start)

    def q_posterior(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance (clipped at t = 0) of q(x_{t-1} | x_t, x_0) (eqs. 10 to 12)."""
        self.check_diffusion("q(x_{t-1} | x_t, x_0)")
        mean = self.at("posterior_mean_coef1", t, x_t) * x_start + self.at("posterior_mean_coef2", t, x_t) * x_t
        return mean, self.at("posterior_log_variance_clipped", t, x_t)

    def predict_xstart(self, output: Tensor, x_t: Tensor, t: Tensor, clip_denoised: bool = True) -> Tensor:
        """The x_0 that the network's output at x_t says.

        Args:
            output: (B, C, ...), or (B, 2C, ...) where the variance is learned.
            clip_denoised: keep the predicted x_0 in [-1, 1].
        """
        self.check_output(output, x_t)
        part = self.at("x_start_from_output", t, x_t) * output[:, : x_t.shape[1]]
        pred_xstart = self.at("x_start_from_x_t", t, x_t) * x_t + part
        return pred_xstart.clamp(-1, 1) if clip_denoised else pred_xstart

    def p_mean_variance(self, output: Tensor, x_t: Tensor, t: Tensor, clip_denoised: bool = True) -> PMeanVariance:
        """p(x_{t-1} | x_t) from the network's output at x_t. The arguments are those of `predict_xstart`."""
        pred_xstart = self.predict_xstart(output, x_t, t, clip_denoised)
        posterior_mean, posterior_log_variance = self.q_posterior(pred_xstart, x_t, t)
        mean_output, variance_output = output[:, : x_t.shape[1]], output[:, x_t.shape[1] :]
        log_variance = posterior_log_variance  # of fixed_small
        if self.variance_type == "fixed_large":
            log_variance = self.at("fixed_large_log_variance", t, x_t)
        elif self.variance_type == "learned":
            log_variance = variance_output
        elif self.variance_type == "learned_range":
            fraction = (variance_output + 1) / 2
            log_variance = fraction * self.at("log_betas", t, x_t) + (1 - fraction) * posterior_log_variance
        # The mean follows from the predicted x_0, except where the network predicts the mean itself.
        mean = mean_output if self.prediction == "previous_x" else posterior_mean
        return PMeanVariance(mean, log_variance.expand_as(x_t), pred_xstart)

    def predict_eps(self, x_t: Tensor, t: Tensor, pred_xstart: Tensor) -> Tensor:
        """The noise that leads from `pred_xstart` to x_t: eq. 9 solved for epsilon."""
        return (x_t - self.at("alpha", t, x_t) * pred_xstart) / self.at("sigma", t, x_t)

    def mean_target(self, x_start: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The target of the network's mean channels at x_t."""
        return self.at("target_x_start", t, x_t) * x_start + self.at("target_noise", t, x_t) * noise

    def path(self, i: int) -> tuple[float, float]:
        """alpha and sigma at step i: 1 and 0 at -1, beyond the first step, and 0 and 1 at T, beyond the last."""
        if i in (-1, self.num_timesteps):
            return float(i == -1), float(i != -1)
        return float(self.tables["alpha"][i]), float(self.tables["sigma"][i])

    def squared_error(self, prediction: str) -> Array:
        """The squared error of a prediction where that of the predicted x_0 is 1: (T,)."""
        of_x_start, of_noise = PREDICTIONS[prediction](self)
        return (of_x_start - of_noise * self.tables["alpha"] / self.tables["sigma"]) ** 2

    def check_diffusion(self, what: str, instead: str = "take another schedule") -> None:
        """Raise UsageError if this is a flow, which has no `what`; and what there is instead."""
        if self.schedule.is_flow:
            raise UsageError(f"{what} needs a diffusion's betas, which a flow does not have: {instead}")

    def check_output(self, output: Tensor, x_t: Tensor) -> None:
        """Raise UsageError if the network's output does not have the channels of this process."""
        wanted = x_t.shape[1] * (2 if self.learns_variance else 1)
        if output.shape[1] != wanted:
            right = f"variance_type {self.variance_type} needs {wanted} for images of {x_t.shape[1]}"
            raise UsageError(f"the network's output has {output.shape[1]} channels; {right}")

    def at(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """The table `name` at `t`, shaped (B, 1, ...) to multiply with `like`."""
        return self._table(name, t.device)[t].view(-1, *[1] * (like.ndim - 1))

    def _table(self, name: str, device: torch.device) -> Tensor:
        """The table `name` in float32 on `device`, created at its first use."""
        if (name, device) not in self._on_device:
            self._on_device[name, device] = torch.tensor(self.tables[name], dtype=torch.float32, device=device)
        return self._on_device[name, device]


def _path_tables(schedule: Schedule, rescale_timesteps: bool) -> dict[str, Any]:
    path = schedule.path
    tables = {"alpha": path.alphas, "sigma": path.sigmas, "snr": (path.alphas / path.sigmas) ** 2}
    tables |= {"alpha_slope": path.alpha_slopes, "sigma_slope": path.sigma_slopes}
    if schedule.is_flow:  # and, as number -1, at the data
        s = np.append(path.s, 0.0)
        return tables | {"network_t": 1000 * s if rescale_timesteps else 1 - s}
    # float32 as in the published code: the embedding's fastest sinusoid sees the difference.
    scale = np.float32(1000 / schedule.original_steps if rescale_timesteps else 1)
    return tables | {"network_t": np.array(schedule.timestep_map, dtype=np.float32) * scale}


def _diffusion_tables(betas: Array) -> dict[str, Array]:
    alphas_cumprod = np.cumprod(1 - betas)
    alphas_cumprod_prev = np.append(1.0, alphas_cumprod[:-1])
    # q(x_{t-1} | x_t, x_0), eqs. 10 and 11. Its variance is 0 at t = 0, so its logarithm uses that of t = 1.
    posterior_variance = betas * (1 - alphas_cumprod_prev) / (1 - alphas_cumprod)
    first_variance = posterior_variance[1:2] if len(betas) > 1 else betas
    with np.errstate(divide="ignore"):  # infinite in pure noise
        recip_alphas_cumprod = 1 / alphas_cumprod
    tables = {"betas": betas, "log_betas": np.log(betas), "alphas_cumprod": alphas_cumprod}
    tables |= {"log_one_minus_alphas_cumprod": np.log(1 - alphas_cumprod), "posterior_variance": posterior_variance}
    tables |= {"sqrt_recip_alphas_cumprod": np.sqrt(recip_alphas_cumprod)}
    tables |= {"sqrt_recipm1_alphas_cumprod": np.sqrt(recip_alphas_cumprod - 1)}
    tables |= {"posterior_log_variance_clipped": np.log(np.append(first_variance, posterior_variance[1:]))}
    tables |= {"posterior_mean_coef1": betas * np.sqrt(alphas_cumprod_prev) / (1 - alphas_cumprod)}
    tables |= {"posterior_mean_coef2": (1 - alphas_cumprod_prev) * np.sqrt(1 - betas) / (1 - alphas_cumprod)}
    return tables | {"fixed_large_log_variance": np.log(np.append(first_variance, betas[1:]))}


def previous_x(process: GaussianDiffusion) -> tuple[Any, Any]:
    """The mean of x_{t-1} (eq. 11), with x_t written out."""
    process.check_diffusion("prediction previous_x")
    of_x_start, of_x_t = process.tables["posterior_mean_coef1"], process.tables["posterior_mean_coef2"]
    return of_x_start + of_x_t * process.tables["alpha"], of_x_t * process.tables["sigma"]


PREDICTIONS: dict[str, Callable[[GaussianDiffusion], tuple[Any, Any]]] = {
    "epsilon": lambda process: (0.0, 1.0),
    "x_start": lambda process: (1.0, 0.0),
    "previous_x": previous_x,
    # Salimans & Ho (2022), section 4.
    "v": lambda process: (-process.tables["sigma"], process.tables["alpha"]),
    # d x_t / ds (Lipman et al. 2022).
    "velocity": lambda process: (process.tables["alpha_slope"], process.tables["sigma_slope"]),
    # The gradient of log q(x_t) (Song et al. 2020).
    "score": lambda process: (0.0, -1 / process.tables["sigma"]),
}
"""process -> how much of x_0, and how much of epsilon, the network's mean channels are the sum of: numbers, or (T,)."""
