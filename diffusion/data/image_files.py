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

from diffusion.config.fields import PathText, section
from diffusion.data.base import ArrayDataset, DataConfig, DataSet, Labels, Loaded, Range, Sizes, digest, part
from diffusion.data.conditions import NO_VECTORS, Vectors, conditioned
from diffusion.data.containers import Container, paired
from diffusion.data.decode import MAX_PIXELS, Target, decode, describe, of_one_type
from diffusion.data.values import Array
from diffusion.errors import UsageError, one_line, prefixed

OnError = Literal["fail", "skip"]
COMPARED, SHAPES_DIFFER = 1000, 0.02
"""How many pairs of an image and a condition image are compared by shape, and by how much their ratios may differ."""
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
    condition_images: PathText | None = None
    """images to condition on, one for each image, such as masks: a folder or archive of the same names (of files whose
    names begin alike: a.png, a.mask.png, a_mask.png), or a pattern of other files in path (*.mask.png); for arrays,
    another file; for huggingface, a column"""
    condition_channels: Annotated[int, Field(ge=0, le=4096)] = 0
    """their channels; of arrays without condition_images, the last channels of path's own images"""
    condition_range: Range = None
    """the values of condition images that become -1 and 1, as range; null: all that 8 or 16 bits can hold"""
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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.condition_images is not None and not self.condition_channels:
            raise UsageError("data.condition_channels is 0, and data.condition_images is set: 1 grey, 3 RGB, ...")
        if self.condition_range is not None and self.condition_images is None:
            raise UsageError("data.condition_range is of data.condition_images, and there are none: leave it out")

    @property
    def target(self) -> Target:
        return Target(self.sizes, self.channels, self.range, self.unbounded, self.background, self.max_pixels)

    def open(self, split: str = "train") -> DataSet:
        dataset, values = self.with_conditions(split), (self.channels + self.condition_channels) * math.prod(self.sizes)
        size = len(dataset) * values * (1 if self.range is None else 4)
        return dataset.in_memory() if size <= IN_MEMORY_BYTES else dataset

    def list_files(self, split: str = "train") -> "FileDataset":
        """The files, of which none has been read. Raises UsageError if there are none."""
        raise NotImplementedError

    def with_conditions(self, split: str = "train") -> "FileDataset":
        """The files with their conditions, of which a few headers have been read. Raises UsageError if they do not
        pair."""
        dataset: FileDataset = conditioned(self.list_files(split), self, split)
        if not self.condition_images:
            if (own := self.condition_channels) and dataset.target.channels == self.channels:
                raise UsageError(f"data.condition_channels is {own}: name data.condition_images, too")
            return dataclasses.replace(dataset, condition_channels=own)
        alike: dict[str, Any] = dict(condition_images=None, condition_channels=0, conditions=None, condition_columns=())
        alike |= dict(channels=self.condition_channels, range=self.condition_range, condition_range=None)
        alike |= dict(low_res_size=None, unbounded=False)
        with prefixed("data.condition_images: "):
            others = dataclasses.replace(self, **alike | self.where_conditions(self.condition_images))
            return dataset.with_condition_images(others.list_files(split))

    def where_conditions(self, name: str) -> dict[str, Any]:
        """The settings of this source that name the condition images."""
        return {"path": name}

    def found_sizes(self) -> tuple[int, ...]:
        described = dataclasses.replace(self, image_size=1, low_res_size=None).list_files().look(0, describe)
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
    vectors: Vectors = NO_VECTORS
    condition_channels: int = 0
    conditions: "FileDataset | None" = None
    """the condition image of each image, where it is a file of its own"""

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
        return Loaded(np.stack(of_one_type(images)), self.labels[chosen], self.vectors.at(chosen), errors)

    def read(self, i: int) -> Array | UsageError:
        """One image, as the network is given it, with its condition image as last channels; or the error."""
        parts = [files.look(i, decode) for files in (self, self.conditions) if files is not None]
        errors = [part for part in parts if isinstance(part, UsageError)]
        return errors[0] if errors else np.concatenate(of_one_type(parts))

    def look(self, i: int, decode: Callable[[BinaryIO | Array, Target], Any]) -> Any:
        """What `decode` returns for one file, or the error with its name."""
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
        ids, files = self.ids, [self.conditions.fingerprint()] if self.conditions else []
        about = self.labels, self.class_names, *self.vectors.hashed, *files
        return digest(self.container.names[ids], self.container.sizes[ids], *about)

    def select(self, indices: Labels) -> "FileDataset":
        conditions, vectors = self.conditions and self.conditions.select(indices), self.vectors.select(indices)
        part: dict[str, Any] = dict(ids=self.ids[indices], labels=self.labels[indices], vectors=vectors)
        return dataclasses.replace(self, **part, conditions=conditions)

    def with_condition_images(self, others: "FileDataset") -> "FileDataset":
        """The images with those of `others` that their names belong to, as conditions. Raises UsageError if `paired`
        does, or if one of up to `COMPARED` is of another shape than its image."""
        names, theirs = ([data.key_of(i) for i in range(len(data))] for data in (self, others))
        left = {os.fsdecode(name) for name in self.container.names}
        left -= set(theirs) if self.container.where == others.container.where else set()
        pairs = others.select(np.array(paired(names, theirs, left)))
        for i in part(len(self), COMPARED).tolist():
            seen = [self.look(i, describe), pairs.look(i, describe)]
            sizes = [one[1] for one in seen if not isinstance(one, UsageError) and len(one[1]) == 2]
            if len(sizes) == 2 and abs(np.divide(*sizes[0]) / np.divide(*sizes[1]) - 1) > SHAPES_DIFFER:
                own, its = (f"{width}x{height}" for height, width in sizes)
                both = f"{pairs.name_of(i)} is {its}, and {self.name_of(i)} {own}"
                raise UsageError(f"{both}: they would be cropped differently")
        return dataclasses.replace(self, conditions=pairs, condition_channels=others.target.channels)

    def in_memory(self) -> ArrayDataset:
        """Read all of it now. Raises UsageError with the name of a file that cannot be read, unless it is skipped."""
        with ThreadPoolExecutor() as pool:
            results: list[Any] = list(pool.map(self.read, range(len(self))))
        errors = [result for result in results if isinstance(result, UsageError)]
        readable = np.flatnonzero([not isinstance(result, UsageError) for result in results])
        if errors and (self.on_error == "fail" or not len(readable)):
            raise errors[0]
        files, images = self.select(readable), torch.from_numpy(np.stack(of_one_type([results[i] for i in readable])))
        about = self.class_names, tuple(map(str, errors)), files, None, files.vectors, self.condition_channels
        return ArrayDataset(images, torch.from_numpy(files.labels), *about)
