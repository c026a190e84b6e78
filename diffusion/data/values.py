"""Values of images: as they are stored, and in [-1, 1] as networks see them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]
"""uint8, or float32 in [-1, 1]."""


def to_x_start(images: Tensor) -> Tensor:
    """Stored images to what the network sees: float32 in [-1, 1]. uint8 is scaled; floats are so already."""
    return images if images.is_floating_point() else images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] to levels 0 to 255: the inverse of `to_x_start`, rounded."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_stored(images: Tensor, declared: tuple[float, float] | None) -> Array:
    """Images in [-1, 1] to the values of the data: uint8; or, of a declared range, uint16 where its ends are whole
    numbers of 16 bits, else float32, which also holds what lies beyond the range."""
    low, high = declared or (0, 255)
    whole = isinstance(low, int) and isinstance(high, int)
    if whole and (low, high) == (0, 255):
        return to_uint8(images).cpu().numpy()
    values = ((images.cpu().double() + 1) * ((high - low) / 2) + low).numpy()
    if whole and low >= 0 and high - low >= 255 and high <= 65535:
        return values.clip(low, high).round().astype(np.uint16)
    return values.astype(np.float32)


def shrink(x_start: Tensor, size: int | Sequence[int]) -> Tensor:
    """The low-resolution input that an upsampler is trained on: the mean of each area, as in the published code."""
    return F.interpolate(x_start, size if isinstance(size, int) else tuple(size), mode="area")
