"""Image files by number, read when they are needed: what sources of files share."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field

from diffusion.config.fields import Finite, section
from diffusion.data.base import ArrayDataset, DataConfig, DataSet, Labels, Loaded, digest
from diffusion.data.containers import Container
from diffusion.data.decode import MAX_PIXELS, Target, decode, native_sizes, stack
from diffusion.data.values import Array
from diffusion.errors import UsageError, one_line

OnError = Literal["fail", "skip"]
Sizes = Annotated[int, Field(ge=1, le=8192)] | Annotated[tuple[int, ...], Field(strict=False)] | None
Range = Annotated[tuple[int | Finite, int | Finite], Field(strict=False)] | None
IN_MEMORY_BYTES = 64 * 2**20
"""Data up to this size, once preprocessed, are read into memory at the start."""


@section("data")
class ImageFiles(DataConfig):
    """The settings that sources of image files share."""

    image_size: Sizes = 64  # type: ignore[assignment]
    channels: Annotated[int, Field(ge=1, le=4096)] = 3
    range: Range = None  # type: ignore[misc]
    """the values that become -1 and 1, such as [0, 4095] or [0.0, 1.0]; images are written with these values, too;
    null: all that 8 or 16 bits can hold, written with 8"""
    random_flip: bool = False  # type: ignore[misc]
    """mirror half of the images left to right"""
    on_error: OnError = "fail"  # type: ignore[misc]
    """an image file that cannot be read ends the run, or is skipped, named and counted"""
    background: Annotated[int, Field(ge=0, le=255)] = 255
    """grey level that shows under transparent pixels, if channels has none for alpha"""
    max_pixels: Annotated[int, Field(ge=1)] = MAX_PIXELS
    """larger images are refused, since they may be meant to exhaust the memory"""

    any_size = True

    @property
    def target(self) -> Target:
        return Target(self.sizes, self.channels, self.range, self.background, self.max_pixels)

    def open(self, split: str = "train") -> DataSet:
        dataset = self.list_files(split)
        values = 1 if self.range is None else 4
        small = len(dataset) * int(np.prod(self.shape)) * values <= IN_MEMORY_BYTES
        return dataset.in_memory() if small else dataset

    def list_files(self, split: str = "train") -> FileDataset:
        """The files, of which none has been read. Raises UsageError if there are none."""
        raise NotImplementedError

    def found_sizes(self) -> tuple[int, ...]:
        return dataclasses.replace(self, image_size=1, low_res_size=None).list_files().first_sizes()


@dataclass
class FileDataset:
    """Image files that are read when they are needed.

    Attributes:
        ids: the images' numbers in the container.
        no_classes: why there are no classes, if there are none.
        not_read: how many other files there are, by their suffix.
    """

    container: Container
    ids: Labels
    labels: Labels
    class_names: tuple[str, ...]
    target: Target
    on_error: OnError = "fail"
    no_classes: str = ""
    not_read: Mapping[str, int] = field(default_factory=dict)
    left_out = ()  # nothing has been read yet

    def __len__(self) -> int:
        return len(self.ids)

    def __getitems__(self, indices: Sequence[int]) -> Loaded | UsageError:
        """A batch, or the error of one of its files.

        With `on_error` skip, an unreadable file is replaced by the next readable one, which depends on nothing else.
        """
        images, labels, errors = [], [], list[str]()
        for first in indices:
            for i in ((first + further) % len(self) for further in range(len(self))):
                try:
                    image = self.read(i)
                    break
                except UsageError as error:
                    if self.on_error == "fail":
                        return error
                    errors.append(str(error))
            else:
                return UsageError(f"none of the {len(self)} images can be read: {errors[-1]}")
            images.append(image)
            labels.append(int(self.labels[i]))
        return stack(images), np.array(labels, dtype=np.int64), errors

    def read(self, i: int) -> Array:
        """One image, as the network is given it. Raises UsageError with its name if it cannot be read."""
        try:
            with self.container.open(int(self.ids[i])) as file:
                return decode(file, self.suffix_of(i), self.target)
        except Exception as error:  # PIL raises OSError, ValueError, SyntaxError, struct.error, ... for broken files
            raise UsageError(f"{self.name_of(i)} cannot be read as an image ({one_line(error)})") from None

    def suffix_of(self, i: int) -> str:
        return PurePosixPath(self.key_of(i)).suffix.lower() or self.container.suffix

    def first_sizes(self) -> tuple[int, ...]:
        """The sizes of the first image. Raises UsageError if it cannot be read."""
        try:
            with self.container.open(int(self.ids[0])) as file:
                return native_sizes(file, self.suffix_of(0), self.target)
        except Exception as error:
            reason = f"cannot be read as an image ({one_line(error)})"
            raise UsageError(f"data.image_size is null, and {self.name_of(0)} {reason}") from None

    def name_of(self, index: int) -> str:
        return self.container.where + self.key_of(index)

    def key_of(self, index: int) -> str:
        return os.fsdecode(self.container.names[self.ids[index]])

    def content_of(self, index: int) -> bytes:
        with self.container.open(int(self.ids[index])) as file:
            return file.tobytes() if isinstance(file, np.ndarray) else file.read()

    def fingerprint(self) -> str:
        """A number that files of other names, sizes or classes would not have. (Their content is not read for it.)"""
        ids = self.ids
        return digest(self.container.names[ids], self.container.sizes[ids], self.labels, self.class_names)

    def select(self, indices: Labels) -> FileDataset:
        return dataclasses.replace(self, ids=self.ids[indices], labels=self.labels[indices])

    def in_memory(self) -> ArrayDataset:
        """Read all of it now. Raises UsageError with the name of a file that cannot be read, unless it is skipped."""

        def read(i: int) -> Array | UsageError:
            try:
                return self.read(i)
            except UsageError as error:
                return error

        with ThreadPoolExecutor() as pool:
            results = list(pool.map(read, range(len(self))))
        errors = [image for image in results if isinstance(image, UsageError)]
        images = [image for image in results if not isinstance(image, UsageError)]
        if errors and (self.on_error == "fail" or not images):
            raise errors[0]
        kept = self.select(np.flatnonzero([not isinstance(image, UsageError) for image in results]))
        return ArrayDataset(torch.from_numpy(stack(images)), torch.from_numpy(kept.labels), self.class_names,
                            tuple(map(str, errors)), kept)  # fmt: skip
