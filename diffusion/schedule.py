"""Noise schedules: the path x_t = alpha x_0 + sigma epsilon, and the timesteps that are kept. All in float64.

Nichol & Dhariwal (2021), sections 3.2 (cosine schedule) and 4 (respacing). A diffusion's schedule is its betas, which
give alpha^2 + sigma^2 = 1. Flow matching (Lipman et al. 2022; Ma et al. 2024, "SiT") takes other paths, without betas.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Annotated, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from diffusion.errors import UsageError, check_name

Array = NDArray[np.float64]
Respacing = str | int | Sequence[int]
"""Which timesteps of a schedule are kept (see `place_timesteps`)."""
LOWEST_LOG_SNR = -5.1
"""log(alpha / sigma) below which no timestep is placed by signal-to-noise ratio."""


class Path(NamedTuple):
    """The path of each timestep, (T,), over s, which goes from 0 (the data) to 1 (the noise)."""

    s: Array
    alphas: Array
    sigmas: Array
    alpha_slopes: Array
    """d alpha / ds"""
    sigma_slopes: Array
    """d sigma / ds"""


def linear(steps: int) -> Array:
    """Betas (steps,) that grow linearly, as in Ho et al. (2020) at 1000 steps, scaled to any `steps`.

    Raises UsageError if the scaled schedule would reach 1.
    """
    scale = 1000 / steps
    betas = np.linspace(scale * 1e-4, scale * 0.02, steps, dtype=np.float64)
    if betas.max() >= 1:
        right = "a beta must be below 1: use at least 21 steps, or the cosine schedule"
        raise UsageError(f"a linear schedule of {steps} steps has a beta of {betas.max():.3g}, and {right}")
    return betas


def cosine(steps: int, max_beta: float = 0.999) -> Array:
    """Betas (steps,) whose alphas_cumprod falls like a squared cosine (eq. 17), capped at `max_beta`."""

    def alpha_bar(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    return np.array([min(1 - alpha_bar((i + 1) / steps) / alpha_bar(i / steps), max_beta) for i in range(steps)])


EndOfPath = Annotated[float, (0.9, 1)]


def flow(steps: int, *, s_max: EndOfPath = 1.0) -> Path:
    """The straight path of flow matching: alpha = 1 - s, sigma = s, with s up to `s_max`, evenly spaced."""
    s = np.arange(1, steps + 1) / steps * s_max
    return Path(s, 1 - s, s, -np.ones(steps), np.ones(steps))


def gvp(steps: int, *, s_max: EndOfPath = 1.0) -> Path:
    """The trigonometric path of SiT, its "generalised VP": alpha = cos(pi s / 2), sigma = sin(pi s / 2)."""
    s = np.arange(1, steps + 1) / steps * s_max
    alphas, sigmas = np.sin(math.pi / 2 * (1 - s)), np.sin(math.pi / 2 * s)  # this way alpha is 0 where s is 1
    return Path(s, alphas, sigmas, -math.pi / 2 * sigmas, math.pi / 2 * alphas)


SCHEDULES: dict[str, Callable[..., Array | Path]] = {"linear": linear, "cosine": cosine, "flow": flow, "gvp": gvp}
"""steps -> betas (steps,), or the path of a flow."""


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
        for kept_at in (range(0, steps, stride) for stride in range(1, steps + 1)):
            if wanted == [len(kept_at)]:
                return list(kept_at)
        raise UsageError(f"respacing '{respacing}': no whole stride takes that many of {steps} steps")
    counts = _counts(respacing, respacing)
    size, extra = divmod(steps, len(counts))
    kept, start = list[int](), 0
    for section, count in enumerate(counts):
        length = size + (section < extra)
        if count > length:
            where = f"the schedule's {steps}" if len(counts) == 1 else f"the {length} of section {section + 1}"
            raise UsageError(f"respacing '{respacing}': {count} steps are more than {where}")
        step = 1.0 if count <= 1 else (length - 1) / (count - 1)
        # Accumulated, not multiplied: at a half, the published code rounds the accumulated value.
        kept += [start + round(position) for position in accumulate([0.0, *[step] * (count - 1)])]
        start += length
    return kept


def place_timesteps(log_snr: Array, respacing: Respacing) -> list[int]:
    """The timesteps that a respacing keeps of a schedule with these log(alpha / sigma), in ascending order.

    Beside the strings of `space_timesteps`: `"logsnrN"` keeps N, evenly spaced in log(alpha / sigma) (Lu et al. 2022),
    `"karrasN"` keeps N, evenly spaced in (sigma / alpha)^(1/7) (Karras et al. 2022, eq. 5), and a sequence keeps the
    timesteps in it. The first two begin where log(alpha / sigma) is -5.1, since a network is of no use in the
    almost pure noise beyond, but for a schedule that ends in pure noise, whose last timestep they keep too.
    `"jumpsN"` keeps N for jumps to the data: of N + 1, evenly spaced in log(alpha / sigma) from 5.1 to -5.1, all but
    the first.

    Raises UsageError if it is none of these, asks for too many steps, or lists some out of order or range.
    """
    steps = len(log_snr)
    if not isinstance(respacing, str | int):
        kept = list(respacing)
        if not kept or sorted(set(kept)) != kept or kept[0] < 0 or kept[-1] >= steps:
            raise UsageError(f"respacing {kept}: timesteps must ascend, from 0 to at most {steps - 1}")
        return kept
    respacing = str(respacing)
    placed = re.fullmatch(r"(logsnr|karras|jumps)(.*)", respacing)
    if not placed:
        return space_timesteps(steps, respacing)
    wanted = _counts(placed[2], respacing)
    pure_noise = [] if np.isfinite(log_snr[-1]) else [steps - 1]
    log_snr = log_snr[: steps - len(pure_noise)]
    last = min(int((log_snr >= LOWEST_LOG_SNR).sum()), len(log_snr) - 1)
    jumps, count = placed[1] == "jumps", wanted[0] - len(pure_noise)
    least, most = 1 if jumps else 1 + len(pure_noise), last + 1 + len(pure_noise)
    if len(wanted) > 1 or not least <= wanted[0] <= most:
        raise UsageError(f"respacing '{respacing}': it must be one number, from {least} to {most} of {steps} steps")
    if not count:
        return pure_noise
    if jumps:
        at = np.linspace(-LOWEST_LOG_SNR, LOWEST_LOG_SNR, wanted[0] + 1)[1 : count + 1]
    else:
        high, low = float(log_snr[0 if count > 1 else last]), float(log_snr[last])
        at = np.linspace(high, low, count)
    if placed[1] == "karras":
        at = -7 * np.log(np.linspace(math.exp(-high / 7), math.exp(-low / 7), count))
    nearest = np.rint(np.interp(-at, -log_snr, np.arange(len(log_snr)))).astype(int)
    numbers = np.arange(count)
    distinct = np.minimum(np.maximum.accumulate(nearest - numbers), last + 1 - count) + numbers
    return [*distinct.tolist(), *pure_noise]


def _counts(text: str, respacing: str) -> list[int]:
    parts = text.split(",")
    if not all(re.fullmatch(r"\s*0*[1-9][0-9]{0,8}\s*", part) for part in parts):
        right = "a count like 50, sections like 10,15,20, ddim50, logsnr10, karras10, jumps2, or a list like [0, 999]"
        raise UsageError(f"respacing '{respacing}' is not understood: it must be {right}")
    return [int(part) for part in parts]


@dataclass(frozen=True)
class Schedule:
    """The path of a process, each of its steps with its number in the original process.

    Attributes:
        betas: (T,), each above 0, and below 1 but for the last of a zero-terminal-SNR schedule; None for a flow.
        timestep_map: the original step of each of the T steps.
        original_steps: how many steps the process had before respacing.
        path: the path at the T steps (default: that of the betas).
    """

    betas: Array | None
    timestep_map: tuple[int, ...]
    original_steps: int
    path: Path = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.path is None and self.betas is not None:
            object.__setattr__(self, "path", _path_of(self.betas))

    @property
    def is_flow(self) -> bool:
        """Whether it has no betas, and with them no posterior."""
        return self.betas is None

    @staticmethod
    def named(
        name: str, steps: int, respacing: Respacing = "", zero_terminal_snr: bool = False, **options: Any
    ) -> "Schedule":
        """The schedule `name` with `steps` steps, of which `respacing` keeps some (see `place_timesteps`).

        The kept betas give alphas_cumprod the values that the full schedule has at the kept steps. With
        `zero_terminal_snr` the last step is pure noise (see `with_zero_terminal_snr`).
        """
        if steps < 1:
            raise UsageError(f"steps is {steps}; it must be at least 1")
        check_name("schedule", name, SCHEDULES)
        made = SCHEDULES[name](steps, **options)
        if isinstance(made, Path):
            if zero_terminal_snr:
                raise UsageError(f"zero_terminal_snr rescales betas, and schedule {name} has none: leave it out")
            betas, path = None, made
        else:
            betas = with_zero_terminal_snr(made) if zero_terminal_snr else made
            path = _path_of(betas)
        with np.errstate(divide="ignore"):  # infinite in pure noise
            kept = place_timesteps(np.log(path.alphas / path.sigmas), respacing)
        path = Path(*(values[kept] for values in path))
        if betas is not None and len(kept) < steps:
            betas = _betas_of(np.cumprod(1 - betas, dtype=np.float64)[kept])
            # By way of the betas, as in the published code: near pure noise, float32 sees the difference.
            again = _path_of(betas)
            path = path._replace(alphas=again.alphas, sigmas=again.sigmas)
        return Schedule(betas, tuple(kept), steps, path)


def with_zero_terminal_snr(betas: Array) -> Array:
    """Betas (T,) whose last alphas_cumprod is 0: its square roots shifted, and scaled to keep the first one (Lin et
    al. 2023, algorithm 1). Raises UsageError for a single step."""
    if len(betas) < 2:
        raise UsageError("a zero-terminal-SNR schedule needs at least 2 steps")
    roots = np.sqrt(np.cumprod(1 - betas))
    return _betas_of(((roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))) ** 2)


def _path_of(betas: Array) -> Path:
    """The path of a diffusion's betas, with the slopes of a parabola through each point and its neighbours."""
    alphas_cumprod = np.cumprod(1 - betas)
    alphas, sigmas, s = np.sqrt(alphas_cumprod), np.sqrt(1 - alphas_cumprod), np.arange(len(betas) + 1) / len(betas)
    edge: Any = min(2, len(betas))
    slopes = (np.gradient(np.append(*ends), s, edge_order=edge)[1:] for ends in ((1.0, alphas), (0.0, sigmas)))
    return Path(s[1:], alphas, sigmas, *slopes)


def _betas_of(alphas_cumprod: Array) -> Array:
    return 1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])
