"""A trained model, from its run: the network, the process, and sampling with the flags of `sample.py`."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from diffusion.config.fields import shown
from diffusion.config.schema import Config
from diffusion.data.base import Batch, hold_out, load, open_data, part, with_classes
from diffusion.data.conditions import NO_SCALE, Scale
from diffusion.data.values import to_uint8, to_x_start
from diffusion.errors import UsageError, check_name, did_you_mean, prefixed
from diffusion.parallel.cores import CORES
from diffusion.process import GaussianDiffusion
from diffusion.run.checkpoint import Checkpoint, newest
from diffusion.run.folder import check_is_run
from diffusion.sampling import batches, check_finite, sample_batch

Classes = Sequence[int | str] | str | int | Tensor | None
"""Class numbers or names: several, words separated by commas, or one; None: all."""
Given = Mapping[str, Any]
"""What images are generated from, by name, each with rows of which image i takes row i modulo their number: labels `y`,
`vector` (not scaled), `image` and `low_res`, which may also be a run that generates it."""
SAME_IN_GUIDE = "steps", "schedule", "zero_terminal_snr", "prediction", "rescale_timesteps", "s_max"
"""Settings of the process that a guide shares."""


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
            right = "without train.label_dropout or a guide, it can only be 1"
            raise UsageError(f"sample.guidance is {guidance}; {right}")
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

    def to(self, device: torch.device | str) -> Self:
        """The run with its network, and its guide's, on a device."""
        guide = self.guide and self.guide.to(device)
        return dataclasses.replace(self, network=self.network.to(device), device=device, guide=guide)

    def raw(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Images in [-1, 1] and what they are generated from, on the device."""
        on_device = Batch(*(tensor.to(self.device, non_blocking=True) for tensor in batch))
        return self.config.data.given(on_device, bool(self.class_names))

    def given(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Images in [-1, 1] and the conditions that the network is called with, on the device."""
        x_start, given = self.raw(batch)
        return x_start, self.inputs(given)

    def inputs(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of `given` that the network is called with, and as it knows them."""
        data, size = self.config.data, self.vectors.size
        known = {"y": self.class_names, "vector": size, "image": data.condition_channels, "low_res": data.low_res_size}
        chosen = {name: value for name, value in given.items() if known[name]}
        return chosen | ({"vector": self.vectors.scaled(given["vector"])} if size else {})

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
        if given.get("sampler", self.config.sample.sampler) != self.config.sample.sampler:
            given.setdefault("steps", None)
        try:
            sample = dataclasses.replace(self.config.sample, **given)
            return dataclasses.replace(self, config=dataclasses.replace(self.config, sample=sample), guide=guide)
        except UsageError as error:
            raise UsageError(str(error).replace("sample.", "")) from None

    def check_low_res(self, low_res: Tensor | Self | None) -> None:
        """Raise UsageError if what an upsampler enlarges does not fit, or this is not an upsampler."""
        data = self.config.data
        if low_res is None:
            return
        if data.low_res_size is None:
            raise UsageError(f"low_res: {self.path} is not an upsampler")
        small = (data.channels, *data.low_res_sizes)
        shape = tuple(low_res.shape[1:]) if isinstance(low_res, Tensor) else low_res.config.data.shape
        if shape != small:
            raise UsageError(f"low_res has images of {shape}; {self.path} enlarges {small}")
        names = () if isinstance(low_res, Tensor) else low_res.class_names
        if names and self.class_names not in ((), names):
            raise UsageError(f"low_res has other classes than {self.path}")

    def of_data(self, n: int) -> dict[str, Tensor]:
        """What n images are generated from, as n images of the run's data have it: held-out ones, if there are any.

        Raises UsageError if the data cannot be read, or are not those of the run."""
        with prefixed("conditions are taken from the data of the run, unless all are given: "):
            trained, held_out = hold_out(open_data(self.config.data), self.config.data.held_out, self.config.train.seed)
            dataset = held_out or trained
            if set(self.class_names) - set(dataset.class_names) or self.vectors.widths != dataset.vectors.widths:
                raise UsageError(f"the data have other classes or conditions than {self.path}")
            dataset = with_classes(dataset, self.class_names) if self.class_names else dataset
            rows = np.resize(part(len(dataset), n), n).tolist()
            return self.raw(load(dataset, rows))[1]

    def chosen(
        self, n: int, classes: Classes = None, conditions: Mapping[str, Any] | None = None, image: Tensor | None = None,
        low_res: Tensor | Self | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """What n images are generated from (see `sample`). Raises UsageError if it does not fit the run."""
        given, widths, channels = dict(conditions or {}), self.vectors.widths, self.config.data.condition_channels
        for name in given:
            check_name(f"a condition of {self.path}", name, widths or ["none, since it has no condition vectors"])
        if image is not None and (image.ndim < 3 or tuple(image.shape[1:2]) != (channels,)):
            raise UsageError(f"image is {tuple(image.shape)}; {self.path} has condition images of {channels} channels")
        self.check_low_res(low_res)
        missing = widths.keys() - given.keys() or (channels and image is None)
        own = self.of_data(n) if missing or (low_res is None and self.config.data.low_res_size is not None) else {}
        names = low_res if isinstance(low_res, Run) and not self.class_names else self
        labels = own["y"] if "y" in own and classes is None else names.labels(classes)
        columns, start = list[Tensor](), 0
        for name, width in widths.items():
            column = own["vector"][:, start : start + width] if name not in given else given[name]
            columns, start = [*columns, as_column(name, column, width, n)], start + width
        chosen: dict[str, Any] = {"y": labels, "vector": torch.cat(columns, 1) if columns else None}
        chosen |= {"image": own.get("image") if image is None else image}
        chosen |= {"low_res": own.get("low_res") if low_res is None else low_res}
        return {
            name: torch.as_tensor(value) if name == "y" else value
            for name, value in chosen.items()
            if value is not None
        }

    def sample(
        self, n: int | None = None, *, classes: Classes = None, conditions: Mapping[str, Any] | None = None,
        image: Tensor | None = None, low_res: Tensor | Self | None = None, batch_size: int = 64, seed: int = 0,
        progress: Any = iter, **flags: Any,
    ) -> Tensor:  # fmt: skip
        """Generate images: (n, C, *sizes) in [-1, 1], on the CPU. Image i of a seed is the same at any batch size.

        Args:
            n: how many images (default: as in the run's grids).
            classes: numbers or names, taken in turn (default: all).
            conditions: by column, a number, or rows (N,) or (N, width), taken in turn (default: those of the data).
            image: condition images (N, C, *sizes) in [-1, 1], taken in turn (default: those of the data).
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
        given = run.chosen(n, classes, conditions, image, low_res)
        drawn = run.generate(batches(range(n), batch_size), given, seed=seed, progress=progress)
        return torch.cat([check_finite(batch) for _, batch in drawn])

    def generate(
        self, indices: Sequence[range], given: Given | None = None, **options: Any
    ) -> Iterator[tuple[range, Tensor]]:
        """Generate images, with the sampler, steps, options and guidance of the section `sample`.

        Args:
            indices: the numbers of the images, in batches. Image i of a seed is the same in any batch.
            given: what they are generated from.
            options: seed and progress (see `sample_batch`).

        Yields each batch and its images (N, C, *sizes) in [-1, 1], on the CPU.
        """
        config, settings = self.config, self.config.sample
        shared = {name: getattr(settings, name) for name in ("sampler", "options", "guidance", "guide_between")}
        process, shape = config.sampling_process(), config.data.shape
        tensors = {name: value for name, value in (given or {}).items() if not isinstance(value, Run)}
        small = (given or {}).get("low_res")
        for batch in indices:
            rows = {name: value[[i % len(value) for i in batch]].to(self.device) for name, value in tensors.items()}
            if isinstance(small, Run):
                [(_, drawn)] = small.generate([batch], tensors, **options)
                rows["low_res"] = (to_x_start(to_uint8(drawn)) if config.data.range is None else drawn).to(self.device)
            inputs = self.inputs(rows)
            with CORES.followed(self.network) as network:
                other = self.guide
                guide = partial(network, by=other.network, **other.inputs(rows)) if other is not None else None
                images = sample_batch(
                    process, network, shape, batch, labels=inputs.pop("y", None), conditions=inputs, guide=guide,
                    device=self.device, **shared, **options,
                )  # fmt: skip
            yield batch, images


def as_column(name: str, values: Any, width: int, n: int) -> Tensor:
    """A column of condition vectors for n images, (n, width): a number, or rows taken in turn. Raises UsageError if
    they are not finite or of another width."""
    try:
        rows = torch.as_tensor(np.asarray(values, np.float32)).reshape(-1, width)
    except (ValueError, TypeError, RuntimeError):
        raise UsageError(f"condition {name} is {str(values)[:40]}; it must be rows of {width} numbers") from None
    if not len(rows) or not rows.isfinite().all():
        raise UsageError(f"condition {name} is {str(values)[:40]}; it must be finite numbers")
    return rows[torch.arange(n) % len(rows)]


def check_guide(run: Run, guide: Run) -> None:
    """Raise UsageError if a run cannot be guided by another: its images, process or conditions are others."""

    def meaning(of: Run) -> tuple[dict[str, Any], dict[str, Any]]:
        data, settings = of.config.data, of.config.flat()
        must = {f"diffusion.{name}": settings.get(f"diffusion.{name}") for name in SAME_IN_GUIDE}
        conditions = {"classes": of.class_names, "conditions": dict(of.vectors.widths)}
        conditions |= {name: getattr(data, name) for name in ("condition_channels", "low_res_size")}
        return must | {"images": data.shape, "data.range": data.range}, conditions

    (must, conditions), (own, own_conditions) = meaning(guide), meaning(run)
    given = {name: value for name, value in conditions.items() if value}  # it may be without
    for name, value in (must | given).items():
        if value != (own | own_conditions)[name]:
            differ = f"{name} {shown(value)}, and {run.path} {shown((own | own_conditions)[name])}"
            raise UsageError(f"the guide {guide.path} has {differ}")


def load_run(path: Path | str, ema: str | None = None) -> Run:
    """Open a run, its newest undamaged checkpoint, or a checkpoint, with the weights that `ema` selects.

    Only the files that are read are verified. Raises UsageError if there is none, or it does not have the weights.
    """
    check_is_run(Path(path))
    saved, weights = newest(Path(path), lambda checkpoint: checkpoint.weights(ema))
    network = saved.network(weights).eval()
    return Run(saved.config, network, saved.class_names, checkpoint=saved, ema=ema, vectors=saved.vectors)
