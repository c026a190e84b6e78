"""A trained model, from its run: the network, the process, and sampling with the flags of `sample.py`."""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from diffusion.config.schema import Config
from diffusion.data.values import to_uint8, to_x_start
from diffusion.errors import UsageError, did_you_mean
from diffusion.parallel.cores import CORES
from diffusion.process import GaussianDiffusion
from diffusion.run.checkpoint import Checkpoint, newest
from diffusion.run.folder import check_is_run
from diffusion.sampling import batches, check_finite, sample_batch

Classes = Sequence[int | str] | str | int | Tensor | None
"""Class numbers or names: several, words separated by commas, or one; None: all."""


@dataclasses.dataclass(repr=False)
class Run:
    """A model with the settings of its run.

    Attributes:
        config: the settings; those of the section `sample` are what it is sampled with.
        network: in evaluation mode, on `device`.
        class_names: none for a model without classes.
        checkpoint: that the weights are from, if any.
        ema: which of its weights: a moving average by its name, none, or None for the run's first average.
    """

    config: Config
    network: nn.Module
    class_names: tuple[str, ...] = ()
    device: torch.device | str = "cpu"
    checkpoint: Checkpoint | None = None
    ema: str | None = None

    @property
    def process(self) -> GaussianDiffusion:
        """The process that the network was trained in."""
        return self.config.diffusion.process()

    @property
    def saved(self) -> Checkpoint:
        """The checkpoint of a run that was loaded."""
        assert self.checkpoint is not None
        return self.checkpoint

    @property
    def path(self) -> Path:
        """The checkpoint's folder."""
        return self.saved.path

    def to(self, device: torch.device | str) -> Self:
        """The run with its network on a device."""
        return dataclasses.replace(self, network=self.network.to(device), device=device)

    def labels(self, classes: Classes = None) -> list[int] | None:
        """The numbers of classes, given by number or name; None for a model without classes. Default: all, in turn."""
        if not self.class_names and classes is not None:
            raise UsageError(f"classes is {classes}, but the model of {self.path} has no classes")
        if classes is None:
            return list(range(len(self.class_names))) or None
        if isinstance(classes, int | Tensor):
            classes = torch.as_tensor(classes).reshape(-1).tolist()
        return [self._label(str(word)) for word in (classes.split(",") if isinstance(classes, str) else classes)]

    def _label(self, word: str) -> int:
        names, is_number = self.class_names, word.isdecimal() and word.isascii()
        if word in names:
            return names.index(word)
        if is_number and int(word) < len(names):
            return int(word)
        listed = f"there are {', '.join(names[:10])}" + (f" and {len(names) - 10} more" if len(names) > 10 else "")
        hint = listed if is_number else did_you_mean(word, names, listed)
        raise UsageError(f"classes has {word!r}; it must be a class name or a number below {len(names)}: {hint}")

    def with_sampling(self, **flags: Any) -> Self:
        """The run with other settings in its section `sample`; None keeps one. Another sampler has its own usual steps.
        Raises UsageError where they do not fit."""
        given = {name: value for name, value in flags.items() if value is not None}
        given |= given.pop("options", {})
        if given.get("sampler", self.config.sample.sampler) != self.config.sample.sampler:
            given.setdefault("steps", None)
        try:
            sample = dataclasses.replace(self.config.sample, **given)
            return dataclasses.replace(self, config=dataclasses.replace(self.config, sample=sample))
        except UsageError as error:
            raise UsageError(str(error).replace("sample.", "")) from None

    def check_low_res(self, low_res: Tensor | Self | None) -> None:
        """Raise UsageError if what an upsampler enlarges is missing or does not fit, or this is not an upsampler."""
        data = self.config.data
        if (low_res is None) != (data.low_res_size is None):
            how = "not an upsampler" if low_res is not None else "an upsampler: name the small images, or a run of them"
            raise UsageError(f"low_res: {self.path} is {how}")
        if low_res is None:
            return
        small = (data.channels, *data.low_res_sizes)
        shape = tuple(low_res.shape[1:]) if isinstance(low_res, Tensor) else low_res.config.data.shape
        if shape != small:
            raise UsageError(f"low_res has images of {shape}; {self.path} enlarges {small}")
        names = () if isinstance(low_res, Tensor) else low_res.class_names
        if names and self.class_names not in ((), names):
            raise UsageError(f"low_res has other classes than {self.path}")

    def sample(
        self, n: int | None = None, *, classes: Classes = None, batch_size: int = 64,
        low_res: Tensor | Self | None = None, seed: int = 0, progress: Any = iter, **flags: Any,
    ) -> Tensor:  # fmt: skip
        """Generate images: (n, C, *sizes) in [-1, 1], on the CPU. Image i of a seed is the same at any batch size.

        Args:
            n: how many images (default: as in the run's grids).
            classes: numbers or names, taken in turn (default: all).
            low_res: for an upsampler, small images (N, C, *sizes) in [-1, 1], or the run that generates them.
            progress: wraps the steps of each batch.
            flags: sampler, steps, guidance, and the sampler's options (default: as in the run's grids).
        """
        n = self.config.sample.n if n is None else n
        for name, value, least in (("n", n, 1), ("batch_size", batch_size, 1), ("seed", seed, 0)):
            if not isinstance(value, Integral) or value < least:
                raise UsageError(f"{name} is {value}; it must be a whole number from {least}")
        run = self.with_sampling(**flags)
        run.check_low_res(low_res)
        labels = (low_res if isinstance(low_res, Run) and not self.class_names else self).labels(classes)
        indices = batches(range(n), batch_size)
        images = run.generate(indices, labels=labels, low_res=low_res, seed=seed, progress=progress)
        return torch.cat([check_finite(batch) for _, batch in images])

    def generate(
        self, indices: Sequence[range], *, labels: Sequence[int] | None = None, low_res: Tensor | Self | None = None,
        **options: Any,
    ) -> Iterator[tuple[range, Tensor]]:  # fmt: skip
        """Generate images, with the sampler, steps, options and guidance of the section `sample`.

        Args:
            indices: the numbers of the images, in batches. Image i of a seed is the same in any batch.
            labels: class numbers, of which image i takes number i modulo their count.
            low_res: see `sample`.
            options: seed and progress (see `sample_batch`).

        Yields each batch and its images (N, C, *sizes) in [-1, 1], on the CPU.
        """
        config, settings = self.config, self.config.sample
        draw = partial(sample_batch, sampler=settings.sampler, options=settings.options, guidance=settings.guidance)
        process, shape = config.sampling_process(), config.data.shape
        for batch in indices:
            y = torch.tensor([labels[i % len(labels)] for i in batch]) if labels and self.class_names else None
            small = low_res[batch.start : batch.stop] if isinstance(low_res, Tensor) else None
            if isinstance(low_res, Run):
                [(_, small)] = low_res.generate([batch], labels=labels, **options)
                small = to_x_start(to_uint8(small)) if config.data.range is None else small
            with CORES.followed(self.network) as network:
                images = draw(process, network, shape, batch, labels=y, low_res=small, device=self.device, **options)
            yield batch, images


def load_run(path: Path | str, ema: str | None = None) -> Run:
    """Open a run, its newest undamaged checkpoint, or a checkpoint, with the weights that `ema` selects.

    Only the files that are read are verified. Raises UsageError if there is none, or it does not have the weights.
    """
    check_is_run(Path(path))
    saved, weights = newest(Path(path), lambda checkpoint: checkpoint.weights(ema))
    return Run(saved.config, saved.network(weights).eval(), saved.class_names, checkpoint=saved, ema=ema)
