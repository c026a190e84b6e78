"""Metrics of a trained model. Each is a function, and a line in `METRICS`."""

from diffusion.metrics import samples
from diffusion.metrics.base import Metric
from diffusion.metrics.bits_per_dim import bits_per_dim, check_likelihood
from diffusion.metrics.features import check_fidelity
from diffusion.metrics.gap import check_gap, gap

METRICS: dict[str, Metric] = {
    "bits_per_dim": Metric(bits_per_dim, check=check_likelihood, draws=False),
    "gap": Metric(gap, least=2, check=check_gap, draws=False),
    "frechet": Metric(samples.frechet, least=2),
    "kid": Metric(samples.kid, least=20, check=check_fidelity),
    "inception_score": Metric(samples.inception_score, least=20, check=samples.check_classifies),
    "precision_recall": Metric(samples.precision_recall, least=4, check=check_fidelity),
    "nearest": Metric(samples.nearest),
}
