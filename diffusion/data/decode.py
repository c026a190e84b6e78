"""Image files and arrays to what networks see: decoding, the paper's preprocessing, and the scale of values."""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from diffusion.data.values import Array

PIL_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
MAX_PIXELS = 2**30 // 12
"""Larger images may be meant to exhaust the memory. (PIL only warns up to twice this number, and warning filters are
not thread-safe.)"""
HEADERS = threading.Lock()
"""Held while numpy reads a header, through Python's parser, which fails now and then in several threads."""
TIFF_HEADS = b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class NotIdentified(ValueError):
    """A file is not of a format that PIL reads here."""


@dataclass(frozen=True)
class Target:
    """What images become: arrays (channels, *sizes).

    Attributes:
        range: the values that become -1 and 1; None: all that 8 or 16 bits can hold.
        background: the grey level, 0 to 255, under transparent pixels, where no channel is for alpha.
        max_pixels: larger images are refused.
    """

    sizes: tuple[int, ...]
    channels: int
    range: tuple[float, float] | None = None
    background: int = 255
    max_pixels: int = MAX_PIXELS


def decode(file: BinaryIO, suffix: str, target: Target) -> Array:
    """The image in an open file, preprocessed: (C, *sizes), uint8, or float32 in [-1, 1] of data of more than 8 bits.

    Raises an exception of any type if it cannot be read.
    """
    array = _as_array(file, suffix, target.max_pixels)
    if array is not None:
        return fit(array, target)
    with open_image(file, target.max_pixels) as image:
        return preprocess(image, target)


def native_sizes(file: BinaryIO, suffix: str, target: Target) -> tuple[int, ...]:
    """The sizes of the image in an open file before any preprocessing. Raises an exception of any type."""
    if suffix == ".npy" and not isinstance(file, np.ndarray):  # of a large array, only the header is read
        with HEADERS:
            first = np.lib.format.read_magic(file) == (1, 0)
            read = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
            return sizes_of(read(file)[0], target.channels)
    array = _as_array(file, suffix, target.max_pixels)
    if array is not None:
        return sizes_of(array.shape, target.channels)
    with open_image(file, target.max_pixels) as image:
        return ImageOps.exif_transpose(image).size[::-1]


def _as_array(file: BinaryIO, suffix: str, max_pixels: int) -> Array | None:
    """The array in a file that is no image for PIL: a .npy, or a TIFF that holds more than PIL reads."""
    if isinstance(file, np.ndarray):  # a row of one in memory
        return file
    if suffix == ".npy":
        with HEADERS:
            return np.load(file, allow_pickle=False)
    head = file.read(4)
    file.seek(0)
    if head not in TIFF_HEADS:
        return None
    try:
        with open_image(file, max_pixels) as image:
            more = _beyond_pil(image)
    except NotIdentified:
        more = "an unusual kind"
    file.seek(0)
    return _read_tiff(file, more, max_pixels) if more else None


def sizes_of(shape: tuple[int, ...], channels: int) -> tuple[int, ...]:
    """The sizes of an array (*sizes, C), or (*sizes) with one channel. Raises ValueError if there are none."""
    sizes = shape[:-1] if shape[-1:] == (channels,) and len(shape) > 1 else shape
    if not 1 <= len(sizes) <= 3 or (sizes == shape and channels != 1):
        raise ValueError(f"it is {shape}, and data.channels is {channels}")
    return sizes


@cache
def formats() -> list[str]:
    """The formats that PIL may detect, whatever a file is called: for some others it would start a program."""
    Image.init()  # loads all of PIL's formats
    return [name for name in ("PNG", "JPEG", "MPO", "WEBP", "BMP", "GIF", "TIFF") if name in Image.OPEN]


