"""Image files from arrays: grids, PNG and GIF."""

import math
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw, PngImagePlugin
from torch import Tensor

from diffusion.data.decode import PIL_MODES
from diffusion.data.values import to_uint8
from diffusion.files.atomic import replace_bytes

PNG_MARK = "Software\0diffusion {}"
"""The bytes near the beginning of a grid's file that name the command which wrote it."""
TILE, CAPTION, SLICES = 64, 14, 8
"""The pixels that smaller images are enlarged to, those of a line of text, and the most slices of a volume."""


def grid(images: Tensor, columns: int) -> Image.Image:
    """Images (N, C, *sizes), uint8, as one image, row by row.

    Above 4 channels, each channel is a grey tile. A signal is drawn as lines, a volume as some of its slices.
    """
    if images.ndim == 3:
        images = torch.stack([_plot(signal) for signal in images])
    elif images.ndim == 5:
        slices = torch.linspace(0, images.shape[2] - 1, min(SLICES, images.shape[2])).round().long()
        images = rearrange(images[:, :, slices], "n c d h w -> n c h (d w)")
    if images.shape[1] not in PIL_MODES:
        columns *= images.shape[1]
        images = rearrange(images, "n c h w -> (n c) 1 h w")
    factor = max(1, TILE // max(images.shape[2:]))
    border = max(1, factor // 4)
    images = images.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
    columns = min(columns, len(images))
    images = F.pad(images, (0, border, 0, border, 0, 0, 0, -len(images) % columns), value=255)
    sheet = rearrange(images, "(r c) ch h w -> ch (r h) (c w)", c=columns)
    sheet = F.pad(sheet, (border, 0, border, 0), value=255)
    return to_pil(rearrange(sheet.cpu(), "c h w -> h w c").numpy())


def beside(images: Tensor, conditions: Tensor | None) -> Tensor:
    """Images, uint8, with their condition images in [-1, 1], if any, to their left, taken in turn; grey where their
    channels differ."""
    if conditions is None:
        return images
    left = conditions[torch.arange(len(images)) % len(conditions)]
    left = left if left.shape == images.shape else left.mean(1, keepdim=True).expand(images.shape)
    return torch.cat([to_uint8(left).to(images.device), images], dim=-1)


def _plot(signal: Tensor) -> Tensor:
    """A signal (C, length), uint8, as lines from left to right: (1, TILE, width)."""
    width = min(4 * TILE, max(TILE, signal.shape[1]))
    image = Image.new("L", (width, TILE), 255)
    x, y = torch.linspace(0, width - 1, signal.shape[1]), (255 - signal.float()) * (TILE - 1) / 255
    for i, heights in enumerate(y):
        ImageDraw.Draw(image).line(torch.stack([x, heights], 1).flatten().tolist(), fill=160 * i // len(signal))
    return torch.from_numpy(np.array(image))[None]


def to_pil(image: np.ndarray) -> Image.Image:
    """One image (H, W, C), uint8, with 1 to 4 channels, or uint16 with one."""
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    """The content of an image file of a format of PIL, with its options."""
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def save_grid(
    images: Tensor, path: Path, num_classes: int = 0, columns: int = 0, captions: Sequence[str] = (), by: str = "train"
) -> None:
    """Write a grid of images, whose classes are taken in turn, as PNG, atomically.

    Args:
        columns: 0: those of `grid_columns`.
        captions: a line of text under each image, or none.
        by: the command that the file names as its writer.
    """
    columns = columns or grid_columns(len(images), num_classes)
    mark = PngImagePlugin.PngInfo()
    mark.add_text("Software", f"diffusion {by}")
    image = captioned(images, columns, captions) if captions else grid(images, columns)
    path.parent.mkdir(exist_ok=True)
    replace_bytes(path, encode(image, "PNG", pnginfo=mark))


def captioned(images: Tensor, columns: int, captions: Sequence[str]) -> Image.Image:
    """A grid with lines of text under each image, cut at the image's width."""
    tiles, below = [], CAPTION * max(1 + caption.count("\n") for caption in captions)
    for image, caption in zip(images, captions, strict=True):
        drawn = grid(image[None], 1).convert("RGB")
        tile = Image.new("RGB", (drawn.width, drawn.height + below), "white")
        tile.paste(drawn)
        ImageDraw.Draw(tile).text((2, drawn.height + 1), caption, fill="black")
        tiles.append(rearrange(torch.from_numpy(np.array(tile)), "h w c -> c h w"))
    return grid(torch.stack(tiles), columns)


def grid_columns(n: int, num_classes: int) -> int:
    """The columns of a grid: about a square, or, with few classes in turn, columns of one class each."""
    if not 1 < num_classes <= 20:
        return math.ceil(math.sqrt(n))
    return num_classes * max(1, round(math.sqrt(n) / num_classes))
