"""Image files from arrays: grids and PNG."""

from __future__ import annotations

import math
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from diffusion.data.decode import PIL_MODES
from diffusion.files import replace_bytes

TILE = 64
"""Smaller images are enlarged to about this many pixels in a grid."""


def grid(images: Tensor, columns: int) -> Image.Image:
    """Images (N, C, H, W), uint8, as one image, row by row. Above 4 channels, each channel is a grey tile."""
    if images.shape[1] not in PIL_MODES:
        columns *= images.shape[1]
        images = rearrange(images, "n c h w -> (n c) 1 h w")
    factor = max(1, TILE // max(images.shape[2:]))
    border = max(1, factor // 4)
    images = images.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    images = F.pad(images, (0, border, 0, border), value=255)
    images = F.pad(images, (0, 0, 0, 0, 0, 0, 0, rows * columns - len(images)), value=255)
    sheet = rearrange(images, "(r c) ch h w -> ch (r h) (c w)", c=columns)
    return to_pil(F.pad(sheet, (border, 0, border, 0), value=255))


def to_pil(image: Tensor) -> Image.Image:
    """One image (C, H, W), uint8, with 1 to 4 channels."""
    array: NDArray[np.uint8] = rearrange(image.cpu(), "c h w -> h w c").numpy()
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)


def save_grid(images: Tensor, path: Path, num_classes: int = 0) -> None:
    """Write a grid of images, whose classes are taken in turn, as PNG, atomically."""
    path.parent.mkdir(exist_ok=True)
    buffer = BytesIO()
    grid(images, grid_columns(len(images), num_classes)).save(buffer, format="PNG")
    replace_bytes(path, buffer.getvalue())


def grid_columns(n: int, num_classes: int) -> int:
    """The columns of a grid: about a square, or, with few classes in turn, columns of one class each."""
    if not 1 < num_classes <= 20:
        return math.ceil(math.sqrt(n))
    return num_classes * max(1, round(math.sqrt(n) / num_classes))


def png(image: NDArray[np.uint8]) -> bytes:
    """One image (C, H, W) with 1 to 4 channels as the content of a PNG file."""
    buffer = BytesIO()
    to_pil(torch.from_numpy(image)).save(buffer, format="PNG")
    return buffer.getvalue()
