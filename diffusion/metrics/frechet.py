"""The Fréchet distance between two sets of images, in the features of a network of the caller's choice.

It is FID (Heusel et al. 2017) only with the published Inception network and 50,000 images.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def frechet_distance(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    """The squared distance between the Gaussians fitted to two sets of features (N, D) (Heusel et al., eq. 6)."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # The product of two positive semi-definite matrices has real eigenvalues of at least 0, up to rounding.
    root = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).real.clip(0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * root)
