"""Images, signals or volumes in a .npy or .npz file, or given by a program."""

import dataclasses
import zlib
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from diffusion.config.fields import PathText, Positive, section
from diffusion.data.base import DataConfig, DataSet, Sizes
from diffusion.data.containers import Rows
from diffusion.data.decode import scale
from diffusion.data.image_files import FileDataset, ImageFiles
from diffusion.data.values import Array
from diffusion.errors import UsageError, refusing


@section("data")
class Arrays(ImageFiles):
    """Arrays in one file."""

    source: Literal["arrays"] = "arrays"
    image_size: Sizes = None
    path: PathText | None = None
    """a .npy of (N, *sizes, C) or (N, C, *sizes), or an .npz with it as arr_0 or images, and labels (N,), if any, as
    arr_1 or labels"""

    def list_files(self, split: str = "train") -> FileDataset:
        if self.path is None:
            raise UsageError("data.source is arrays: name the file with --data.path FILE.npy or FILE.npz")
        with refusing(lambda reason: f"data.path {self.path} cannot be read as arrays ({reason})"):
            loaded: Any = np.load(self.path, mmap_mode="r", allow_pickle=False)  # an .npz is read, not mapped
            arrays = {"arr_0": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
        images: Any = next((arrays[name] for name in ("arr_0", "images", "x") if name in arrays), None)
        given: Any = next((arrays[name] for name in ("arr_1", "labels", "y") if name in arrays), None)
        if not isinstance(images, np.ndarray) or images.ndim < 2 or len(images) == 0:
            held = f"data.path {self.path} holds {', '.join(arrays) or 'no arrays'}"
            raise UsageError(f"{held}, and no images (N, *sizes, C) as arr_0 or images")
        if self.range is None and images.dtype not in (np.uint8, np.uint16):
            with refusing(lambda reason: f"data.path {self.path} cannot be read: {reason}", ValueError):
                scale(images, None)  # its error names the range of all rows
        labels, classes = np.zeros(len(images), np.int64), tuple[str, ...]()
        if given is not None:
            if given.shape != (len(images),) or given.dtype.kind not in "iu" or given.min() < 0:
                right = f"({len(images)},), whole numbers from 0"
                raise UsageError(f"the labels of data.path {self.path} are {given.shape} {given.dtype}; not {right}")
            values, labels = np.unique(given, return_inverse=True)
            classes = tuple(map(str, values))
        last = 0 if self.condition_images else self.condition_channels  # condition images are the last of these
        target = dataclasses.replace(self.target, channels=self.channels + last)
        if images.ndim > 2 and images.shape[1] == target.channels != images.shape[-1]:
            images = np.moveaxis(images, 1, -1)
        return FileDataset(ArrayRows(self.path, images), np.arange(len(images)), target, labels, classes)


class ArrayRows(Rows):
    """The rows of an array. Their checksums stand for their sizes."""

    def __init__(self, path: str, images: Array):
        super().__init__(path, len(images))
        self.images = images

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        return np.array([zlib.crc32(row.tobytes()) for row in self.images], dtype=np.int64)

    def open(self, i: int) -> AbstractContextManager[Array]:
        return nullcontext(self.images[i])


@section("data")
class Memory(DataConfig):
    """Images that a program gives to `diffusion.train`."""

    source: Literal["memory"] = "memory"
    image_size: Sizes = 8
    channels: Positive = 1
    condition_channels: Annotated[int, Field(ge=0, le=4096)] = 0
    """how many of the last channels of what is given are condition images"""
    random_flip: bool = False
    """mirror half of the images left to right"""

    def open(self, split: str = "train") -> DataSet:
        hint = "from a file, they are read with --data.source arrays --data.path FILE.npz"
        raise UsageError(f"data.source is memory, whose images are given to diffusion.train in Python: {hint}")
