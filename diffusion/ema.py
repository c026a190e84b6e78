"""Moving averages of a model's weights: exponential ones, and power functions of time (Karras et al. 2023).

A power-function average weights the weights after step t in proportion to t^gamma. Its length is the standard deviation
of that profile over the training time, so it grows with the run. From two of them, stored at several steps, averages of
other lengths can be reconstructed after training (section 3 of that paper, EDM2).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from diffusion.errors import UsageError
from diffusion.parallel.sharding import discard_full_weights, local

LONGEST = 0.28
"""Lengths are below 1 / sqrt(12), that of the plain mean over the training time."""


class EMA:
    """Moving averages of every parameter: average = rate * average + (1 - rate) * weights.

    Args:
        model: the model; the averages start as copies of its parameters.
        rates: constant rates, each in [0, 1).
        warmup: use min(rate, (1 + n) / (10 + n)) at update n = 0, 1, ..., so that short runs forget the start.
        lengths: of power-function averages, each above 0 and at most `LONGEST`.

    Attributes:
        averages: by rate, or by "length" and the length, the average of each parameter by its name.
    """

    def __init__(self, model: nn.Module, rates: Sequence[float], warmup: bool = True, lengths: Sequence[float] = ()):
        if not isinstance(rates, Sequence) or not isinstance(lengths, Sequence):
            raise UsageError(f"rates are {rates} and lengths {lengths}; both must be lists, such as [0.999]")
        if len(set(rates)) < len(rates) or not all(0 <= rate < 1 for rate in rates):
            raise UsageError(f"rates are {list(rates)}; they must be different, from 0 to below 1")
        if len(set(lengths)) < len(lengths) or not all(0 < length <= LONGEST for length in lengths):
            raise UsageError(f"lengths are {list(lengths)}; they must be different, above 0 and at most {LONGEST}")
        self.warmup, self._model, self._parameters = warmup, model, list(model.parameters())
        self._exponents = {f"length{length}": exponent(length) for length in lengths}
        keys: list[float | str] = [*rates, *self._exponents]
        self.averages = {key: {name: p.detach().clone() for name, p in model.named_parameters()} for key in keys}

    @torch.no_grad()
    def update(self, step: int, took_step: Tensor | float = 1.0) -> None:
        """Update the averages after optimizer step `step` (0, 1, ...). With `took_step` 0 they stay unchanged.

        `took_step` may be a tensor on the device, so that the step does not wait for it.
        """
        weights = self._weights()
        at_once = 4 if weights[0].device.type == "cpu" else len(weights)  # a few stay in a processor's cache
        for key, average in self.averages.items():
            if isinstance(key, str):
                rate = (step / (step + 1)) ** (self._exponents[key] + 1)  # EDM2, eq. 2
            else:
                rate = min(key, (1 + step) / (10 + step)) if self.warmup else key
            averages, share = [local(value) for value in average.values()], (1 - rate) * took_step
            for i in range(0, len(weights), at_once):
                change = torch._foreach_sub(weights[i : i + at_once], averages[i : i + at_once])
                torch._foreach_mul_(change, share)
                torch._foreach_add_(averages[i : i + at_once], change)

    @contextmanager
    @torch.no_grad()
    def in_place(self, key: float | str) -> Iterator[None]:
        """Within `with`, the model's weights are the average `key`; afterwards its own again, to the bit."""
        weights = self._weights()
        kept = [value.clone() for value in weights]
        try:
            torch._foreach_copy_(weights, [local(value) for value in self.averages[key].values()])
            discard_full_weights(self._model)
            yield
        finally:
            torch._foreach_copy_(weights, kept)
            discard_full_weights(self._model)

    def _weights(self) -> list[Tensor]:
        """Collected at each call: DistributedDataParallel may move the parameters to another storage."""
        return [local(p.detach()) for p in self._parameters]


def exponent(length: float) -> float:
    """The gamma of a power-function average of a length (EDM2, eq. 126 solved for gamma)."""
    return float(np.roots([1, 7, 16 - length**-2, 12 - length**-2]).real.max())


def reconstruct(stored: Sequence[tuple[float, int]], length: float, step: int) -> tuple[NDArray[np.float64], float]:
    """The coefficients with which stored power-function averages come nearest to another one (EDM2, section 3.2).

    Args:
        stored: the length of each, and the step after which it was stored.
        length, step: those of the wanted one.

    Returns the coefficients, and the error: the norm of the difference of the profiles, relative to the wanted one's.
    """
    profiles = [(exponent(of), float(at)) for of, at in stored]
    wanted = (exponent(length), float(step))
    products = np.array([[_inner_product(a, b) for b in profiles] for a in profiles])
    with_wanted = np.array([_inner_product(a, wanted) for a in profiles])
    coefficients = np.linalg.lstsq(products, with_wanted)[0]
    reached = 2 * coefficients @ with_wanted - coefficients @ products @ coefficients
    return coefficients, float(np.sqrt(max(0.0, 1 - reached / _inner_product(wanted, wanted))))


def _inner_product(a: tuple[float, float], b: tuple[float, float]) -> float:
    """The integral over time of the product of two profiles (gamma, end), each of integral 1 (EDM2, eq. 149)."""
    (gamma_a, end_a), (gamma_b, end_b) = (a, b) if a[1] <= b[1] else (b, a)
    share = (end_a / end_b) ** (gamma_b + 1) / end_a
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * share
