"""Timesteps to train on: uniform, by importance (Nichol & Dhariwal 2021, section 3.3), or often in the middle."""

from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

Share = Annotated[float, (0, 1)]
Scale = Annotated[float, (0.1, 10)]


class LossSecondMoment:
    """Draws t in proportion to sqrt(E[L_t^2]), from the last losses seen at each t (eq. 18).

    Until every t has a full history, all are equally likely.

    Args:
        num_timesteps: T.
        history: losses remembered for each t.
        uniform_prob: share of the draws that stays uniform, so that no t is forgotten.
    """

    def __init__(self, num_timesteps: int, *, history: Annotated[int, (1, 10**4)] = 10, uniform_prob: Share = 0.001):
        self.uniform_prob = uniform_prob
        self._losses = np.zeros((num_timesteps, history))
        self._counts = np.zeros(num_timesteps, dtype=np.int64)

    def probabilities(self) -> np.ndarray:
        """How likely each t is: (T,), float64, summing to 1."""
        num_timesteps, history = self._losses.shape
        if (self._counts < history).any():
            return np.full(num_timesteps, 1 / num_timesteps)
        weights = np.sqrt((self._losses**2).mean(axis=1))
        return weights / weights.sum() * (1 - self.uniform_prob) + self.uniform_prob / num_timesteps

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """`n` timesteps (n,), int64, and what to multiply their losses with, 1 / (T p_t), so that the mean keeps its
        expectation: (n,), float32. Both on the CPU, as the generator must be."""
        p = torch.from_numpy(self.probabilities())
        t = torch.multinomial(p, n, replacement=True, generator=generator)
        return t, (1 / (len(p) * p[t])).float()

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Record the unweighted losses (n,) of the timesteps (n,), in order. Non-finite losses are ignored."""
        pairs = zip(t.tolist(), losses.tolist(), strict=True)
        for step, loss in [(step, loss) for step, loss in pairs if np.isfinite(loss)]:
            if self._counts[step] == self._losses.shape[1]:
                self._losses[step, :-1] = self._losses[step, 1:]
            else:
                self._counts[step] += 1
            self._losses[step, self._counts[step] - 1] = loss

    def state_dict(self) -> dict[str, Any]:
        """The history, for a checkpoint."""
        return {"losses": torch.from_numpy(self._losses.copy()), "counts": torch.from_numpy(self._counts.copy())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._losses, self._counts = state["losses"].numpy().copy(), state["counts"].numpy().copy()


class LogitNormal:
    """Draws t so that logit(s) is normal, with s = (t + 1) / T (Esser et al. 2024, section 3.1): often from the middle.

    Losses are not weighted back, so this is also a weighting of timesteps.
    """

    def __init__(self, num_timesteps: int, *, location: Annotated[float, (-10, 10)] = 0.0, scale: Scale = 1.0):
        ends = (torch.linspace(0, 1, num_timesteps + 1, dtype=torch.float64).logit() - location) / scale
        self._probabilities = torch.special.ndtr(ends).diff()

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """`n` timesteps (n,), int64, and 1 for each."""
        return torch.multinomial(self._probabilities, n, replacement=True, generator=generator), torch.ones(n)


def uniform(num_timesteps: int) -> None:
    """Every t is equally likely."""


TIMESTEP_SAMPLERS: dict[str, Callable[..., LossSecondMoment | LogitNormal | None]] = {
    "uniform": uniform,
    "loss_second_moment": LossSecondMoment,
    "logit_normal": LogitNormal,
}
"""num_timesteps -> what draws them, or None where all are equally likely."""
