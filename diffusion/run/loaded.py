"""A trained model, from its run: the network, the process, and sampling with the flags of `sample.py`."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from diffusion.config.fields import shown
from diffusion.config.schema import Config
from diffusion.data.base import Batch, DataSet, hold_out, load, open_data, part, with_classes
from diffusion.data.conditions import NO_SCALE, Scale
from diffusion.data.values import to_uint8, to_x_start
from diffusion.errors import UsageError, did_you_mean, prefixed
from diffusion.parallel.cores import CORES
from diffusion.process import GaussianDiffusion
from diffusion.run.checkpoint import Checkpoint, newest
from diffusion.run.folder import check_is_run
from diffusion.run.start import PROCESS
from diffusion.sampling import batches, check_finite, sample_batch

Classes = Sequence[int | str] | str | int | Tensor | None
"""Class numbers or names: several, words separated by commas, or one; None: all."""
Given = Mapping[str, Any] | Callable[[range], dict[str, Tensor]] | None
"""What images are generated from, by name: labels `y`, `vector` (not scaled), `image` and `low_res`, which may also be
a run that generates it. Image i takes row i modulo their number. Or a function of a batch, that returns its rows. None:
from nothing."""


@dataclasses.dataclass(repr=False)
class Run:
    """A model with the settings of its run.

    Attributes:
        config: the settings; those of the section `sample` are what it is sampled with.
        network: in evaluation mode, on `device`.
        class_names: none for a model without classes.
        checkpoint: that the weights are from, if any.
        ema: which of its weights: a moving average by its name, none, or None for the run's first average.
        vectors: the columns of its condition vectors.
        guide: the run that guides it in place of its network without conditions.

    Raises UsageError if it cannot be guided as `sample` says.
    """

    config: Config
    network: nn.Module
    class_names: tuple[str, ...] = ()
    device: torch.device | str = "cpu"
    checkpoint: Checkpoint | None = None
    ema: str | None = None
    vectors: Scale = NO_SCALE
    guide: "Run | None" = None

    def __post_init__(self) -> None:
        guidance = self.config.sample.guidance
        if guidance != 1 and not self.config.train.label_dropout and self.guide is None:
            raise UsageError(f"sample.guidance is {guidance}; without train.label_dropout or a guide, it can only be 1")
        if self.guide is not None:
            check_guide(self, self.guide)

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

    @property
    def drawn(self) -> dict[str, Any]:
        """How images are drawn, beside the steps."""
        return {name: getattr(self.config.sample, name) for name in ("sampler", "options", "guidance", "guide_between")}

    def to(self, device: torch.device | str) -> Self:
        """The run with its network, and its guide's, on a device."""
        guide = self.guide and self.guide.to(device)
        return dataclasses.replace(self, network=self.network.to(device), device=device, guide=guide)

    def raw(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Images in [-1, 1] and what they are generated from, on the device."""
        tensors = batch._asdict()
        vectors = tensors.pop("vectors")  # in double precision, which not every device has
        moved = {name: value.to(self.device, non_blocking=True) for name, value in tensors.items()}
        return self.config.data.given(Batch(**moved, vectors=vectors), bool(self.class_names))

    def given(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Images in [-1, 1] and the conditions that the network is called with, on the device."""
        x_start, given = self.raw(batch)
        return x_start, self.inputs(given)

    def of_images(self, dataset: DataSet, n: int) -> dict[str, Tensor]:
        """What n images are generated from, as n images have it that are spread over a data set."""
        return self.raw(load(dataset, np.resize(part(len(dataset), n), n).tolist()))[1]

    def inputs(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of `given` that the network is called with, as it knows them."""
        known = {"y": self.class_names, "vector": self.vectors.size, **self.config.data.condition_shapes}
        chosen = {name: value for name, value in given.items() if known.get(name)}
        chosen |= {"vector": self.vectors.scaled(given["vector"])} if self.vectors.size else {}
        return {name: value.to(self.device) for name, value in chosen.items()}

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
        guide = given.pop("guide", self.guide)
        guide = load_run(guide) if isinstance(guide, str | Path) else guide
        if given.get("sampler", self.config.sample.sampler) != self.config.sample.sampler:
            given.setdefault("steps", None)
        try:
            sample = dataclasses.replace(self.config.sample, **given)
            return dataclasses.replace(self, config=dataclasses.replace(self.config, sample=sample), guide=guide)
        except UsageError as error:
            raise UsageError(str(error).replace("sample.", "")) from None

    def of_data(self, n: int, missing: Iterable[str] = ("conditions",)) -> dict[str, Tensor]:
        """The labels and conditions of n images of the run's data, held-out ones if there are any, by column and name.

        Raises UsageError, with the names of those `missing`, if the data cannot be read, or are not the run's."""
        with prefixed(f"{', '.join(missing)} not given, and taken from the run's data: "):
            trained, held_out = hold_out(open_data(self.config.data), self.config.data.held_out, self.config.train.seed)
            dataset = held_out or trained
            named = {*self.class_names} in (set(), {*dataset.class_names})
            if not named or self.vectors.widths != dataset.vectors.widths:
                raise UsageError(f"they have other classes or conditions than {self.path}")
            dataset = with_classes(dataset, self.class_names) if self.class_names else dataset
            given = self.of_images(dataset, n)
        return given | self.vectors.columns(given.pop("vector", torch.empty(n, 0)))

    def chosen(self, n: int, classes: Classes, conditions: Mapping[str, Any]) -> dict[str, Any]:
        """What n images are generated from (see `sample`). Raises UsageError if it does not fit the run."""
        widths, shapes = self.vectors.widths, self.config.data.condition_shapes
        for name in conditions.keys() - {*widths, *shapes}:
            hint = did_you_mean(name, [*widths, *shapes], f"it has {', '.join([*widths, *shapes]) or 'none'}")
            raise UsageError(f"{name} is not a condition of {self.path}: {hint}")
        missing = sorted({*widths, *shapes} - conditions.keys())
        values = {**(self.of_data(n, missing) if missing else {}), **conditions}
        named = values["low_res"] if isinstance(values.get("low_res"), Run) and not self.class_names else self
        labels = values["y"] if "y" in values and classes is None else named.labels(classes)
        chosen = {"y": torch.as_tensor(labels)} if labels is not None else {}
        if widths:
            chosen["vector"] = torch.cat([as_rows(name, values[name], width, n) for name, width in widths.items()], 1)
        return chosen | {name: self._images(name, values[name], shape) for name, shape in shapes.items()}

    def _images(self, name: str, value: Any, shape: tuple[int, ...]) -> Any:
        """Condition images as a tensor, or the run that generates them. Raises UsageError if they do not fit."""
        if not isinstance(value, Run):
            with suppress(TypeError, ValueError, RuntimeError):
                value = to_x_start(torch.as_tensor(value).detach()).float()
            its = tuple(value.shape[1:]) if isinstance(value, Tensor) and len(value) else None
            fits = its is not None and bool(value.isfinite().all()) and (name != "image" or value.abs().max() <= 1.001)
        else:
            its, conditions = value.config.data.shape, (value.vectors.widths, value.config.data.condition_shapes)
            same = value.class_names == () or self.class_names in ((), value.class_names)
            fits = same and conditions in (({}, {}), (self.vectors.widths, {}))
        if its != shape or not fits:
            right = f"{shape}, uint8 or in [-1, 1], or a run of the same classes and conditions"
            raise UsageError(f"{name} has images of {its}, or others than can be: {self.path} needs {right}")
        return value

    def sample(
        self, n: int | None = None, *, classes: Classes = None, conditions: Mapping[str, Any] | None = None,
        low_res: Tensor | Self | None = None, batch_size: int = 64, seed: int = 0, progress: Any = iter, **flags: Any,
    ) -> Tensor:  # fmt: skip
        """Generate images: (n, C, *sizes) in [-1, 1], on the CPU. Image i of a seed is the same at any batch size.

        Args:
            n: how many images (default: as in the run's grids).
            classes: numbers or names, taken in turn (default: all).
            conditions: by column, a number, or rows (N,) or (N, width); and as `image`, images (N, C, *sizes) in
                [-1, 1]. Rows are taken in turn (default: those of the run's data).
            low_res: for an upsampler, small images (N, C, *sizes) in [-1, 1], or the run that generates them (default:
                images of the data, shrunk).
            progress: wraps the steps of each batch.
            flags: sampler, steps, guidance, guide (another `Run`), guide_between, and the sampler's options (default:
                as in the run's grids).
        """
        n = self.config.sample.n if n is None else n
        for name, value, least in (("n", n, 1), ("batch_size", batch_size, 1), ("seed", seed, 0)):
            if not isinstance(value, Integral) or value < least:
                raise UsageError(f"{name} is {value}; it must be a whole number from {least}")
        run = self.with_sampling(**flags)
        given = run.chosen(n, classes, {**(conditions or {}), **({} if low_res is None else {"low_res": low_res})})
        drawn = run.generate(batches(range(n), batch_size), given, seed=seed, progress=progress)
        return torch.cat([check_finite(batch) for _, batch in drawn])

    def generate(self, indices: Sequence[range], given: Given = None, **options: Any) -> Iterator[tuple[range, Tensor]]:
        """Generate images, with the sampler, steps, options and guidance of the section `sample`.

        Args:
            indices: the numbers of the images, in batches. Image i of a seed is the same in any batch.
            given: what they are generated from.
            options: seed and progress (see `sample_batch`).

        Yields each batch and its images (N, C, *sizes) in [-1, 1], on the CPU.
        """
        data, every = self.config.data, {} if callable(given) else dict(given or {})
        tensors = {name: value for name, value in every.items() if not isinstance(value, Run)}
        shared = {"shape": data.shape, "device": self.device, **self.drawn, **options}
        draw: Any = partial(sample_batch, self.config.sampling_process(), **shared)
        for batch in indices:
            rows = given(batch) if callable(given) else {n: x[[i % len(x) for i in batch]] for n, x in tensors.items()}
            if isinstance(small := every.get("low_res"), Run):
                [(_, drawn)] = small.generate([batch], tensors, **options)
                rows["low_res"] = to_x_start(to_uint8(drawn)) if data.range is None else drawn
            with CORES.followed(self.network) as network:
                guide = self.guide and partial(network, by=self.guide.network, **self.guide.inputs(rows))
                images = draw(network, batch=batch, conditions=self.inputs(rows), guide=guide)
            yield batch, images


def as_rows(name: str, values: Any, width: int, n: int) -> Tensor:
    """A column of condition vectors for n images, (n, width), from a number or rows that are taken in turn. Raises
    UsageError if they are no finite numbers, or of another width."""
    numbers = np.full(width, np.nan)
    with suppress(ValueError, TypeError, RuntimeError):
        numbers = np.asarray(values).astype(np.float64)
    fits = numbers.shape[-1:] == (width,) if width > 1 or numbers.ndim == 2 else numbers.ndim < 2
    if not fits or not numbers.size or not np.isfinite(numbers.astype(np.float32)).all():
        raise UsageError(f"condition {name} is {str(values)[:40]}; it must be rows of {width} finite numbers")
    return torch.from_numpy(np.resize(numbers, (n, width)))


def check_guide(run: Run, guide: Run) -> None:
    """Raise UsageError if a run cannot be guided by another: its images or process are others, or it has conditions
    that the run does not have."""

    def meaning(of: Run) -> tuple[dict[str, Any], dict[str, Any]]:
        data, settings = of.config.data, of.config.flat()
        must = {f"diffusion.{name}": settings.get(f"diffusion.{name}") for name in PROCESS if name != "variance"}
        may = {"classes": of.class_names, "conditions": dict(of.vectors.widths), **data.condition_shapes}
        must |= {"images": data.shape, "data.range": data.range, "consistency model": of.config.is_consistency_model}
        return must, {**may, "data.condition_range": data.condition_range}

    (must, may), (own_must, own_may) = meaning(guide), meaning(run)
    for name, value in {**must, **{name: value for name, value in may.items() if value}}.items():
        if value != (own := {**own_must, **own_may}.get(name)):
            raise UsageError(f"the guide {guide.path} has {name} {shown(value)}, and {run.path} {shown(own)}")


def load_run(path: Path | str, ema: str | None = None) -> Run:
    """Open a run, its newest undamaged checkpoint, or a checkpoint, with the weights that `ema` selects.

    Only the files that are read are verified. Raises UsageError if there is none, or it does not have the weights.
    """
    check_is_run(Path(path))
    saved, weights = newest(Path(path), lambda checkpoint: checkpoint.weights(ema))
    network = saved.network(weights).eval()
    return Run(saved.config, network, saved.class_names, checkpoint=saved, ema=ema, vectors=saved.vectors)
