"""What a data set is, and the configuration that all sources share.

To add a source, write a subclass of `DataConfig` with the source's own fields and `open`, and add it to `SOURCES`
(`diffusion.data.sources`). `docs/extending.md` shows it.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from diffusion.config.fields import Channels, Finite, ImageSize, PathText, Positive, section
from diffusion.data.conditions import NO_VECTORS, Rows, Vectors, conditioned
from diffusion.data.decode import Target
from diffusion.data.values import Array, shrink, to_x_start
from diffusion.errors import UsageError
from diffusion.randomness import generator_for

Sizes = ImageSize | Annotated[tuple[int, ...], Field(strict=False)] | None
Range = Annotated[tuple[int | Finite, int | Finite], Field(strict=False)] | None
Labels = NDArray[np.int64]


class Loaded(NamedTuple):
    """A batch as a data set gives it. Arrays, not tensors: torch passes tensors from worker processes through /dev/shm,
    which may be small, and then loses them without an error."""

    images: Array
    """(B, C, *sizes), uint8 or float32 in [-1, 1]; condition images are its last channels"""
    labels: Labels
    """(B,), 0 without classes"""
    vectors: Rows
    """(B, size), of size 0 without condition vectors"""
    replaced: Sequence[str] = ()
    """the errors of images that were replaced by others"""


class Batch(NamedTuple):
    """A batch as tensors, of images and condition images apart (without, of 0 channels)."""

    images: Tensor
    labels: Tensor
    vectors: Tensor
    condition_images: Tensor

    @classmethod
    def of(cls, loaded: Loaded, condition_channels: int) -> "Batch":
        images, labels, vectors = (torch.from_numpy(array) for array in loaded[:3])
        images, conditions = images.tensor_split([images.shape[1] - condition_channels], dim=1)
        return cls(images, labels, vectors, conditions)


class DataSet(Protocol):
    """What training and evaluation use of a data set."""

    class_names: tuple[str, ...]
    labels: Any
    """(N,), the class of each image, as a tensor or array"""

    left_out: tuple[str, ...] = ()
    """the errors of files that are not among the images"""
    vectors: Vectors = NO_VECTORS
    """the condition vector of each image, if any"""
    condition_channels: int = 0
    """how many of the images' last channels are their condition images"""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: Sequence[int]) -> Loaded | UsageError:
        """The images at `indices`. An error is returned: raised in a worker, it would lose its one-line message."""

    def name_of(self, index: int) -> str:
        """The name of an image in messages."""
        return self.key_of(index)

    def key_of(self, index: int) -> str:
        """The name of an image that does not depend on where the data are stored."""

    def content_of(self, index: int) -> bytes:
        """The undecoded content of an image. Raises an exception of any type if it cannot be read."""

    def fingerprint(self) -> str:
        """A hash of the data."""

    def select(self, indices: NDArray[np.int64]) -> "DataSet":
        """The images at `indices`, in order."""


