"""What a metric is given, and what it returns."""

from __future__ import annotations

import math
from collections.abc import Iterator
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
    n: int
    """how many images of the data, or generated ones, are scored"""
    steps: str = ""
    """steps of the process: a count or sections; empty: all"""
    seed: int = 0
    batch_size: int = 64
    progress: Progress = iter

    def batches(self) -> list[range]:
        """This process's images, in batches."""
        share = math.ceil(self.n / self.state.num_processes)
        first = min(self.n, self.state.process_index * share)
        return batches(range(first, min(self.n, first + share)), self.batch_size)

    def generate(self) -> Iterator[tuple[range, Tensor]]:
        """Generate this process's share of `n` images: batches of numbers and images in [-1, 1]."""
        labels = list(range(len(self.saved.class_names))) or None
        return generate(self.saved.config, self.network, self.batches(), labels=labels, seed=self.seed,
                        device=self.state.device, progress=self.progress)  # fmt: skip


@dataclass
class Score:
    """The figures of a metric, and lines that say them."""

    figures: dict[str, Any]
    lines: list[str]
