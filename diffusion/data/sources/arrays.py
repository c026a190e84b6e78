"""Images, signals or volumes in a .npy or .npz file."""

from __future__ import annotations

import zlib
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from diffusion.config.fields import PathText, section
from diffusion.data.decode import scale
from diffusion.data.image_files import FileDataset, ImageFiles, Sizes
from diffusion.data.values import Array
from diffusion.errors import UsageError, one_line

IMAGES, LABELS = ("arr_0", "images", "x"), ("arr_1", "labels", "y")


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
        try:
            with Path(self.path).open("rb") as file:  # an .npz cannot be mapped into memory
                mode = None if file.read(2) == b"PK" else "r"
            loaded: Any = np.load(self.path, mmap_mode=mode, allow_pickle=False)  # type: ignore[arg-type]
            arrays = {"arr_0": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
        except Exception as error:  # numpy raises OSError, ValueError, BadZipFile, ...
            raise UsageError(f"data.path {self.path} cannot be read as arrays ({one_line(error)})") from None
        images: Any = next((arrays[name] for name in IMAGES if name in arrays), np.zeros(0))
        given = next((arrays[name] for name in LABELS if name in arrays), None)
        if images.ndim < 2 or len(images) == 0:
            there = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
            raise UsageError(f"data.path {self.path} holds {there}, and no images (N, *sizes, C) as arr_0 or images")
        if self.range is None and images.dtype not in (np.uint8, np.uint16):
            try:
                scale(images, None)  # its error names the range of all rows
            except ValueError as error:
                raise UsageError(f"data.path {self.path} cannot be read: {error}") from None
        labels = np.zeros(len(images), np.int64) if given is None else given
        if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu" or labels.min() < 0:
            raise UsageError(f"the labels of data.path {self.path} are {labels.shape} {labels.dtype}; they must be "
                             f"({len(images)},), whole numbers from 0")  # fmt: skip
        if images.ndim > 2 and images.shape[1] == self.channels != images.shape[-1]:
            images = np.moveaxis(images, 1, -1)
        values, labels = np.unique(labels, return_inverse=True)
        classes = () if given is None else tuple(map(str, values))
        ids = np.arange(len(images))
        return FileDataset(Rows(images, self.path), ids, labels.astype(np.int64), classes, self.target)


@dataclass
class Rows:
    """The rows of an array in place of files. Their checksums stand for their sizes."""

    images: Array
    path: str
    suffix = ".npy"

    def __post_init__(self) -> None:
        self.names = np.array([b"%d" % i for i in range(len(self.images))])
        self.where = f"{self.path}: row "

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        return np.array([zlib.crc32(row.tobytes()) for row in self.images], dtype=np.int64)

    def open(self, i: int) -> Any:
        return nullcontext(self.images[i])