@section("data")
class DataConfig:
    """The images."""

    source: str
    """data set: digits ship with the package, folder is your own images"""
    image_size: Sizes
    """height and width in pixels, after the paper's preprocessing; of files and arrays also [height, width], [length]
    of signals, [depth, height, width] of volumes, which are not resized, or null: that of the first image"""
    channels: Channels
    """1 grey, 2 grey + alpha, 3 RGB, 4 RGB + alpha; any other number of arrays, whose last axis it is"""
    low_res_size: Positive | Annotated[tuple[int, ...], Field(strict=False)] | None = None
    """train an upsampler: the network is also given each image shrunk to this size; null: no upsampler"""
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """share of the images, chosen by their names and train.seed, that is not trained on, and whose loss is logged"""
    conditions: PathText | None = None
    """file of condition vectors: a .csv with file_name and columns of numbers; or a .npy or .npz whose rows are in the
    order of the images"""
    condition_columns: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """those of its columns (arrays of an .npz) to condition on, or columns of a huggingface data set; empty: all of the
    file's"""
    allow_change: bool = False
    """continue a run although its images have changed"""
    workers: Annotated[int, Field(ge=0, le=256)] = 0
    """processes that read images ahead for each training process (for large folders)"""

    splits: ClassVar[tuple[str, ...]] = ("train",)
    any_size: ClassVar[bool] = False
    """Whether images of several sizes belong to the source."""
    has_columns: ClassVar[bool] = False
    """Whether the source has columns of its own."""
    # Sources that have these as settings declare them as fields.
    random_flip = unbounded = False
    condition_images = cast(str | None, None)
    condition_channels = 0
    on_error = "fail"
    range = condition_range = cast(Range, None)

    def __post_init__(self) -> None:
        for name, span in (("range", self.range), ("condition_range", self.condition_range)):
            if span is not None and span[0] >= span[1]:
                raise UsageError(f"data.{name} is {list(span)}; it must rise")
        if self.unbounded and not isinstance((self.range or (0,))[0], float):  # whole numbers are written as integers
            right = "with data.unbounded, it must be of decimals, such as [-5.5, 5.5]"
            raise UsageError(f"data.range is {self.range and list(self.range)}; {right}")
        if self.condition_columns and self.conditions is None and not self.has_columns:
            raise UsageError(f"data.condition_columns is {list(self.condition_columns)}: name data.conditions, too")
        for name, size in (("image_size", self.image_size), ("low_res_size", self.low_res_size)):
            if isinstance(size, tuple) and (len(size) not in (1, 2, 3) or min(size) < 1):
                raise UsageError(f"data.{name} is {list(size)}; it must be one to three sizes of at least 1")
        if self.low_res_size is not None and self.image_size is not None:
            small, large = self.low_res_sizes, self.sizes
            if len(small) != len(large) or any(np.greater_equal(small, large)):
                raise UsageError(f"data.low_res_size is {self.low_res_size}; it must be below data.image_size")

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes of one image: (height, width); (length,) of a signal; (depth, height, width) of a volume."""
        assert self.image_size is not None, "image_size is null: see Config.resolved"
        return self.image_size if isinstance(self.image_size, tuple) else (self.image_size,) * 2

    @property
    def low_res_sizes(self) -> tuple[int, ...]:
        """The sizes of the small images that an upsampler enlarges."""
        assert self.low_res_size is not None
        return self.low_res_size if isinstance(self.low_res_size, tuple) else (self.low_res_size,) * len(self.sizes)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one image, (C, *sizes)."""
        return self.channels, *self.sizes

    @property
    def target(self) -> Target:
        """The sizes, channels and values that images are converted to."""
        return Target(self.sizes, self.channels)

    @property
    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes (C, *sizes) of the condition images that the network is given: `image` and `low_res`, if any."""
        shapes = {"image": (self.condition_channels, *self.sizes)} if self.condition_channels else {}
        return shapes if self.low_res_size is None else shapes | {"low_res": (self.channels, *self.low_res_sizes)}

    def given(self, batch: Batch, classes: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Images in [-1, 1] and their conditions by name: `y` if the model has classes, `vector` (not scaled), `image`,
        and `low_res` of an upsampler."""
        x_start, given = to_x_start(batch.images), {"y": batch.labels} if classes else {}
        if batch.vectors.shape[1]:
            given["vector"] = batch.vectors
        if self.condition_channels:
            given["image"] = to_x_start(batch.condition_images)
        if self.low_res_size is not None:
            given["low_res"] = shrink(x_start, self.low_res_size)
        return x_start, given

    def open(self, split: str = "train") -> DataSet:
        """Open the data set. Raises UsageError if it is missing or cannot be read."""
        raise NotImplementedError

    def found_sizes(self) -> tuple[int, ...]:
        """The sizes of the first image, for an image_size of null."""
        raise NotImplementedError


