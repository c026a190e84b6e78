"""Exponential moving averages of a model's weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from diffusion.sharding import local, weights_have_changed


class EMA:
    """Moving averages of every parameter, one for each rate: average = rate * average + (1 - rate) * weights.

    Args:
        model: the model; the averages start as copies of its parameters.
        rates: each in [0, 1).
        warmup: use min(rate, (1 + n) / (10 + n)) at update n = 0, 1, ..., so that a short run forgets its start.
    """

    def __init__(self, model: nn.Module, rates: Sequence[float], warmup: bool = False):
        self.warmup = warmup
        self._model = model
        self._parameters = list(model.parameters())
        self.averages = {rate: {name: p.detach().clone() for name, p in model.named_parameters()} for rate in rates}

    @torch.no_grad()
    def update(self, step: int, took_step: Tensor | float = 1.0) -> None:
        """Take in the weights as they are after optimizer step `step` (0, 1, ...), or nothing where `took_step` is 0.

        As a tensor, `took_step` may still be on its way on a GPU, which is not waited for.
        """
        weights = self._weights()
        for rate, average in self.averages.items():
            rate = min(rate, (1 + step) / (10 + step)) if self.warmup else rate
            averages = [local(value) for value in average.values()]
            change = torch._foreach_sub(weights, averages)
            torch._foreach_mul_(change, (1 - rate) * took_step)
            torch._foreach_add_(averages, change)

    @contextmanager
    @torch.no_grad()
    def in_place(self, rate: float) -> Iterator[None]:
        """Within `with`, the model has the average at `rate` for its weights; afterwards its own, to the bit."""
        weights = self._weights()
        kept = [value.clone() for value in weights]
        try:
            torch._foreach_copy_(weights, [local(value) for value in self.averages[rate].values()])
            weights_have_changed(self._model)
            yield
        finally:
            torch._foreach_copy_(weights, kept)
            weights_have_changed(self._model)

    def _weights(self) -> list[Tensor]:
        """Made anew each time: DistributedDataParallel may give the parameters another storage."""
        return [local(p.detach()) for p in self._parameters]
