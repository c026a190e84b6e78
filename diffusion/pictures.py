"""From images in [-1, 1] to what people look at."""

from __future__ import annotations

import json
import math
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from diffusion.data import PIL_MODES, open_image
from diffusion.errors import UsageError, in_short
from diffusion.files import replace_bytes

TILE = 64
"""Smaller images are enlarged to about this many pixels in a grid."""


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] to whole levels 0 to 255, the inverse of how they were read."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def grid(images: Tensor, columns: int) -> Image.Image:
    """Images (N, C, H, W), uint8, as one picture, row by row; a channel is a grey tile where C is above 4."""
    if images.shape[1] not in PIL_MODES:
        columns *= images.shape[1]
        images = rearrange(images, "n c h w -> (n c) 1 h w")
    factor, border = _tile(*images.shape[2:])
    images = images.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    images = F.pad(images, (0, border, 0, border), value=255)
    images = F.pad(images, (0, 0, 0, 0, 0, 0, 0, rows * columns - len(images)), value=255)
    sheet = rearrange(images, "(r c) ch h w -> ch (r h) (c w)", c=columns)
    return to_pil(F.pad(sheet, (border, 0, border, 0), value=255))


def _tile(height: int, width: int) -> tuple[int, int]:
    """By how much images of a size are enlarged in a grid, and the border between them in pixels."""
    factor = max(1, TILE // max(height, width))
    return factor, max(1, factor // 4)


def to_pil(image: Tensor) -> Image.Image:
    """One image (C, H, W), uint8, with 1 to 4 channels."""
    array: NDArray[np.uint8] = rearrange(image.cpu(), "c h w -> h w c").numpy()
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)


def save_grid(images: Tensor, path: Path, columns: int, labels: list[int] | None = None) -> None:
    """Write `grid(images, columns)` as PNG, which says how `read_grid` finds them; the file is whole or absent."""
    path.parent.mkdir(exist_ok=True)
    tiles = PngInfo()
    tiles.add_text("tiles", json.dumps({"shape": images.shape, "labels": labels}))
    buffer = BytesIO()
    grid(images, columns).save(buffer, format="PNG", pnginfo=tiles)
    replace_bytes(path, buffer.getvalue())


def read_grid(path: Path) -> tuple[Tensor, list[int] | None] | None:
    """The images (N, C, H, W), uint8, and the labels, if any, of a grid that `save_grid` wrote; None of other files.

    Raises UsageError where it says so and is another picture by now.
    """
    try:
        if not path.is_file():
            return None
        with open_image(path, ["PNG"]) as image:
            if "tiles" not in image.info:
                return None
            said = json.loads(image.info["tiles"])
            (n, c, h, w), labels = map(int, said["shape"]), said["labels"]
            mode, size, sheet = image.mode, image.size, np.asarray(image)
        channels, tiles = (c, n) if c in PIL_MODES else (1, n * c)
        factor, border = _tile(h, w)
        columns, rows = (size[0] - border) // (w * factor + border), (size[1] - border) // (h * factor + border)
        fits = size == (columns * (w * factor + border) + border, rows * (h * factor + border) + border)
        whole = labels is None or (len(labels) == n and all(type(label) is int and label >= 0 for label in labels))
        if (
            min(n, c, h, w) < 1
            or not whole
            or mode != PIL_MODES[channels]
            or not fits
            or rows != math.ceil(tiles / columns)
        ):
            raise ValueError(f"it was {n} images of {c} channels, and was changed since")
    except Exception as error:  # PIL raises OSError, ValueError, SyntaxError, struct.error, ... for broken files
        if isinstance(error, UnidentifiedImageError | FileNotFoundError):
            return None
        raise UsageError(f"{path} cannot be read as a grid ({in_short(error)})") from None
    cut = rearrange(
        sheet.reshape(*sheet.shape[:2], channels)[border:, border:], "(r h) (q w) ch -> (r q) ch h w", r=rows, q=columns
    )
    images = torch.from_numpy(cut[:tiles, :, : h * factor : factor, : w * factor : factor].copy())
    return images.reshape(n, c, h, w), labels


def grid_columns(n: int, num_classes: int) -> int:
    """About a square; where there are few classes, in turn, each has columns of its own."""
    if not 1 < num_classes <= 20:
        return math.ceil(math.sqrt(n))
    return num_classes * max(1, round(math.sqrt(n) / num_classes))


def png(image: NDArray[np.uint8]) -> bytes:
    """One image (C, H, W) with 1 to 4 channels as the content of a PNG file."""
    buffer = BytesIO()
    to_pil(torch.from_numpy(image)).save(buffer, format="PNG")
    return buffer.getvalue()
