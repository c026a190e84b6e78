"""Sharing cores with other processes: a network computes on as many threads as there are cores that nobody else uses.

A parallel region waits for its slowest thread, so one that has to share its core holds up all others: on two cores
beside one busy process, two threads are slower than one. Fewer threads give the bits of all of them: torch divides a
tensor into one part for each thread, and computes an element in the same way in any part, if the parts are multiples of
the processor's vectors. The gradients of a convolution's weights are sums of such parts: with fewer threads they are
computed part by part, where that gives the same bits, and else on all threads.
"""

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import psutil
import torch
from torch import Tensor, nn

MEASURED_EVERY, LASTING, SAID_EVERY = 0.5, 5.0, 3600.0
"""Seconds between two measurements, from which on busy cores are mentioned, and between two mentions."""


class Cores:
    """The cores of this process, and how many of them (`others`) other processes keep busy."""

    def __init__(self) -> None:
        self.others, self._said = 0.0, -SAID_EVERY
        self._threads = self._used = 1
        self._before = -math.inf, 0.0
        self._busy_since: float | None = None
        self._override: torch.library.Library | None = None
        self._parts: dict[str, Any] = {}
        """in how many parts of the batch a weight's and a bias's gradients are computed; None: on all threads"""

    def free(self) -> int:
        """How many cores no other process keeps busy, at least 1; measured every `MEASURED_EVERY` seconds."""
        now, cores = time.monotonic(), _cores()
        if now - self._before[0] >= MEASURED_EVERY:
            times = []
            with suppress(OSError, psutil.Error, NotImplementedError):  # of a system that does not tell
                times = psutil.cpu_times(percpu=True)
            low = os.nice(0) > 0  # what gives way to others does not count, unless this process does, too
            used = [core.user + core.system + core.nice * low for core in times]
            busy, own = sum(used[i] for i in cores if i < len(used)), time.process_time()
            self.others = max(0.0, (busy - own - self._before[1]) / (now - self._before[0]))
            self._before = now, busy - own
        return max(1, len(cores) - round(self.others))

    @contextmanager
    def spared(self, network: nn.Module, x: Tensor | None = None) -> Iterator[None]:
        """Within `with`, torch computes on the cores that are free, if the results are the same.

        Args:
            network: on a CPU, with `any_threads`, and not compiled, since that is for one number of threads.
            x: the network's input, which up to all threads divide into equal parts, of whole vectors.
        """
        self._threads = threads = free = torch.get_num_threads()
        if threads > 1 and next(network.parameters(), torch.empty(0, device="meta")).device.type == "cpu":
            free = self.free()
            self._busy_since = (self._busy_since or time.monotonic()) if free < threads else None
            parts = math.lcm(*range(1, threads + 1))  # smaller tensors are divided into fewer parts
            # 32 are two vectors. Below 16 images, torch takes other convolutions on one thread.
            fits = x is None or (len(x) >= 16 and len(x) % parts == 0 and x.numel() % (parts * 32) == 0)
            if not fits or not getattr(network, "any_threads", False) or network._compiled_call_impl is not None:
                free = threads
        self._used = next(n for n in range(min(free, threads), 0, -1) if threads % n == 0)
        if self._used == threads:
            yield
            return
        if self._override is None:
            self._kernel = torch.library.get_kernel("aten::convolution_backward", "CPU")
            self._override = torch.library.Library("aten", "IMPL")
            self._override.impl("convolution_backward", self._convolution_backward, "CPU")
        torch.set_num_threads(self._used)
        try:
            yield
        finally:
            torch.set_num_threads(threads)

    @contextmanager
    def followed(self, network: nn.Module) -> Iterator[Callable[..., Any]]:
        """Within `with`, each call of the network, as a function, begins a part of the work that is `spared`. Its
        keyword `by` names another network."""
        with ExitStack() as part:

            def call(x: Tensor, *args: Any, by: nn.Module = network, **kwargs: Any) -> Any:
                part.close()
                part.enter_context(self.spared(by, x))
                return by(x, *args, **kwargs)

            yield call

    def news(self) -> str | None:
        """A line, if other processes keep cores busy that this one would use."""
        now = time.monotonic()
        if self._busy_since is None or now - self._busy_since < LASTING or now - self._said < SAID_EVERY:
            return None
        self._said = now
        means = f"computing on {self._used} of {self._threads} threads, with the same results"
        return f"other processes keep {self.others:.1f} of {len(_cores())} cores busy: {means}"

    def _convolution_backward(self, grad: Tensor, x: Tensor, weight: Tensor, *args: Any) -> Any:
        """The gradients of input, weight and bias, of which the last of `args` says which are asked for."""
        *options, (of_input, of_weight, of_bias) = args
        if torch.get_num_threads() >= self._threads or not of_weight:
            return self._call(grad, x, weight, *args)
        layouts = [(t.shape, t.stride(), t.dtype) for t in (grad, x, weight)]
        key = str((layouts, options, of_bias, torch.get_num_threads(), self._threads))
        rest = weight, options, of_bias
        if key not in self._parts:
            # Of bfloat16, whose rounding hides the order of a sum, no trial tells.
            self._parts[key] = self._equal_parts(grad, x, *rest) if grad.dtype == torch.float32 else None
        first = self._call(grad, x, weight, *options, [True, False, False])[0] if of_input else None
        gradients = self._gradients(self._parts[key], grad, x, *rest)
        return first, gradients[0], gradients[1] if of_bias else None

    def _call(self, *args: Any) -> Any:
        return self._kernel.call_boxed(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args)

    def _equal_parts(self, grad: Tensor, x: Tensor, *rest: Any) -> tuple[int, int] | None:
        """The parts that give the bits of all threads, tried on random numbers."""
        generator = torch.Generator().manual_seed(0)
        divisors = [n for n in range(1, self._threads + 1) if self._threads % n == 0 and n <= len(x)]
        ways = [(weights, biases) for weights in divisors for biases in divisors]
        for _ in range(max(1, 64 // grad.shape[1])):  # sums over a few channels agree by chance
            grad, x = (torch.empty_like(t).normal_(generator=generator) for t in (grad, x))
            right = self._gradients(None, grad, x, *rest)
            found = {parts: self._gradients(parts, grad, x, *rest) for parts in ways}
            ways = [parts for parts in ways if all(map(torch.equal, right, found[parts]))]
        return next(iter(ways), None)

    def _gradients(self, parts: Any, grad: Tensor, x: Tensor, weight: Tensor, options: Any, bias: bool) -> list[Tensor]:
        """The gradients of weight and, where asked for, bias."""

        def summed(count: int, which: tuple[bool, bool], *others: Any) -> list[Tensor]:
            pairs = zip(grad.tensor_split(count), others[0].tensor_split(count), strict=True)
            found = [self._call(*pair, *others[1:], [False, *which])[1:] for pair in pairs]
            return [sum(terms[1:], terms[0]) for asked, *terms in zip(which, *found, strict=True) if asked]

        if parts is None:
            free = torch.get_num_threads()
            torch.set_num_threads(self._threads)
            of_all = summed(1, (True, bias), x, weight, *options)
            torch.set_num_threads(free)
            return of_all
        if parts[0] == parts[1] or not bias:
            return summed(parts[0], (True, bias), x, weight, *options)
        # A bias's gradient alone costs as much as both, and depends on the output: the input may be of one channel.
        ones = [1] * (x.ndim - 2)
        narrow = x.new_zeros(len(x), 1, *grad.shape[2:]), weight.new_zeros(len(weight), 1, *(3 * n for n in ones))
        same = options[0], ones, ones, ones, False, [0 * n for n in ones], 1
        of_weight = summed(parts[0], (True, False), x, weight, *options)
        return of_weight + summed(parts[1], (False, True), *narrow, *same)


CORES = Cores()
"""Of this process."""


def _cores() -> Sequence[int]:
    """The numbers of the cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
