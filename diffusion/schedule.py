"""Noise schedules: betas, and the timesteps that are kept. All in float64.

Nichol & Dhariwal (2021), sections 3.2 (cosine schedule) and 4 (respacing).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from diffusion.errors import UsageError, check_name

ScheduleName = Literal["linear", "cosine"]


def linear_betas(steps: int) -> NDArray[np.float64]:
    """Betas (steps,) that grow linearly, as in Ho et al. (2020) at 1000 steps, scaled to any `steps`.

    Raises UsageError if the scaled schedule would reach 1.
    """
    scale = 1000 / steps
    betas = np.linspace(scale * 1e-4, scale * 0.02, steps, dtype=np.float64)
    if betas.max() >= 1:
        raise UsageError(
            f"a linear schedule of {steps} steps has a beta of {betas.max():.3g}, and a beta must be below 1: "
            "use at least 21 steps, or the cosine schedule"
        )
    return betas


def cosine_betas(steps: int, max_beta: float = 0.999) -> NDArray[np.float64]:
    """Betas (steps,) whose alphas_cumprod falls like a squared cosine (eq. 17), capped at `max_beta`."""

    def alpha_bar(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    return np.array([min(1 - alpha_bar((i + 1) / steps) / alpha_bar(i / steps), max_beta) for i in range(steps)])


def space_timesteps(steps: int, respacing: str) -> list[int]:
    """The timesteps, of `steps`, that a respacing string keeps, in ascending order.

    `""` keeps all. `"N"` keeps N, evenly spaced from the first to the last. `"A,B,C"` cuts the steps into
    equal sections and keeps A of the first, B of the second and so on. `"ddimN"` keeps N at one fixed whole
    stride from 0, as in Song et al. (2020).

    Raises UsageError if the string is none of these or asks for more steps than there are.
    """
    if not respacing:
        return list(range(steps))
    if respacing.startswith("ddim"):
        wanted = _counts(respacing[4:], respacing)
        if len(wanted) == 1:
            for stride in range(1, steps + 1):
                if len(range(0, steps, stride)) == wanted[0]:
                    return list(range(0, steps, stride))
        raise UsageError(f"respacing '{respacing}': no whole stride takes that many of {steps} steps")
    counts = _counts(respacing, respacing)
    size, extra = divmod(steps, len(counts))
    kept: list[int] = []
    start = 0
    for section, count in enumerate(counts):
        length = size + (1 if section < extra else 0)
        if count > length:
            where = f"the schedule's {steps}" if len(counts) == 1 else f"the {length} of section {section + 1}"
            raise UsageError(f"respacing '{respacing}': {count} steps are more than {where}")
        step = 1.0 if count <= 1 else (length - 1) / (count - 1)
        # Accumulated, not multiplied: at a half, the published code rounds the accumulated value.
        position = 0.0
        for _ in range(count):
            kept.append(start + round(position))
            position += step
        start += length
    return kept


def _counts(text: str, respacing: str) -> list[int]:
    parts = text.split(",")
    if not all(re.fullmatch(r"\s*0*[1-9][0-9]{0,8}\s*", part) for part in parts):
        raise UsageError(
            f"respacing '{respacing}' is not understood: use a count like 50, sections like 10,15,20, or ddim50"
        )
    return [int(part) for part in parts]


@dataclass(frozen=True)
class Schedule:
    """The betas of a process, each with its step in the original process.

    Attributes:
        betas: (T,), float64, each above 0 and below 1.
        timestep_map: the original step of each of the T steps.
        original_steps: how many steps the process had before respacing.
    """

    betas: NDArray[np.float64]
    timestep_map: tuple[int, ...]
    original_steps: int

    @staticmethod
    def named(name: ScheduleName, steps: int, respacing: str = "") -> Schedule:
        """The schedule `name` with `steps` steps, of which `respacing` keeps some (see `space_timesteps`).

        The kept betas give alphas_cumprod the values that the full schedule has at the kept steps.
        """
        if steps < 1:
            raise UsageError(f"steps is {steps}; it must be at least 1")
        check_name("schedule", name, get_args(ScheduleName))
        betas = {"linear": linear_betas, "cosine": cosine_betas}[name](steps)
        kept = space_timesteps(steps, respacing)
        if len(kept) == steps:
            return Schedule(betas, tuple(range(steps)), steps)
        alphas_cumprod = np.cumprod(1 - betas)[kept]
        return Schedule(1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1]), tuple(kept), steps)
