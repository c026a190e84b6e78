"""The input and the output of a metric."""

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
from torch import Tensor

from diffusion.data.base import DataSet, Labels, digest, load, part
from diffusion.data.values import to_uint8, to_x_start
from diffusion.metrics.features import FEATURES, Extractor
from diffusion.run.loaded import Run
from diffusion.samplers import Progress
from diffusion.sampling import batches, check_finite
from diffusion.schedule import Respacing

if TYPE_CHECKING:  # takes long to import
    from accelerate import PartialState


@dataclass
class Reference:
    """The images that samples are compared with, and the network that computes the features.

    Attributes:
        network: name in `FEATURES`.
        weights: file of the network's weights, in place of a download.
        random_flip: whether the model is also trained on mirrored images.
        whole: the data of all classes, which the classifier is trained on; by default, `dataset`.
        most: the most images used, spread over all.
        kept: what a metric keeps from one model to the next.
    """

    dataset: DataSet
    device: torch.device
    network: str
    weights: Path | None = None
    random_flip: bool = False
    whole: DataSet | None = None
    most: int = 50_000
    kept: dict[str, Any] = dataclasses.field(default_factory=dict)

    @cached_property
    def extractor(self) -> Extractor:
        return FEATURES[self.network](self.whole or self.dataset, self.device, self.weights)

    @cached_property
    def images(self) -> Tensor:
        """(N, C, *sizes), uint8."""
        return to_uint8(to_x_start(load(self.dataset, part(len(self.dataset), self.most).tolist()).images))

    @cached_property
    def features(self) -> Tensor:
        """(N, D), on the CPU."""
        return self.run(self.images)[0]

    def run(self, images: Tensor, size: int = 128) -> tuple[Tensor, Tensor | None]:
        """The features (N, D) and logits (N, K), if any, of images (N, C, *sizes), uint8, on the CPU."""
        outputs = [self.extractor.run(to_x_start(batch.to(self.device))) for batch in images.split(size)]
        logits = [batch.cpu() for _, batch in outputs if batch is not None]
        return torch.cat([batch.cpu() for batch, _ in outputs]), torch.cat(logits) if logits else None


@dataclass
class Subject:
    """A trained model and the data that it is scored on.

    Attributes:
        run: its network is on `state.device`.
        state: the processes that share the work.
        n: how many images of the data are scored, or generated; None: as many as the data have.
        held_out: images that the model was not trained on, if there are any.
        steps: steps of the process, a count or sections; empty: all for a bound, those of the run's grids for samples.
        bar: given the number of steps, returns a function that wraps them.
        evaluations: how often the network was evaluated for an image, once there are samples.
    """

    run: Run
    dataset: DataSet
    state: "PartialState"
    reference: Reference
    n: int | None = None
    steps: Respacing = ""
    seed: int = 0
    batch_size: int = 64
    bar: Callable[[int], Progress] = lambda total: iter
    held_out: DataSet | None = None
    evaluations: float | None = None

    @property
    def count(self) -> int:
        """How many images are generated."""
        return self.n or len(self.dataset)

    def data_batches(self, dataset: DataSet | None = None, n: int | None = None) -> Iterator[tuple[range, list[int]]]:
        """This process's share of `n` images that are spread over the data, or over others, in batches: the numbers
        that determine their noise, and their indices."""
        chosen = part(len(dataset or self.dataset), n or self.count).tolist()
        return ((batch, chosen[batch.start : batch.stop]) for batch in self._share(len(chosen)))

    @property
    def sampled(self) -> Run:
        """The run with the steps of sampling."""
        return self.run.with_sampling(steps=self.steps or None)

    @property
    def rows(self) -> Labels:
        """The image of the data whose class and conditions each generated one has: classes are as frequent as there."""
        ordered = np.argsort(np.asarray(self.dataset.labels), kind="stable")
        return ordered[(2 * np.arange(self.count) + 1) * len(ordered) // (2 * self.count)]

    def given(self, batch: range) -> dict[str, Tensor]:
        """What a batch of images is generated from."""
        rows = self.rows[batch.start : batch.stop]
        if not self.run.vectors.size and not self.run.config.data.condition_shapes:
            return {"y": torch.as_tensor(self.dataset.labels)[rows]} if self.run.class_names else {}
        return self.run.raw(load(self.dataset, rows.tolist()))[1]

    @cached_property
    def samples(self) -> Tensor:
        """The generated images of all processes, uint8, (n, C, *sizes), which all metrics share.

        Raises UsageError if some are not finite.
        """
        from accelerate.utils import gather_object  # takes long to import

        calls, run, share = list[int](), self.sampled, self._share(self.count)
        bar = self.bar(len(share) * run.config.sampling_process().num_timesteps)
        count = lambda network, inputs: calls.append(len(inputs[0]))  # noqa: E731
        counters = [one.network.register_forward_pre_hook(count) for one in (run, run.guide) if one is not None]
        images = run.generate(share, self.given, seed=self.seed, progress=bar)
        gathered = gather_object([to_uint8(check_finite(batch)) for _, batch in images])
        for counter in counters:
            counter.remove()
        self.evaluations = sum(gather_object(calls)) / self.count
        return torch.cat(gathered)

    @cached_property
    def features(self) -> tuple[Tensor, Tensor | None]:
        """The features and logits of the generated images."""
        return self.reference.run(self.samples)

    def settings(self, metrics: Sequence[str], draws: bool = True, sets: int = 1) -> dict[str, Any]:
        """What the figures of metrics depend on beside the weights: figures of equal settings compare."""
        settings: dict[str, Any] = {"seed": self.seed, "data": self.dataset.fingerprint()}
        settings |= {"n": self.count} if set(metrics) != {"gap"} else {}
        settings |= {"bound_steps": self.steps or "all"} if "bits_per_dim" in metrics else {}
        if draws:
            config, images = self.sampled.config, self.reference.images
            counts = np.bincount(np.asarray(self.dataset.labels)).tolist()
            classes = {name: n for name, n in zip(self.dataset.class_names, counts, strict=False) if n}
            settings |= self.sampled.drawn | {"steps": config.sample_steps(), "sets": sets, "classes": classes}
            settings |= {"guide": guide.saved.fingerprint(guide.ema)} if (guide := self.run.guide) else {}
            settings |= {"features": self.reference.extractor.name, "reference_images": len(images)}
            settings["reference"] = digest(images.numpy())
        return settings

    def _share(self, n: int) -> list[range]:
        share = math.ceil(n / self.state.num_processes)
        first = self.state.process_index * share
        return batches(range(n)[first : first + share], self.batch_size)


@dataclass
class Score:
    """The figures of a metric, and lines that print them.

    Attributes:
        best: name of the figure that ranks checkpoints; lower is better, or higher with `higher`.
        sheet: images that illustrate it, uint8, (N, C, *sizes), in rows under `headings`.
        notes: lines on the limits of the figures.
    """

    figures: dict[str, Any]
    lines: list[str]
    best: str | None = None
    higher: bool = False
    sheet: Tensor | None = None
    headings: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)


class Metric(NamedTuple):
    """A function that scores a model, its requirements (the least number of images, and a check, which raises
    UsageError before anything is computed), and whether it scores generated images."""

    score: Callable[[Subject], Score]
    least: int = 1
    check: Callable[[Subject], object] = lambda subject: None
    draws: bool = True


T_95 = 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262
"""Quantiles of Student's t for 95% intervals, of 1 to 9 degrees of freedom."""


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