@contextmanager
def open_image(file: BinaryIO, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """Open an image file. Raises ValueError above `max_pixels`, in every thread alike."""
    if max_pixels > MAX_PIXELS:
        Image.MAX_IMAGE_PIXELS = None  # PIL's limit is one for the whole process
    try:
        opened = Image.open(file, formats=formats())
    except UnidentifiedImageError:  # its message would name the object, not the file
        raise NotIdentified(f"cannot identify the format: it is no {', '.join(formats())}, or broken") from None
    except Image.DecompressionBombError:
        raise ValueError(f"it has more than data.max_pixels {max_pixels} pixels") from None
    with opened as image:
        if image.width * image.height > max_pixels:
            raise ValueError(f"it has {image.width} x {image.height} pixels, more than data.max_pixels {max_pixels}")
        yield image


def describe_image(image: Image.Image, channels: int) -> tuple[str, tuple[int, int], list[str]]:
    """The format and mode of an opened image, of which only the head is read, its width and height, and which of
    `diffusion.data.summary.REMARKS` deserve to be made where it becomes an image of `channels`."""
    deep, grey, turn = _is_deep(image), image.mode.startswith("I;16"), image.getexif().get(274, 1)
    plain = grey or image.mode in ("1", "I", "F", "L", "LA", "La")
    found = {
        "16 bits": grey or image.mode in ("I", "F"),
        "reduced": deep and not grey and image.format == "PNG",
        "alpha": "a" in image.mode.lower().replace("lab", "") or "transparency" in image.info,
        "frames": getattr(image, "n_frames", 1) > 1 and image.format != "MPO",  # a camera's preview
        "turned": turn != 1,
        "colour": channels < 3 and not plain,
        "grey": channels > 2 and plain,
    }
    size = image.size[::-1] if turn >= 5 else image.size
    return f"{image.format} {image.mode}", size, [name for name, value in found.items() if value]


def _raw_mode(image: Any) -> str:
    """How the pixels lie in the file, such as L;2 or RGB;16B, as long as nothing has been loaded."""
    return " ".join(str(tile[3]) for tile in getattr(image, "tile", ()) or ())


def _is_deep(image: Image.Image) -> bool:
    """Whether the file has 16 bits a channel."""
    return ";16" in _raw_mode(image)


def _beyond_pil(image: Image.Image) -> str:
    """What a TIFF holds beyond what PIL reads of it, or nothing."""
    tags: Any = getattr(image, "tag_v2", {})
    samples, bits, kinds = tags.get(277, 1), max(tags.get(258, (1,))), tags.get(339, (1,))
    if samples > len(image.getbands()):
        return f"{samples} bands"
    deep, unsigned, signed = image.mode.startswith("I;16") and tags.get(262) == 1, 1 in kinds, 2 in kinds
    if (bits > 8 and not deep and image.mode not in "IF") or (bits <= 8 and signed) or (bits == 32 and unsigned):
        return f"{bits} bits a channel"
    pages = getattr(image, "n_frames", 1)
    return f"{pages} pages" if pages > 1 else ""


def _read_tiff(file: BinaryIO, more: str, max_pixels: int) -> Array:
    """The largest series of a TIFF, channels last: (..., H, W, C). The others are thumbnails."""
    try:
        import tifffile
    except ImportError:
        raise ValueError(f"it is a TIFF of {more}, which PIL does not read: pip install tifffile") from None
    with tifffile.TiffFile(file) as tiff:
        series = max(tiff.series, key=lambda found: math.prod(found.shape))
        tags = series.keyframe.tags
        if math.prod(series.shape) > 4 * max_pixels:
            raise ValueError(f"it holds {series.shape} values, more than 4 times data.max_pixels {max_pixels}")
        # Values that do not mean brightness, premultiplied colours, turned images.
        meaning, extra, turn = series.keyframe.photometric, series.keyframe.extrasamples, tags.valueof(274, 1)
        if meaning not in (1, 2) or 1 in extra or turn != 1:
            raise ValueError(f"it is a TIFF of {more}, of photometric {int(meaning)}, orientation {turn}, extra "
                             f"samples {list(map(int, extra))}: save it upright, as RGB or minisblack")  # fmt: skip
        array, axes = series.asarray(), series.axes
    return np.moveaxis(array, axes.index("S"), -1) if "S" in axes else array[..., None]


def preprocess(image: Image.Image, target: Target) -> Array:
    """Resize and crop an image as the paper's pipeline does.

    The image is turned upright by its EXIF orientation (which the published code ignores), halved by box filter while
    its sides are at least twice those of the target, resized by bicubic filter to cover it, and cropped to the centre.
    """
    deep, channels = _is_deep(image), target.channels
    if "transparency" in image.info and (deep or image.mode.startswith("I")):
        raise ValueError("it has 16 bits and a transparent colour, which are not read together")
    factor = {"L;2": 85, "L;4": 17}.get(_raw_mode(image), 1)
    if factor > 1 and "transparency" in image.info:  # PIL scales the pixels alone
        image.info["transparency"] *= factor
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # PIL would clip 16 bits at 255
        array = np.asarray(image)
        if channels not in (1, 3):
            raise ValueError(f"it is grey, with no alpha, and data.channels is {channels}")
        return fit(np.repeat(array[:, :, None], channels, axis=2), target)
    if channels not in PIL_MODES:
        raise ValueError(f"{channels} channels need .npy or .tif files")
    if target.range not in (None, (0, 255)):
        if deep:
            raise ValueError("it has 16 bits a channel, of which PIL reads 8: save it as .npy or .tif")
        return fit(np.asarray(_with_channels(image, target)).reshape(image.height, image.width, channels), target)
    image = _cover(_with_channels(image, target), target.sizes)
    return np.asarray(image).reshape(image.height, image.width, channels).transpose(2, 0, 1)


def _with_channels(image: Image.Image, target: Target) -> Image.Image:
    """Convert an image to the target's number of channels. Transparent pixels show the background, not what colour
    lies hidden under them. (Before any resizing: palette indices cannot be averaged.)"""
    if "transparency" in image.info or image.mode in ("PA", "La", "RGBa"):
        image = image.convert("RGBA")
    if image.mode in ("RGBA", "LA") and target.channels in (1, 3) and image.getchannel("A").getextrema()[0] != 255:
        grey = target.background
        image = Image.alpha_composite(Image.new("RGBA", image.size, (grey, grey, grey, 255)), image.convert("RGBA"))
    return image.convert(PIL_MODES[target.channels])


def _cover(image: Image.Image, sizes: Sequence[int]) -> Image.Image:
    """Shrink or enlarge an image until it covers (height, width), and crop it to the centre."""
    if len(sizes) != 2:
        raise ValueError(f"it is an image, and data.image_size is {list(sizes)}")
    height, width = sizes
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    if max(image.width * scale / width, image.height * scale / height) > 100:
        raise ValueError(f"its sides {image.width} and {image.height} are too unequal for {width} x {height}")
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def fit(array: Array, target: Target) -> Array:
    """An array (*sizes) or (*sizes, C) of any number type, scaled and preprocessed: (C, *sizes).

    Only images, of two sizes, are resized. Raises ValueError if the array has other axes, sizes or values.
    """
    sizes, channels = target.sizes, target.channels
    shape = array.shape
    if array.ndim == len(sizes) and channels == 1:
        array = array[..., None]
    if array.ndim != len(sizes) + 1 or array.shape[-1] != channels or 0 in shape:
        axes = {1: "length", 2: "height, width", 3: "depth, height, width"}[len(sizes)]
        raise ValueError(f"{shape} {array.dtype}, not ({axes}, {channels}) as data.channels says")
    array = scale(array, target.range)
    if array.shape[:-1] == sizes:
        return np.moveaxis(array, -1, 0)
    if len(sizes) != 2:
        raise ValueError(f"its sizes are {list(array.shape[:-1])}, and data.image_size is {list(sizes)}")
    parts = [
        np.asarray(_cover(Image.fromarray(np.ascontiguousarray(part)), sizes)) for part in np.moveaxis(array, -1, 0)
    ]
    return np.stack(parts).clip(-1, 1) if array.dtype == np.float32 else np.stack(parts)


def scale(array: Array, declared: tuple[float, float] | None) -> Array:
    """Scale values from `declared` to [-1, 1] in float32; 8 bits stay as they are. Without, 16 bits are scaled whole.

    Raises ValueError if the range is not known, or does not hold all values.
    """
    if array.dtype == np.uint8 and declared in (None, (0, 255)):
        return array
    array = array.astype(array.dtype.newbyteorder("="), copy=False) if array.dtype.kind in "iuf" else array
    low, high = (0, 65535) if declared is None else declared
    lowest, highest = (array.min(), array.max()) if array.size and array.dtype.kind in "biuf" else (np.nan, np.nan)
    if declared is None and array.dtype != np.uint16:
        usual: list[tuple[float, float]] = [(0.0, 1.0), (-1.0, 1.0), (0, 255), (0, 4095), (0, 65535)]
        fits = next((ends for ends in usual if ends[0] <= lowest and highest <= ends[1]), (lowest, highest))
        raise ValueError(f"its values are {array.dtype} from {lowest:g} to {highest:g}, whose range is not known: "
                         f"declare it, such as with --data.range \"[{fits[0]}, {fits[1]}]\"")  # fmt: skip
    if not (low <= lowest and highest <= high):
        raise ValueError(f"its values, from {lowest:g} to {highest:g}, are not within data.range [{low:g}, {high:g}]")
    return ((array.astype(np.float64) - low) * (2 / (high - low)) - 1).astype(np.float32)


def stack(images: Sequence[Array]) -> Array:
    """Images of one shape as a batch: uint8 if all are, else float32 in [-1, 1]."""
    if all(image.dtype == np.uint8 for image in images):
        return np.stack(images)
    return np.stack([image / np.float32(127.5) - 1 if image.dtype == np.uint8 else image for image in images])


def preprocess_all(images: NDArray[np.uint8], target: Target) -> NDArray[np.uint8]:
    """Preprocess images in memory, (N, H, W) or (N, H, W, C): (N, C, *sizes). Those that fit are only reordered."""
    if (*images.shape[1:3], *(images.shape[3:] or (1,))) == (*target.sizes, target.channels):
        return images.reshape(*images.shape[:3], target.channels).transpose(0, 3, 1, 2).copy()
    return np.stack([preprocess(Image.fromarray(image), target) for image in images])
