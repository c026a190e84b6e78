"""Image files to arrays: decoding, the paper's preprocessing, and the scale that networks see."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from diffusion.errors import UsageError, one_line

PIL_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
MAX_PIXELS = 2**30 // 12
"""Larger images may be meant to exhaust the memory. (PIL only warns up to twice this number, and warning filters are
not thread-safe.)"""
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def read_image(path: Path, size: int, channels: int) -> NDArray[np.uint8]:
    """Read and preprocess one file: (C, size, size), uint8. Raises UsageError with its name where it cannot be read."""
    try:
        if not path.is_file():  # a pipe would block
            raise ValueError("it is not a file" if path.exists() else "it is a broken link")
        if path.suffix.lower() == ".npy":
            array = np.load(path, allow_pickle=False)
            if array.ndim != 3 or array.dtype != np.uint8 or array.shape[2] != channels:
                raise ValueError(f"{array.shape} {array.dtype}, not (height, width, {channels}) uint8")
            return np.concatenate([preprocess(Image.fromarray(array[:, :, c]), size, 1) for c in range(channels)])
        with open_image(path) as image:
            return preprocess(image, size, channels)
    except Exception as error:  # PIL raises OSError, ValueError, SyntaxError, struct.error, ... for broken files
        raise UsageError(f"{path} cannot be read as an image ({one_line(error)})") from None


@cache
def formats() -> list[str]:
    """The formats that PIL may detect, whatever a file is called: for some others it would start a program."""
    Image.init()  # loads all of PIL's formats
    return [name for name in ("PNG", "JPEG", "MPO", "WEBP", "BMP", "GIF", "TIFF") if name in Image.OPEN]


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """Open an image file. Raises ValueError above `MAX_PIXELS`, in every thread alike."""
    with Image.open(path, formats=formats()) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"it has {image.width} x {image.height} pixels, more than {MAX_PIXELS}")
        yield image


def preprocess(image: Image.Image, size: int, channels: int) -> NDArray[np.uint8]:
    """Resize and crop an image as the paper's pipeline does: (C, size, size), uint8.

    The image is turned upright by its EXIF orientation (which the published code ignores), halved by box filter while
    its short side is at least twice `size`, resized to `size` by bicubic filter, and cropped to the centre.
    """
    if channels not in PIL_MODES:
        raise ValueError(f"{channels} channels need .npy files")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # PIL would clip 16 bits at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(
            f"its pixels are of PIL mode {image.mode}, whose range is not known; save it with 8 or 16 bits"
        )
    if "transparency" in image.info:
        image = image.convert("RGBA")
    image = image.convert(PIL_MODES[channels])  # before any resizing: palette indices cannot be averaged
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    if max(image.size) * scale > 100 * size:
        raise ValueError(f"its sides {image.width} and {image.height} are too unequal to be cropped to a square")
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    array = np.asarray(image).reshape(image.height, image.width, channels)
    top, left = (image.height - size) // 2, (image.width - size) // 2
    return array[top : top + size, left : left + size].transpose(2, 0, 1)


def preprocess_all(images: NDArray[np.uint8], size: int, channels: int) -> NDArray[np.uint8]:
    """Preprocess images in memory, (N, H, W) or (N, H, W, C): (N, C, size, size). Those that fit are only reordered."""
    if (*images.shape[1:3], *(images.shape[3:] or (1,))) == (size, size, channels):
        return images.reshape(*images.shape[:3], channels).transpose(0, 3, 1, 2).copy()
    return np.stack([preprocess(Image.fromarray(image), size, channels) for image in images])


def to_x_start(images: Tensor) -> Tensor:
    """Stored images, uint8, to what the network sees: float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] to levels 0 to 255: the inverse of `to_x_start`, rounded."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def shrink(x_start: Tensor, size: int) -> Tensor:
    """The low-resolution input that an upsampler is trained on: the mean of each area, as in the published code."""
    return F.interpolate(x_start, size, mode="area")
