"""Image files from arrays: grids and PNG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from diffusion.data.decode import PIL_MODES
from diffusion.files.atomic import replace_bytes

TILE = 64
"""Smaller images are enlarged to about this many pixels in a grid."""
PNG_MARK = "Software\0diffusion {}"
"""How a grid's file says which command wrote it, near its beginning."""
CAPTION = 14
"""Pixels of a line of text under an image."""
SLICES = 8
"""How many slices of a volume are shown."""


def grid(images: Tensor, columns: int) -> Image.Image:
    """Images (N, C, *sizes), uint8, as one image, row by row.

    Above 4 channels, each channel is a grey tile. A signal is drawn as lines, a volume as some of its slices.
    """
    if images.ndim == 3:
        images = torch.stack([_plot(signal) for signal in images])
    elif images.ndim == 5:
        some = torch.linspace(0, images.shape[2] - 1, min(SLICES, images.shape[2])).round().long()
        images = rearrange(images[:, :, some], "n c d h w -> n c h (d w)")
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


def _plot(signal: Tensor) -> Tensor:
    """A signal (C, length), uint8, as lines from left to right: (1, TILE, width)."""
    width = min(4 * TILE, max(TILE, signal.shape[1]))
    image = Image.new("L", (width, TILE), 255)
    for i, channel in enumerate(signal.tolist()):
        points = [
            (x * (width - 1) / max(1, len(channel) - 1), (255 - y) * (TILE - 1) / 255) for x, y in enumerate(channel)
        ]
        ImageDraw.Draw(image).line(points, fill=160 * i // len(signal))
    return torch.from_numpy(np.array(image))[None]


def to_pil(image: Tensor) -> Image.Image:
    """One image (C, H, W), uint8, with 1 to 4 channels, or uint16 with one."""
    array: NDArray[Any] = rearrange(image.cpu(), "c h w -> h w c").numpy()
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)


def save_grid(
    images: Tensor, path: Path, num_classes: int = 0, columns: int | None = None, captions: Sequence[str] = (),
    by: str = "train",
) -> None:  # fmt: skip
    """Write a grid of images, whose classes are taken in turn, as PNG, atomically; with a caption under each image, if
    there are captions. The file says which command it is written `by`."""
    path.parent.mkdir(exist_ok=True)
    buffer = BytesIO()
    columns = columns or grid_columns(len(images), num_classes)
    mark, drawn = PngInfo(), captioned(images, columns, captions) if captions else grid(images, columns)
    mark.add_text("Software", f"diffusion {by}")
    drawn.save(buffer, format="PNG", pnginfo=mark)
    replace_bytes(path, buffer.getvalue())


def captioned(images: Tensor, columns: int, captions: Sequence[str]) -> Image.Image:
    """A grid with a line of text under each image, cut where it is longer than that."""
    tiles = [grid(image[None], 1).convert("RGB") for image in images]
    width, height = tiles[0].width, tiles[0].height + CAPTION
    sheet = Image.new("RGB", (width * min(columns, len(tiles)), height * math.ceil(len(tiles) / columns)), "white")
    for i, (tile, caption) in enumerate(zip(tiles, captions, strict=True)):
        label = Image.new("RGB", (width, CAPTION), "white")
        ImageDraw.Draw(label).text((2, 1), caption, fill="black")
        for part, down in ((tile, 0), (label, tile.height)):
            sheet.paste(part, (i % columns * width, i // columns * height + down))
    return sheet


def save_gif(images: Tensor, path: Path) -> None:
    """Write images (N, C, *sizes), uint8, one after another, as an animated GIF that rests on the last, atomically."""
    frames = [grid(image[None], 1).convert("RGB") for image in images]
    buffer = BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=[120] * (len(frames) - 1) + [1500],
                   loop=0)  # fmt: skip
    replace_bytes(path, buffer.getvalue())


def grid_columns(n: int, num_classes: int) -> int:
    """The columns of a grid: about a square, or, with few classes in turn, columns of one class each."""
    if not 1 < num_classes <= 20:
        return math.ceil(math.sqrt(n))
    return num_classes * max(1, round(math.sqrt(n) / num_classes))


def png(image: NDArray[Any]) -> bytes:
    """One image (C, H, W) with 1 to 4 channels of 8 bits, or one of 16, as the content of a PNG file."""
    buffer = BytesIO()
    to_pil(torch.from_numpy(image)).save(buffer, format="PNG")
    return buffer.getvalue()
