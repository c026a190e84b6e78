"""Exponential moving averages of a model's weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from diffusion.errors import UsageError
from diffusion.sharding import discard_full_weights, local


class EMA:
    """Moving averages of every parameter, one per rate: average = rate * average + (1 - rate) * weights.

    Args:
        model: the model; the averages start as copies of its parameters.
        rates: each in [0, 1).
        warmup: use min(rate, (1 + n) / (10 + n)) at update n = 0, 1, ..., so that short runs forget the
            initial weights.
    """

    def __init__(self, model: nn.Module, rates: Sequence[float], warmup: bool = False):
        if len(set(rates)) < len(rates) or not all(0 <= rate < 1 for rate in rates):
            raise UsageError(f"rates are {list(rates)}; they must be different, from 0 to below 1")
        self.warmup = warmup
        self._model = model
        self._parameters = list(model.parameters())
        self.averages = {rate: {name: p.detach().clone() for name, p in model.named_parameters()} for rate in rates}

    @torch.no_grad()
    def update(self, step: int, took_step: Tensor | float = 1.0) -> None:
        """Update the averages after optimizer step `step` (0, 1, ...). With `took_step` 0 they stay unchanged.

        `took_step` may be a tensor on the device, so that the step does not wait for it.
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
        """Within `with`, the model's weights are the average at `rate`; afterwards its own again, to the bit."""
        weights = self._weights()
        kept = [value.clone() for value in weights]
        try:
            torch._foreach_copy_(weights, [local(value) for value in self.averages[rate].values()])
            discard_full_weights(self._model)
            yield
        finally:
            torch._foreach_copy_(weights, kept)
            discard_full_weights(self._model)

    def _weights(self) -> list[Tensor]:
        """Collected at each call: DistributedDataParallel may move the parameters to another storage."""
        return [local(p.detach()) for p in self._parameters]
