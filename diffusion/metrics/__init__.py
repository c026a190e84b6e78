"""Metrics of a trained model. Each is one module with a function, and a line in `METRICS`."""

from collections.abc import Callable

from diffusion.metrics.base import Score, Subject
from diffusion.metrics.bits_per_dim import bits_per_dim

METRICS: dict[str, Callable[[Subject], Score]] = {"bits_per_dim": bits_per_dim}
