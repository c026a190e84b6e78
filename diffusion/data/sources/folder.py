"""A folder of image files, whose subfolders may be classes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from diffusion.data.base import ArrayDataset, DataConfig, DataSet, Loaded, OnError, digest
from diffusion.data.decode import read_image
from diffusion.errors import UsageError, one_line
from diffusion.fields import ImageSize, PathText, section

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".npy")
IN_MEMORY_BYTES = 64 * 2**20
"""Folders up to this size, once preprocessed, are read into memory at the start."""


@section("data")
class Folder(DataConfig):
    """Your own images."""

    source: Literal["folder"] = "folder"
    image_size: ImageSize = 64
    channels: Annotated[int, Field(ge=1, le=4096)] = 3
    path: PathText | None = None
    """the folder of images"""
    random_flip: bool = False  # type: ignore[misc]
    """mirror half of the images left to right"""
    on_error: OnError = "fail"  # type: ignore[misc]
    """an image file that cannot be read ends the run, or is skipped, named and counted"""

    any_size = True

    def open(self, split: str = "train") -> DataSet:
        if self.path is None:
            raise UsageError("data.source is folder: name the folder with --data.path FOLDER")
        folder = _open_folder(Path(self.path), self)
        return folder.in_memory() if len(folder) * int(np.prod(self.shape)) <= IN_MEMORY_BYTES else folder


@dataclass
class FolderDataset:
    """Image files that are read when they are needed."""

    paths: list[Path]
    labels: Tensor
    class_names: tuple[str, ...]
    image_size: int
    channels: int
    on_error: OnError = "fail"
    left_out = ()  # nothing has been read yet

    def __len__(self) -> int:
        return len(self.paths)

    def __getitems__(self, indices: Sequence[int]) -> Loaded | UsageError:
        """A batch, or the error of one of its files.

        With `on_error` skip, an unreadable file is replaced by the next readable one, which depends on nothing else.
        """
        images, labels, errors = [], [], list[str]()
        for first in indices:
            for i in (first + further for further in range(len(self))):
                try:
                    image = self._read(self.paths[i % len(self)])
                    break
                except UsageError as error:
                    if self.on_error == "fail":
                        return error
                    errors.append(str(error))
            else:
                return UsageError(f"none of the {len(self)} images can be read: {errors[-1]}")
            images.append(image)
            labels.append(int(self.labels[i % len(self)]))
        return np.stack(images), np.array(labels, dtype=np.int64), errors

    def _read(self, path: Path) -> NDArray[np.uint8]:
        return read_image(path, self.image_size, self.channels)

    def name_of(self, index: int) -> str:
        return str(self.paths[index])

    def fingerprint(self) -> str:
        """A number that files of other names, sizes or classes would not have. (Their content is not read for it.)"""
        root = os.path.commonpath(self.paths)
        files = [(os.path.relpath(path, root), path.stat().st_size if path.exists() else -1) for path in self.paths]
        return digest(files, self.labels.numpy(), self.class_names)

    def in_memory(self) -> ArrayDataset:
        """Read all of it now. Raises UsageError with the name of a file that cannot be read, unless it is skipped."""

        def read(path: Path) -> NDArray[np.uint8] | UsageError:
            try:
                return self._read(path)
            except UsageError as error:
                return error

        with ThreadPoolExecutor() as pool:
            results = list(pool.map(read, self.paths))
        errors = [image for image in results if isinstance(image, UsageError)]
        images = [image for image in results if not isinstance(image, UsageError)]
        if errors and (self.on_error == "fail" or not images):
            raise errors[0]
        kept = torch.tensor([not isinstance(image, UsageError) for image in results])
        return ArrayDataset(
            torch.from_numpy(np.stack(images)), self.labels[kept], self.class_names, tuple(map(str, errors))
        )


def _open_folder(root: Path, config: Folder) -> FolderDataset:
    if not root.is_dir():
        raise UsageError(f"data.path {root} is {'not a folder' if root.exists() else 'not there'}")
    paths = sorted(path for path in _files(root) if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise UsageError(f"data.path {root} holds no images ({', '.join(IMAGE_SUFFIXES)})")
    folders = [path.relative_to(root).parts[0] if path.parent != root else "" for path in paths]
    # Images beside the class folders belong to no class, so there are no classes.
    names = [] if "" in folders else sorted(set(folders))
    number = {name: i for i, name in enumerate(names)}
    labels = torch.tensor([number.get(folder, 0) for folder in folders])
    return FolderDataset(paths, labels, tuple(names), config.image_size, config.channels, config.on_error)


def _files(root: Path) -> Iterator[Path]:
    """Every file under a folder, following links, each folder once. Raises UsageError if one cannot be listed."""

    def fail(error: OSError) -> None:
        raise UsageError(f"data.path {root}: {error.filename} cannot be listed: {one_line(error)}")

    visited = set()
    for folder, folders, names in os.walk(root, onerror=fail, followlinks=True):
        if os.path.realpath(folder) in visited:
            folders.clear()
            continue
        visited.add(os.path.realpath(folder))
        yield from (Path(folder, name) for name in names)
