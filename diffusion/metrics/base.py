"""What a metric is given, and what it returns."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from diffusion.checkpoint import Checkpoint
from diffusion.data.base import DataSet
from diffusion.samplers import Progress
from diffusion.sampling import batches, generate

if TYPE_CHECKING:  # takes long to import
    from accelerate import PartialState


@dataclass
class Subject:
    """A trained model, the data it is scored on, and how."""

    saved: Checkpoint
    network: nn.Module
    """in evaluation mode, on `state.device`"""
    dataset: DataSet
    state: PartialState
    """the processes that share the work"""
    n: int | None = None
    """how many images of the data, or generated ones; None: as many as the data have"""
    steps: str = ""
    """steps of the process: a count or sections; empty: all for a bound, those of the run's grids for sampling"""
    seed: int = 0
    batch_size: int = 64
    bar: Callable[[int], Progress] = lambda total: iter
    """given the number of steps, a function that wraps them"""

    def data_batches(self) -> list[range]:
        """This process's share of the first `n` images of the data, in batches."""
        return self._share(min(self.n or len(self.dataset), len(self.dataset)))

    def generate(self) -> Iterator[tuple[range, Tensor]]:
        """Generate this process's share of `n` images: batches of numbers and images in [-1, 1]."""
        config, labels = self.saved.config, list(range(len(self.saved.class_names))) or None
        if self.steps:
            config = dataclasses.replace(config, sample=dataclasses.replace(config.sample, steps=self.steps))
        mine = self._share(self.n or len(self.dataset))
        progress = self.bar(len(mine) * config.sampling_process().num_timesteps)
        return generate(config, self.network, mine, labels=labels, seed=self.seed, device=self.state.device,
                        progress=progress)  # fmt: skip

    def _share(self, n: int) -> list[range]:
        share = math.ceil(n / self.state.num_processes)
        first = min(n, self.state.process_index * share)
        return batches(range(first, min(n, first + share)), self.batch_size)


@dataclass
class Score:
    """The figures of a metric, and lines that say them."""

    figures: dict[str, Any]
    lines: list[str]
