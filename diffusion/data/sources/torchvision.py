"""MNIST, FashionMNIST, CIFAR-10, CIFAR-100, SVHN and CelebA through torchvision."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from diffusion.config.fields import Channels, ImageSize, PathText, section
from diffusion.data.base import ArrayDataset, DataConfig
from diffusion.data.containers import Directory
from diffusion.data.decode import preprocess_all
from diffusion.data.image_files import FileDataset, ImageFiles
from diffusion.errors import UsageError


def open_torchvision(name: str, source: str, inside: str, path: str | None, **part: Any) -> tuple[Any, Path]:
    """A data set of torchvision's, and its root. Raises UsageError if it is not in `path`, or cannot be downloaded."""
    from torchvision import datasets  # takes seconds to import

    root = Path(path or "data")
    root = root.parent if root.name == inside else root  # torchvision wants the parent folder
    try:
        return getattr(datasets, name)(root, download=path is None, **part), root
    except Exception as error:  # torchvision raises whatever its download or its files gave
        reason = " ".join(str(error).split()).split(". ")[0]
        if path is None:
            raise UsageError(f"{source} could not be downloaded to data/ ({reason}): add --data.path FOLDER") from None
        raise UsageError(f"data.path {path} does not hold {source} as torchvision lays it out ({reason})") from None


@section("data")
class MNIST(DataConfig):
    """MNIST."""

    source: Literal["mnist"] = "mnist"
    image_size: ImageSize = 28
    channels: Channels = 1
    path: PathText | None = None
    """torchvision's root, the folder that holds MNIST, cifar-10-batches-py, ...; null: downloaded to data/"""

    splits = ("train", "test")
    inside: ClassVar[str] = "MNIST"

    def open(self, split: str = "train") -> ArrayDataset:
        part = {"split": split} if self.source == "svhn" else {"train": split == "train"}
        data, root = open_torchvision(type(self).__name__, self.source, self.inside, self.path, **part)
        names = tuple(name.split(" - ")[0] for name in getattr(data, "classes", "0123456789"))
        images, labels = np.asarray(data.data), np.asarray(data.labels if self.source == "svhn" else data.targets)
        if len(images) != len(labels) or not ((labels >= 0) & (labels < len(names))).all():
            raise UsageError(
                f"data.path {root} holds {len(images)} images and {len(labels)} labels up to {labels.max(initial=0)}; "
                f"{self.source} has {len(names)} classes: use --data.source folder for other data"
            )
        images = np.moveaxis(images, 1, -1) if self.source == "svhn" else images
        chw = preprocess_all(images, self.target)
        return ArrayDataset(torch.from_numpy(chw), torch.from_numpy(labels.astype(np.int64)), names)


@section("data")
class FashionMNIST(MNIST):
    """Fashion-MNIST."""

    source: Literal["fashion_mnist"] = "fashion_mnist"  # type: ignore[assignment]
    inside: ClassVar[str] = "FashionMNIST"


@section("data")
class CIFAR10(MNIST):
    """CIFAR-10."""

    source: Literal["cifar10"] = "cifar10"  # type: ignore[assignment]
    image_size: ImageSize = 32
    channels: Channels = 3
    random_flip: bool = False  # type: ignore[misc]
    """mirror half of the images left to right"""

    inside: ClassVar[str] = "cifar-10-batches-py"


@section("data")
class CIFAR100(CIFAR10):
    """CIFAR-100."""

    source: Literal["cifar100"] = "cifar100"  # type: ignore[assignment]
    inside: ClassVar[str] = "cifar-100-python"


@section("data")
class SVHN(CIFAR10):
    """House numbers (the cropped digits)."""

    source: Literal["svhn"] = "svhn"  # type: ignore[assignment]
    inside: ClassVar[str] = ""


@section("data")
class CelebA(ImageFiles):
    """CelebA, aligned and cropped faces, without classes."""

    source: Literal["celeba"] = "celeba"
    path: PathText | None = None
    """torchvision's root, the folder that holds celeba; null: downloaded to data/"""

    any_size = False
    splits = ("train", "test")

    def list_files(self, split: str = "train") -> FileDataset:
        data, root = open_torchvision("CelebA", self.source, "celeba", self.path, split=split)
        container, part = Directory(root / "celeba/img_align_celeba"), set(data.filename)
        ids = np.flatnonzero([os.fsdecode(name) in part for name in container.names.tolist()])
        if len(ids) < len(part):
            raise UsageError(f"data.path {root} holds {len(ids)} of the {len(part)} images of celeba")
        return FileDataset(
            container, ids, np.zeros(len(ids), np.int64), (), self.target, self.on_error, "celeba has none"
        )
