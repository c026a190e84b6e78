"""The 8x8 handwritten digits that ship with the package (UCI; see DIGITS.md)."""

from importlib.resources import files
from typing import Literal

import numpy as np
import torch

from diffusion.config.fields import Channels, ImageSize, section
from diffusion.data.base import ArrayDataset, DataConfig
from diffusion.data.decode import preprocess_all


@section("data")
class Digits(DataConfig):
    """Handwritten digits, 8x8."""

    source: Literal["digits"] = "digits"
    image_size: ImageSize = 8
    channels: Channels = 1

    def open(self, split: str = "train") -> ArrayDataset:
        with (files("diffusion.data") / "digits.npz").open("rb") as file, np.load(file) as arrays:
            images, labels = preprocess_all(arrays["images"], self.target), arrays["labels"].astype(np.int64)
        return ArrayDataset(torch.from_numpy(images), torch.from_numpy(labels), tuple("0123456789"))
