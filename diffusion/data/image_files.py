"""Image files by number, read when they are needed: what sources of files share."""

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated, Any, BinaryIO, Literal

import numpy as np
import torch
from pydantic import Field

from diffusion.config.fields import section
from diffusion.data.base import ArrayDataset, DataConfig, DataSet, Labels, Loaded, Range, Sizes, digest
from diffusion.data.containers import Container
from diffusion.data.decode import MAX_PIXELS, Target, decode, describe, stack
from diffusion.data.values import Array
from diffusion.errors import UsageError, one_line

OnError = Literal["fail", "skip"]
IN_MEMORY_BYTES = 64 * 2**20
"""Data up to this size, once preprocessed, are read into memory at the start."""


@section("data")
class ImageFiles(DataConfig):
    """The settings that sources of image files share."""

    image_size: Sizes = 64
    channels: Annotated[int, Field(ge=1, le=4096)] = 3
    range: Range = None
    """the values that become -1 and 1, such as [0, 4095] or [0.0, 1.0]; images are written with these values, too;
    null: all that 8 or 16 bits can hold, written with 8"""
    unbounded: bool = False
    """values may lie beyond the range, as an autoencoder's latents do; for sample.clip_denoised false"""
    random_flip: bool = False
    """mirror half of the images left to right"""
    on_error: OnError = "fail"
    """an image file that cannot be read ends the run, or is skipped, named and counted"""
    background: Annotated[int, Field(ge=0, le=255)] = 255
    """grey level that shows under transparent pixels, if channels has none for alpha"""
    max_pixels: Annotated[int, Field(ge=1)] = MAX_PIXELS
    """larger images are refused, since they may be meant to exhaust the memory"""

    any_size = True

    @property
    def target(self) -> Target:
        return Target(self.sizes, self.channels, self.range, self.unbounded, self.background, self.max_pixels)

    def open(self, split: str = "train") -> DataSet:
        dataset = self.list_files(split)
        size = len(dataset) * math.prod(self.shape) * (1 if self.range is None else 4)
        return dataset.in_memory() if size <= IN_MEMORY_BYTES else dataset

    def list_files(self, split: str = "train") -> "FileDataset":
        """The files, of which none has been read. Raises UsageError if there are none."""
        raise NotImplementedError

    def found_sizes(self) -> tuple[int, ...]:
        described = dataclasses.replace(self, image_size=1, low_res_size=None).list_files().read(0, describe)
        if isinstance(described, UsageError):
            raise UsageError(f"data.image_size is null, and {described}")
        return described[1]


@dataclass
class FileDataset(DataSet):
    """Image files that are read when they are needed.

    Attributes:
        ids: the images' numbers in the container.
        no_classes: why there are no classes, if there are none.
        not_read: how many other files there are, by their suffix.
    """

    container: Container
    ids: Labels
    target: Target
    labels: Labels
    class_names: tuple[str, ...] = ()
    no_classes: str = ""
    on_error: OnError = "fail"
    not_read: Mapping[str, int] = field(default_factory=dict)

    def __getitems__(self, indices: Sequence[int]) -> Loaded | UsageError:
        """A batch, or the error of one of its files.

        With `on_error` skip, an unreadable file is replaced by the next readable one, which depends on nothing else.
        """
        images, chosen, errors = list[Array](), list[int](), list[str]()
        for first in indices:
            for i in (k % len(self) for k in range(first, first + len(self))):
                image = self.read(i)
                if not isinstance(image, UsageError):
                    break
                if self.on_error == "fail":
                    return image
                errors.append(str(image))
            else:
                return UsageError(f"none of the {len(self)} images can be read: {errors[-1]}")
            images.append(image)
            chosen.append(i)
        return stack(images), self.labels[chosen], errors

    def read(self, i: int, decode: Callable[[BinaryIO | Array, Target], Any] = decode) -> Any:
        """One image, as the network is given it, or the error with its name."""
        try:
            with self.container.open(int(self.ids[i])) as file:
                return decode(file, self.target)
        except Exception as error:  # PIL raises OSError, ValueError, SyntaxError, struct.error, ... for broken files
            return UsageError(f"{self.name_of(i)} cannot be read as an image ({one_line(error)})")

    def name_of(self, index: int) -> str:
        return self.container.where + self.key_of(index)

    def key_of(self, index: int) -> str:
        return os.fsdecode(self.container.names[self.ids[index]])

    def content_of(self, index: int) -> bytes:
        with self.container.open(int(self.ids[index])) as file:
            return file.tobytes() if isinstance(file, np.ndarray) else file.read()

    def fingerprint(self) -> str:
        """A hash of the names and sizes of the files, their labels and classes. Their content is not read."""
        ids = self.ids
        return digest(self.container.names[ids], self.container.sizes[ids], self.labels, self.class_names)

    def select(self, indices: Labels) -> "FileDataset":
        return dataclasses.replace(self, ids=self.ids[indices], labels=self.labels[indices])

    def in_memory(self) -> ArrayDataset:
        """Read all of it now. Raises UsageError with the name of a file that cannot be read, unless it is skipped."""
        with ThreadPoolExecutor() as pool:
            results = list(pool.map(self.read, range(len(self))))
        errors = [result for result in results if isinstance(result, UsageError)]
        readable = np.flatnonzero([not isinstance(result, UsageError) for result in results])
        if errors and (self.on_error == "fail" or not len(readable)):
            raise errors[0]
        files, images = self.select(readable), torch.from_numpy(stack([results[i] for i in readable]))
        left_out = tuple(map(str, errors))
        return ArrayDataset(images, torch.from_numpy(files.labels), self.class_names, left_out, files)
