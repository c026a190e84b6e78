"""Exponential moving averages of a model's weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class EMA:
    """Moving averages of every parameter, one for each rate: average = rate * average + (1 - rate) * weights.

    Args:
        model: the model; the averages start as copies of its parameters.
        rates: each in [0, 1).
        warmup: use min(rate, (1 + n) / (10 + n)) at update n = 0, 1, ..., so that a short run forgets its start.
    """

    def __init__(self, model: nn.Module, rates: Sequence[float], warmup: bool = False):
        self.warmup = warmup
        self._weights = [p.detach() for p in model.parameters()]
        names = [name for name, _ in model.named_parameters()]
        self.averages = {rate: dict(zip(names, (w.clone() for w in self._weights), strict=True)) for rate in rates}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights as they are after optimizer step `step` (0, 1, ...)."""
        for rate, average in self.averages.items():
            rate = min(rate, (1 + step) / (10 + step)) if self.warmup else rate
            torch._foreach_lerp_(list(average.values()), self._weights, 1 - rate)
