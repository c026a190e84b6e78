"""What a metric is given, and what it returns."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from diffusion.checkpoint import Checkpoint
from diffusion.config import Config
from diffusion.data.base import DataSet, load
from diffusion.data.decode import to_uint8, to_x_start
from diffusion.data.summary import evenly
from diffusion.files import cache_folder, write_cache
from diffusion.metrics.features import FEATURES, Extractor
from diffusion.samplers import Progress
from diffusion.sampling import batches, generate

if TYPE_CHECKING:  # takes long to import
    from accelerate import PartialState

CACHED_BYTES = 2**30


@dataclass
class Reference:
    """The images that samples are compared with, and the network whose features they are compared in.

    Attributes:
        network: name in `FEATURES`.
        weights: file of its weights, for those that would download them.
        most: how many images are used at the most, evenly spaced.
    """

    dataset: DataSet
    device: torch.device
    network: str
    weights: Path | None = None
    most: int = 50_000

    @cached_property
    def extractor(self) -> Extractor:
        return FEATURES[self.network](self.dataset, self.device, self.weights)

    @cached_property
    def images(self) -> Tensor:
        """(N, C, *sizes), uint8."""
        return to_uint8(to_x_start(load(self.dataset, evenly(len(self.dataset), self.most).tolist())[0]))

    @cached_property
    def features(self) -> Tensor:
        """(N, D), on the CPU. Those of a fixed network are kept in the user's cache."""
        key = hashlib.sha256(f"{self.extractor.name} {self.dataset.fingerprint()} {self.most}".encode()).hexdigest()
        path = cache_folder() / f"features_{key[:24]}.npy"
        if self.extractor.fixed:
            with suppress(OSError, ValueError, EOFError):
                return torch.from_numpy(np.load(path, allow_pickle=False))
        found = self.run(self.images)[0]
        if self.extractor.fixed and found.nbytes < CACHED_BYTES:
            buffer = BytesIO()
            np.save(buffer, found.numpy())
            write_cache(path, buffer.getvalue())
        return found

    def run(self, images: Tensor, size: int = 128) -> tuple[Tensor, Tensor | None]:
        """The features (N, D) and logits (N, K), if any, of images (N, C, *sizes), uint8."""
        parts = [self.extractor.run(to_x_start(part.to(self.device))) for part in images.split(size)]
        logits = [part.cpu() for _, part in parts if part is not None]
        return torch.cat([part.cpu() for part, _ in parts]), torch.cat(logits) if logits else None


@dataclass
class Subject:
    """A trained model, the data it is scored on, and how."""

    saved: Checkpoint
    network: nn.Module
    """in evaluation mode, on `state.device`"""
    dataset: DataSet
    state: PartialState
    """the processes that share the work"""
    reference: Reference
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

    @property
    def config(self) -> Config:
        """The run's configuration, with the steps of sampling."""
        config = self.saved.config
        return dataclasses.replace(
            config, sample=dataclasses.replace(config.sample, steps=self.steps or config.sample.steps)
        )

    def generate(self) -> Iterator[tuple[range, Tensor]]:
        """Generate this process's share of `n` images: batches of numbers and images in [-1, 1]."""
        labels = list(range(len(self.saved.class_names))) or None
        mine = self._share(self.n or len(self.dataset))
        progress = self.bar(len(mine) * self.config.sampling_process().num_timesteps)
        return generate(self.config, self.network, mine, labels=labels, seed=self.seed, device=self.state.device,
                        progress=progress)  # fmt: skip

    @cached_property
    def samples(self) -> Tensor:
        """The generated images of all processes, uint8, (n, C, *sizes). All metrics share them."""
        from accelerate.utils import gather_object  # takes long to import

        return torch.cat(gather_object([to_uint8(images) for _, images in self.generate()]))

    @cached_property
    def features(self) -> tuple[Tensor, Tensor | None]:
        """The features and logits of the generated images."""
        return self.reference.run(self.samples)

    def settings(self) -> dict[str, Any]:
        """What figures of generated images depend on beside the weights: only with the same ones they compare."""
        sample = self.config.sample
        return {"n": self.n or len(self.dataset), "sampler": sample.sampler, "steps": self.config.sample_steps(),
                "evaluations": self.config.sampling_process().num_timesteps, "options": sample.options,
                "guidance": sample.guidance, "seed": self.seed, "features": self.reference.extractor.name,
                "reference": self.dataset.fingerprint(),
                "reference_images": min(len(self.dataset), self.reference.most)}  # fmt: skip

    def _share(self, n: int) -> list[range]:
        share = math.ceil(n / self.state.num_processes)
        first = min(n, self.state.process_index * share)
        return batches(range(first, min(n, first + share)), self.batch_size)


@dataclass
class Score:
    """The figures of a metric, and lines that say them.

    Attributes:
        best: of the figures, the one by which checkpoints are ranked; lower is better, or higher with `higher`.
        sheet: images that belong to it, uint8, (N, C, *sizes), in rows under `headings`.
    """

    figures: dict[str, Any]
    lines: list[str]
    best: str | None = None
    higher: bool = False
    sheet: Tensor | None = None
    headings: list[str] = dataclasses.field(default_factory=list)
