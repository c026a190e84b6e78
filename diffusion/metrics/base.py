"""What a metric is given, and what it returns."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from diffusion.config.schema import Config
from diffusion.data.base import DataSet, digest, load, part
from diffusion.data.values import to_uint8, to_x_start
from diffusion.files.atomic import read_cache, write_cache
from diffusion.metrics.features import FEATURES, Extractor
from diffusion.run.checkpoint import Checkpoint
from diffusion.samplers import Progress
from diffusion.sampling import batches, check_finite, generate

if TYPE_CHECKING:  # takes long to import
    from accelerate import PartialState

CACHED_BYTES = 2**30


@dataclass
class Reference:
    """The images that samples are compared with, and the network whose features they are compared in.

    Attributes:
        network: name in `FEATURES`.
        weights: file of its weights, for those that would download them.
        random_flip: whether the model is trained on the images mirrored, too.
        whole: the data of all classes, on which a classifier is trained, if `dataset` is a part of them.
        most: how many images are used at the most, spread over all.
    """

    dataset: DataSet
    device: torch.device
    network: str
    weights: Path | None = None
    random_flip: bool = False
    whole: DataSet | None = None
    most: int = 50_000

    @cached_property
    def extractor(self) -> Extractor:
        return FEATURES[self.network](self.whole or self.dataset, self.device, self.weights)

    @cached_property
    def images(self) -> Tensor:
        """(N, C, *sizes), uint8."""
        return to_uint8(to_x_start(load(self.dataset, part(len(self.dataset), self.most).tolist())[0]))

    @cached_property
    def fingerprint(self) -> str:
        """A number that other images would not have."""
        return digest(self.images.numpy())

    @cached_property
    def features(self) -> Tensor:
        """(N, D), on the CPU. Those of a fixed network are kept in the user's cache, by what it is given; that it is
        the same network, its features of one image show."""
        if not self.extractor.fixed:
            return self.run(self.images)[0]
        name, first = f"features_{digest(self.extractor.name, self.fingerprint)}", self.run(self.images[:1])[0]
        [kept] = read_cache(name, "f") or [first.numpy()]
        if kept.shape != (len(self.images), first.shape[1]) or not np.allclose(kept[:1], first, rtol=1e-2, atol=1e-3):
            kept = self.run(self.images)[0].numpy()
            if kept.nbytes < CACHED_BYTES:
                write_cache(name, kept)
        return torch.from_numpy(kept).float()

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
    evaluations: float | None = None
    """how often the network was evaluated for an image, once there are samples"""

    @property
    def count(self) -> int:
        """How many images are generated."""
        return self.n or len(self.dataset)

    def data_batches(self) -> Iterator[tuple[range, list[int]]]:
        """This process's share of `n` images, spread over the data: numbers for their noise, and their indices, in
        batches."""
        chosen = part(len(self.dataset), self.count).tolist()
        return ((batch, chosen[batch.start : batch.stop]) for batch in self._share(len(chosen)))

    @property
    def config(self) -> Config:
        """The run's configuration, with the steps of sampling."""
        sample = dataclasses.replace(self.saved.config.sample, steps=self.steps or self.saved.config.sample.steps)
        return dataclasses.replace(self.saved.config, sample=sample)

    @property
    def labels(self) -> list[int] | None:
        """The class of each generated image: as frequent as in the data. None for a model without classes."""
        if not self.saved.class_names:
            return None
        found = np.sort(np.asarray(self.dataset.labels))
        return found[(2 * np.arange(self.count) + 1) * len(found) // (2 * self.count)].tolist()

    @cached_property
    def samples(self) -> Tensor:
        """The generated images of all processes, uint8, (n, C, *sizes). All metrics share them.

        Raises UsageError if some are not finite.
        """
        from accelerate.utils import gather_object  # takes long to import

        calls = [0]

        def counted(x: Tensor, t: Tensor, **inputs: Any) -> Tensor:
            calls[0] += len(x)
            return self.network(x, t, **inputs)

        mine = self._share(self.count)
        progress = self.bar(len(mine) * self.config.sampling_process().num_timesteps)
        images = generate(self.config, counted, mine, labels=self.labels, seed=self.seed, device=self.state.device,
                          progress=progress)  # fmt: skip
        parts = gather_object([to_uint8(check_finite(batch)) for _, batch in images])
        self.evaluations = sum(gather_object(calls)) / self.count
        return torch.cat(parts)

    @cached_property
    def features(self) -> tuple[Tensor, Tensor | None]:
        """The features and logits of the generated images."""
        return self.reference.run(self.samples)

    def settings(self, metrics: Sequence[str], sets: int = 1) -> dict[str, Any]:
        """What the figures of metrics depend on beside the weights: only with the same ones they compare."""
        found: dict[str, Any] = {"n": self.count, "seed": self.seed, "data": self.dataset.fingerprint()}
        if "bits_per_dim" in metrics:
            found["bound_steps"] = self.steps or "all"
        if set(metrics) != {"bits_per_dim"}:
            sample, counts = self.config.sample, np.bincount(np.asarray(self.dataset.labels)).tolist()
            classes = {name: count for name, count in zip(self.dataset.class_names, counts, strict=False) if count}
            found |= {"sampler": sample.sampler, "steps": self.config.sample_steps(), "options": sample.options,
                      "guidance": sample.guidance, "sets": sets, "classes": classes,
                      "features": self.reference.extractor.name, "reference": self.reference.fingerprint,
                      "reference_images": len(self.reference.images)}  # fmt: skip
        return found

    def _share(self, n: int) -> list[range]:
        share = math.ceil(n / self.state.num_processes)
        first = min(n, self.state.process_index * share)
        return batches(range(first, min(n, first + share)), self.batch_size)


@dataclass
class Score:
    """The figures of a metric, and lines that say them.

    Attributes:
        notes: lines that say how far the figures can be trusted.
        best: of the figures, the one by which checkpoints are ranked; lower is better, or higher with `higher`.
        sheet: images that belong to it, uint8, (N, C, *sizes), in rows under `headings`.
    """

    figures: dict[str, Any]
    lines: list[str]
    best: str | None = None
    higher: bool = False
    sheet: Tensor | None = None
    headings: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)


class Metric(NamedTuple):
    """A function that scores a model, and what it needs: at least so many images, and what `check` looks at before any
    is generated. `check` raises UsageError."""

    score: Callable[[Subject], Score]
    least: int = 1
    check: Callable[[Reference], object] = lambda reference: None


T_95 = 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262
"""Student's t for 95%, of 1 to 9 degrees of freedom."""


def over_sets(scores: Sequence[Score]) -> Score:
    """The mean of each figure over independent sets of samples, and half of its 95% interval as NAME_interval."""
    if len(scores) == 1:
        return scores[0]
    figures, lines = dict(scores[0].figures), list[str]()
    for name in [name for name, value in figures.items() if isinstance(value, float)]:
        values = [score.figures[name] for score in scores]
        half = T_95[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))
        figures |= {name: statistics.fmean(values), f"{name}_interval": half}
        lines.append(f"{name}: {figures[name]:.4f} +- {half:.4f} (95% interval over {len(values)} sets)")
    return dataclasses.replace(scores[0], figures=figures, lines=lines)