@dataclass
class ArrayDataset(DataSet):
    """Images in memory: (N, C, *sizes), uint8 or float32 in [-1, 1], and labels (N,), int64.

    Attributes:
        left_out: the errors of files that could not be read.
        files: the files that the images were read from, if any.
        numbers: the images' indices in the whole data set; None: these are the whole.
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    files: DataSet | None = None
    numbers: Labels | None = None
    vectors: Vectors = NO_VECTORS
    condition_channels: int = 0

    def __getitems__(self, indices: Sequence[int]) -> Loaded:
        chosen = list(indices)
        return Loaded(self.images[chosen].numpy(), self.labels[chosen].numpy(), self.vectors.at(chosen))

    def name_of(self, index: int) -> str:
        return self.files.name_of(index) if self.files else self.key_of(index)

    def key_of(self, index: int) -> str:
        own = f"number {index if self.numbers is None else self.numbers[index]}"
        return self.files.key_of(index) if self.files else own

    def content_of(self, index: int) -> bytes:
        return self.images[index].numpy().tobytes()

    def fingerprint(self) -> str:
        """A hash of the images, their order, labels and classes."""
        return digest(self.images.numpy(), self.labels.numpy(), self.class_names, *self.vectors.hashed)

    def select(self, indices: NDArray[np.int64]) -> "ArrayDataset":
        numbers = indices if self.numbers is None else self.numbers[indices]
        files, vectors = self.files.select(indices) if self.files else None, self.vectors.select(indices)
        part: dict[str, Any] = dict(images=self.images[indices], labels=self.labels[indices], vectors=vectors)
        return dataclasses.replace(self, **part, files=files, numbers=numbers)


def open_data(config: DataConfig, split: str = "train") -> DataSet:
    """Open the data set of a configuration. Raises UsageError if it cannot be read, or has images of another shape or
    type than the configuration says."""
    dataset = conditioned(config.open(split), config, split)
    if len(dataset):
        image = load(dataset, [0]).images[0]
        if image.shape != config.shape or image.dtype not in (torch.uint8, torch.float32):
            given = f"data.source {config.source} gives images of {image.dtype} {tuple(image.shape)}"
            raise UsageError(f"{given}; they must be torch.uint8 or torch.float32 {config.shape}")
    return dataset


def with_classes(dataset: Any, names: Sequence[str]) -> Any:
    """A data set with its classes in another order: labels go by name."""
    labels = np.array([names.index(name) for name in dataset.class_names])[np.asarray(dataset.labels)]
    tensor = isinstance(dataset.labels, Tensor)
    return dataclasses.replace(dataset, labels=torch.from_numpy(labels) if tensor else labels, class_names=tuple(names))


def hold_out(dataset: DataSet, share: float, seed: int) -> tuple[DataSet, DataSet | None]:
    """Divide a data set into what is trained on and what is held out, if any.

    Whether an image is held out depends on its name and the seed alone: adding or removing others does not change it.
    Raises UsageError if nothing is left for one of the two.
    """
    if not share:
        return dataset, None
    names = [f"{seed} {dataset.key_of(i)}".encode("utf-8", "surrogateescape") for i in range(len(dataset))]
    draws = [int.from_bytes(hashlib.blake2b(name, digest_size=4).digest()) for name in names]
    out = np.array(draws) < int(share * 2**32)
    if out.all() or not out.any():
        raise UsageError(f"data.held_out is {share}, which of {len(dataset)} images holds out {int(out.sum())}")
    return dataset.select(np.flatnonzero(~out)), dataset.select(np.flatnonzero(out))


def part(n: int, count: int) -> Labels:
    """Up to `count` of the numbers below `n`, in order, spread over all of them.

    Each comes from one of `count` equal stretches, where its place is random, so that a part of sorted or periodic data
    is like the whole. It is the same at every call.
    """
    if count >= n:
        return np.arange(n)
    starts = np.arange(count + 1) * n // count
    places = torch.rand(count, dtype=torch.float64, generator=generator_for("cpu", 0, "part", n, count)).numpy()
    return (starts[:-1] + places * np.diff(starts)).astype(np.int64)


def count_seen(held_out: DataSet, trained: DataSet) -> int:
    """How many of the held-out images are also among those trained on, by their contents."""

    def contents(dataset: DataSet) -> Iterator[bytes]:
        for i in range(len(dataset)):
            with suppress(Exception):  # whoever decodes the image reports it
                yield hashlib.blake2b(dataset.content_of(i), digest_size=16).digest()

    known = set(contents(trained))
    return sum(content in known for content in contents(held_out))


def digest(*parts: Any) -> str:
    """A hash of arrays and other values, 16 hexadecimal digits."""
    total = hashlib.sha256()
    for part in parts:
        is_array = isinstance(part, np.ndarray)
        total.update(repr((part.shape, str(part.dtype)) if is_array else part).encode("utf-8", "surrogateescape"))
        total.update(part.tobytes() if is_array else b"")
    return total.hexdigest()[:16]


def load(dataset: DataSet, indices: Sequence[int]) -> Batch:
    """The images at `indices`, in order. Raises UsageError with the name of a file that cannot be read."""
    loaded = dataset.__getitems__(indices)
    if isinstance(loaded, UsageError):
        raise loaded
    return Batch.of(loaded, dataset.condition_channels)
