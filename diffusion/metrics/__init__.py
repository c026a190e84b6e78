"""Metrics of a trained model. Each is a function, and a line in `METRICS`."""

from collections.abc import Callable

from diffusion.metrics.base import Score, Subject
from diffusion.metrics.bits_per_dim import bits_per_dim
from diffusion.metrics.samples import frechet, inception_score, kid, nearest, precision_recall

METRICS: dict[str, Callable[[Subject], Score]] = {
    "bits_per_dim": bits_per_dim, "frechet": frechet, "kid": kid, "inception_score": inception_score,
    "precision_recall": precision_recall, "nearest": nearest,
}  # fmt: skip
