"""MNIST, FashionMNIST, CIFAR-10, CIFAR-100, SVHN and CelebA through torchvision."""

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
from diffusion.errors import UsageError, refusing


def open_torchvision(config: Any, folder: str, **part: Any) -> tuple[Any, Path]:
    """A data set of torchvision's, and its root: the parent of `folder`. Raises UsageError if it is not in
    `config.path`, or cannot be downloaded."""
    from torchvision import datasets  # takes seconds to import

    root = Path(config.path or "data")
    root = root.parent if root.name == folder else root
    wrong, hint = f"data.path {config.path} does not hold torchvision's {config.source}", ""
    if config.path is None:
        wrong, hint = f"{config.source} cannot be downloaded", ": add --data.path FOLDER"
    with refusing(lambda reason: f"{wrong} ({reason.split('. ')[0]}){hint}"):  # of its download or its files
        return getattr(datasets, type(config).__name__)(root, download=config.path is None, **part), root


@section("data")
class Torchvision(DataConfig):
    """Images and labels in memory."""

    image_size: ImageSize = 28
    channels: Channels = 1
    path: PathText | None = None
    """torchvision's root, the folder that holds MNIST, cifar-10-batches-py, ...; null: downloaded to data/"""

    splits = ("train", "test")
    folder: ClassVar[str] = ""
    """the name of the data set's folder in the root"""

    def open(self, split: str = "train") -> ArrayDataset:
        svhn = self.source == "svhn"
        part: dict[str, Any] = {"split": split} if svhn else {"train": split == "train"}
        data, root = open_torchvision(self, self.folder, **part)
        names = tuple(name.split(" - ")[0] for name in getattr(data, "classes", "0123456789"))
        images, labels = np.asarray(data.data), np.asarray(data.labels if svhn else data.targets)
        if len(images) != len(labels) or not ((labels >= 0) & (labels < len(names))).all():
            held = f"{len(images)} images and {len(labels)} labels up to {labels.max(initial=0)}"
            raise UsageError(f"data.path {root} holds {held}; {self.source} has {len(names)} classes")
        chw = preprocess_all(np.moveaxis(images, 1, -1) if svhn else images, self.target)
        return ArrayDataset(torch.from_numpy(chw), torch.from_numpy(labels.astype(np.int64)), names)


@section("data")
class MNIST(Torchvision):
    """MNIST."""

    source: Literal["mnist"] = "mnist"
    folder = "MNIST"


@section("data")
class FashionMNIST(Torchvision):
    """Fashion-MNIST."""

    source: Literal["fashion_mnist"] = "fashion_mnist"
    folder = "FashionMNIST"


@section("data")
class ColourImages(Torchvision):
    """Photographs of 32x32."""

    image_size: ImageSize = 32
    channels: Channels = 3
    random_flip: bool = False
    """mirror half of the images left to right"""


@section("data")
class CIFAR10(ColourImages):
    """CIFAR-10."""

    source: Literal["cifar10"] = "cifar10"
    folder = "cifar-10-batches-py"


@section("data")
class CIFAR100(ColourImages):
    """CIFAR-100."""

    source: Literal["cifar100"] = "cifar100"
    folder = "cifar-100-python"


@section("data")
class SVHN(ColourImages):
    """House numbers (the cropped digits)."""

    source: Literal["svhn"] = "svhn"


@section("data")
class CelebA(ImageFiles):
    """CelebA, aligned and cropped faces, without classes."""

    source: Literal["celeba"] = "celeba"
    path: PathText | None = None
    """torchvision's root, the folder that holds celeba; null: downloaded to data/"""

    any_size = False
    splits = ("train", "test")

    def list_files(self, split: str = "train") -> FileDataset:
        data, root = open_torchvision(self, "celeba", split=split)
        files, part = Directory(root / "celeba/img_align_celeba"), set(data.filename)
        ids = np.flatnonzero([os.fsdecode(name) in part for name in files.names.tolist()])
        if len(ids) < len(part):
            raise UsageError(f"data.path {root} holds {len(ids)} of the {len(part)} images of celeba")
        return FileDataset(files, ids, self.target, np.zeros(len(ids), np.int64), (), "celeba has none", self.on_error)
