"""What a data set is, and the configuration that all sources share.

To add a source, write a subclass of `DataConfig` with the source's own fields and `open`, and add it to `SOURCES`
(`diffusion.data.sources`). `docs/extending.md` shows it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from diffusion.errors import UsageError
from diffusion.fields import Channels, ImageSize, section

OnError = Literal["fail", "skip"]
Batch = tuple[Tensor, Tensor]
"""Images (B, C, *sizes), uint8, and their labels (B,), int64 (0 without classes)."""
Loaded = tuple[NDArray[np.uint8], NDArray[np.int64], list[str]]
"""A batch, and the errors of images that were replaced by others. Arrays, not tensors: torch passes tensors from worker
processes through /dev/shm, which may be small, and then loses them without an error."""


class DataSet(Protocol):
    """What training and evaluation use of a data set."""

    class_names: tuple[str, ...]

    @property
    def left_out(self) -> tuple[str, ...]:
        """The errors of files that are not among the images."""

    def __len__(self) -> int: ...

    def __getitems__(self, indices: Sequence[int]) -> Loaded | UsageError:
        """The images at `indices`. An error is returned: raised in a worker, it would lose its one-line message."""

    def name_of(self, index: int) -> str:
        """What an image is called in messages."""

    def fingerprint(self) -> str:
        """A number that differs for other data."""


@section("data")
class DataConfig:
    """The images."""

    source: str
    """data set: digits ship with the package, folder is your own images"""
    image_size: ImageSize
    """height and width in pixels, after the paper's preprocessing"""
    channels: Channels
    """1 grey, 2 grey + alpha, 3 RGB, 4 RGB + alpha; folder: any other number, of (height, width, channels) .npy"""
    low_res_size: Annotated[int, Field(ge=1)] | None = None
    """train an upsampler: the network is also given each image shrunk to this size; null: no upsampler"""
    allow_change: bool = False
    """continue a run although its images have changed"""
    workers: Annotated[int, Field(ge=0, le=256)] = 0
    """processes that read images ahead for each training process (for large folders)"""

    splits: ClassVar[tuple[str, ...]] = ("train",)
    any_size: ClassVar[bool] = False
    """Whether images of several sizes belong to the source."""
    random_flip: ClassVar[Any] = False
    on_error: ClassVar[Any] = "fail"

    def __post_init__(self) -> None:
        if self.low_res_size is not None and self.low_res_size >= self.image_size:
            raise UsageError(f"data.low_res_size is {self.low_res_size}; it must be at most {self.image_size - 1}")

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one image, (C, *sizes)."""
        return self.channels, self.image_size, self.image_size

    def open(self, split: str = "train") -> DataSet:
        """Open the data set. Raises UsageError if it is missing or cannot be read."""
        raise NotImplementedError


@dataclass
class ArrayDataset:
    """Images in memory: (N, C, *sizes), uint8, and labels (N,), int64."""

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    left_out: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: Sequence[int]) -> Loaded:
        return self.images[list(indices)].numpy(), self.labels[list(indices)].numpy(), []

    def name_of(self, index: int) -> str:
        return f"number {index}"

    def fingerprint(self) -> str:
        """A number that other images, labels, classes or another order would not have."""
        return digest(self.images.numpy(), self.labels.numpy(), self.class_names)


def open_data(config: DataConfig, split: str = "train") -> DataSet:
    """Open the data set of a configuration. Raises UsageError if it cannot be read, or has images of another shape or
    type than the configuration says."""
    dataset = config.open(split)
    images = load(dataset, [0])[0] if len(dataset) else torch.empty(0, *config.shape, dtype=torch.uint8)
    if images.shape[1:] != config.shape or images.dtype != torch.uint8:
        raise UsageError(f"the images of data.source {config.source} are {images.dtype} {tuple(images.shape[1:])}, and "
                         f"its settings say torch.uint8 {config.shape}")  # fmt: skip
    return dataset


def digest(*parts: Any) -> str:
    """A number of 16 hexadecimal digits that other values would not have."""
    found = hashlib.sha256()
    for part in parts:
        array = isinstance(part, np.ndarray)
        found.update(repr((part.shape, str(part.dtype)) if array else part).encode("utf-8", "surrogateescape"))
        found.update(part.tobytes() if array else b"")
    return found.hexdigest()[:16]


def load(dataset: DataSet, indices: Sequence[int]) -> Batch:
    """The images at `indices`, in order. Raises UsageError with the name of a file that cannot be read."""
    loaded = dataset.__getitems__(indices)
    if isinstance(loaded, UsageError):
        raise loaded
    return torch.from_numpy(loaded[0]), torch.from_numpy(loaded[1])
