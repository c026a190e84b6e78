"""MNIST and CIFAR-10 through torchvision."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch

from diffusion.data.base import ArrayDataset, DataConfig
from diffusion.data.decode import preprocess_all
from diffusion.errors import UsageError
from diffusion.fields import Channels, ImageSize, PathText, section


@section("data")
class MNIST(DataConfig):
    """MNIST."""

    source: Literal["mnist"] = "mnist"
    image_size: ImageSize = 28
    channels: Channels = 1
    path: PathText | None = None
    """torchvision's root, the folder that holds MNIST or cifar-10-batches-py; null: downloaded to data/"""

    splits = ("train", "test")
    inside: ClassVar[str] = "MNIST"

    def open(self, split: str = "train") -> ArrayDataset:
        from torchvision import datasets  # takes seconds to import

        root = Path(self.path or "data")
        root = root.parent if root.name == self.inside else root  # torchvision wants the parent folder
        try:
            data = getattr(datasets, type(self).__name__)(root, train=split == "train", download=self.path is None)
        except Exception as error:  # torchvision raises whatever its download or its files gave
            reason = " ".join(str(error).split()).split(". ")[0]
            if self.path is None:
                raise UsageError(f"{self.source} could not be downloaded to data/ ({reason}): name its folder with "
                                 "--data.path") from None  # fmt: skip
            raise UsageError(f"data.path {self.path} does not hold {self.source} as torchvision lays it out ({reason})"
                             ) from None  # fmt: skip
        names = tuple(name.split(" - ")[0] for name in data.classes)
        images, labels = np.asarray(data.data), np.asarray(data.targets)
        if len(images) != len(labels) or not ((labels >= 0) & (labels < len(names))).all():
            raise UsageError(
                f"data.path {root} holds {len(images)} images and {len(labels)} labels up to {labels.max(initial=0)}; "
                f"{self.source} has {len(names)} classes: use --data.source folder for other data"
            )
        chw = preprocess_all(images, self.image_size, self.channels)
        return ArrayDataset(torch.from_numpy(chw), torch.from_numpy(labels.astype(np.int64)), names)


@section("data")
class CIFAR10(MNIST):
    """CIFAR-10."""

    source: Literal["cifar10"] = "cifar10"  # type: ignore[assignment]
    image_size: ImageSize = 32
    channels: Channels = 3
    random_flip: bool = False  # type: ignore[misc]
    """mirror half of the images left to right"""

    inside: ClassVar[str] = "cifar-10-batches-py"
