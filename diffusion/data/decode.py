"""Image files and arrays to what networks see: decoding, the paper's preprocessing, and the scale of values."""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from diffusion.data.values import Array

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
"""The formats that PIL may detect, whatever a file is called: for some others it would start a program."""
PIL_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
MAX_PIXELS = 2**30 // 12
"""Larger images may be meant to exhaust the memory."""
HEADERS = threading.Lock()
"""Held while numpy reads a header: Python's parser, which it uses, sometimes fails in several threads."""
TIFF_HEADS = b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"
ORIENTATION, PHOTOMETRIC, BITS, SAMPLES, SAMPLE_FORMAT = 274, 262, 258, 277, 339
"""Tags of TIFF and EXIF."""


@dataclass(frozen=True)
class Target:
    """What images are converted to: arrays (channels, *sizes).

    Attributes:
        range: the values that become -1 and 1; None: all that 8 or 16 bits can hold.
        unbounded: whether values may lie beyond the range.
        background: the grey level, 0 to 255, under transparent pixels, if there is no channel for alpha.
        max_pixels: larger images are refused.
    """

    sizes: tuple[int, ...]
    channels: int
    range: tuple[float, float] | None = None
    unbounded: bool = False
    background: int = 255
    max_pixels: int = MAX_PIXELS


class Stored(NamedTuple):
    """An array in a file, of which only the header has been read."""

    shape: tuple[int, ...]
    read: Callable[[], Array]


def decode(file: BinaryIO | Array, target: Target) -> Array:
    """The image in an open file, preprocessed: (C, *sizes), uint8, or float32 in [-1, 1] of data of more than 8 bits.

    Raises an exception of any type if it cannot be read.
    """
    with _opened(file, target.max_pixels) as content:
        return fit(content.read(), target) if isinstance(content, Stored) else preprocess(content, target)


def describe(file: BinaryIO | Array, target: Target) -> tuple[str, tuple[int, ...], list[str]]:
    """The kind of an image file, of which only the header is read; its sizes before preprocessing; and the keys of
    `diffusion.data.summary.REMARKS` that apply to it. Raises an exception of any type if it cannot be read."""
    with _opened(file, target.max_pixels) as content:
        if isinstance(content, Stored):
            return "arrays", _sizes_of(content.shape, target.channels), []
        mode, deep, turn = content.mode, ";16" in _raw_mode(content), content.getexif().get(ORIENTATION, 1)
        grey16 = mode.startswith("I;16")
        grey = grey16 or mode in ("1", "I", "F", "L", "LA", "La")
        remarks = {
            "16 bits": grey16 or mode in ("I", "F"),
            "reduced": deep and not grey16 and content.format == "PNG",
            "alpha": "a" in mode.lower().replace("lab", "") or "transparency" in content.info,
            "frames": getattr(content, "n_frames", 1) > 1 and content.format != "MPO",  # a camera's preview
            "turned": turn != 1,
            "colour": target.channels < 3 and not grey,
            "grey": target.channels > 2 and grey,
        }
        sizes = content.size if turn >= 5 else content.size[::-1]
        return f"{content.format} {mode}", sizes, [key for key, applies in remarks.items() if applies]


def _sizes_of(shape: tuple[int, ...], channels: int) -> tuple[int, ...]:
    """The sizes of an array (*sizes, C), or (*sizes) with one channel. Raises ValueError if there are none."""
    sizes = shape[:-1] if shape[-1:] == (channels,) and len(shape) > 1 else shape
    if not 1 <= len(sizes) <= 3 or (sizes == shape and channels != 1):
        raise ValueError(f"it is {shape}, and data.channels is {channels}")
    return sizes


@contextmanager
def _opened(file: BinaryIO | Array, max_pixels: int) -> Iterator[Stored | Image.Image]:
    """The content of a file: an array of a .npy, or of a TIFF that PIL does not read whole; else a PIL image."""
    if isinstance(file, np.ndarray):
        yield Stored(file.shape, lambda: file)
        return
    head = file.read(8)
    file.seek(0)
    if head.startswith(np.lib.format.MAGIC_PREFIX):
        with HEADERS:
            old = np.lib.format.read_magic(file) == (1, 0)
            read_header = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read_header(file)
        order: Literal["F", "C"] = "F" if fortran else "C"
        # frombuffer refuses Python objects, so nothing is unpickled.
        yield Stored(shape, lambda: np.frombuffer(file.read(), dtype, math.prod(shape)).reshape(shape, order=order))
    elif head.startswith(TIFF_HEADS) and not _reads_whole(file, max_pixels):
        yield from _tiff(file, max_pixels)
    else:
        with open_image(file, max_pixels) as image:
            yield image


@contextmanager
def open_image(file: BinaryIO, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """Open an image file. Raises ValueError above `max_pixels`, in every thread alike."""
    Image.MAX_IMAGE_PIXELS = None  # PIL's limit is one for the whole process, and only warns up to twice of it
    try:
        image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:  # PIL's message names the object, not the file
        raise UnidentifiedImageError(f"cannot identify the format, which must be one of {', '.join(FORMATS)}") from None
    with image:
        if image.width * image.height > max_pixels:
            raise ValueError(f"it has {image.width} x {image.height} pixels, more than data.max_pixels {max_pixels}")
        yield image


def _raw_mode(image: Any) -> str:
    """The layout of the pixels in the file, such as L;2 or RGB;16B, as long as nothing has been loaded."""
    return " ".join(str(tile[3]) for tile in getattr(image, "tile", ()) or ())


def _reads_whole(file: BinaryIO, max_pixels: int) -> bool:
    """Whether PIL reads all of a TIFF: every page, band and bit. (tifffile alone does not decompress LZW and JPEG.)"""
    try:
        with open_image(file, max_pixels) as image:
            tags: Any = getattr(image, "tag_v2", {})
            bits, kinds = max(tags.get(BITS, (1,))), tags.get(SAMPLE_FORMAT, (1,))
            plain = not (bits == 32 and 1 in kinds) and not (bits <= 8 and 2 in kinds)
            if bits > 8 and image.mode not in "IF":
                plain = image.mode.startswith("I;16") and tags.get(PHOTOMETRIC) == 1
            return plain and tags.get(SAMPLES, 1) <= len(image.getbands()) and getattr(image, "n_frames", 1) == 1
    except UnidentifiedImageError:
        return False
    finally:
        file.seek(0)


def _tiff(file: BinaryIO, max_pixels: int) -> Iterator[Stored]:
    """The largest series of a TIFF, channels last: (..., H, W, C). The others are thumbnails."""
    try:
        import tifffile
    except ImportError:
        raise ValueError("it is a TIFF that PIL does not read whole: pip install tifffile") from None
    with tifffile.TiffFile(file) as tiff:
        series = max(tiff.series, key=lambda series: math.prod(series.shape))
        if math.prod(series.shape) > 4 * max_pixels:
            raise ValueError(f"it holds {series.shape} values, more than 4 times data.max_pixels {max_pixels}")
        photometric, alpha = int(series.keyframe.photometric), [int(kind) for kind in series.keyframe.extrasamples]
        turn = series.keyframe.tags.valueof(ORIENTATION, 1)
        # Other values are not brightness, are colours multiplied by alpha, or lie turned.
        if photometric not in (1, 2) or 1 in alpha or turn != 1:
            what = f"photometric {photometric}, orientation {turn}, extra samples {alpha}"
            raise ValueError(f"it is a TIFF of {what}: save it upright, as RGB or minisblack")
        axis = series.axes.find("S")

        def channels_last(array: Array) -> Array:
            return array[..., None] if axis < 0 else np.moveaxis(array, axis, -1)

        yield Stored(channels_last(np.broadcast_to(0, series.shape)).shape, lambda: channels_last(series.asarray()))


def preprocess(image: Image.Image, target: Target) -> Array:
    """Resize and crop an image as the paper's pipeline does.

    The image is turned upright by its EXIF orientation (which the published code ignores), halved by box filter while
    its sides are at least twice those of the target, resized by bicubic filter to cover it, and cropped to the centre.
    """
    deep, channels = ";16" in _raw_mode(image), target.channels
    if "transparency" in image.info:
        if deep or image.mode.startswith("I"):
            raise ValueError("it has 16 bits and a transparent colour, which are not read together")
        # PIL scales the pixels to 8 bits, but not this.
        image.info["transparency"] *= {"L;2": 85, "L;4": 17}.get(_raw_mode(image), 1)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # PIL would clip 16 bits at 255
        if channels not in (1, 3):
            raise ValueError(f"it is grey, with no alpha, and data.channels is {channels}")
        return fit(np.repeat(_pixels(image), channels, axis=2), target)
    if channels not in PIL_MODES:
        raise ValueError(f"{channels} channels need .npy or .tif files")
    image = _with_channels(image, target)
    if target.range not in (None, (0, 255)):
        if deep:
            raise ValueError("it has 16 bits a channel, of which PIL reads 8: save it as .npy or .tif")
        return fit(_pixels(image), target)
    return _pixels(_cover(image, target.sizes)).transpose(2, 0, 1)


def _pixels(image: Image.Image) -> Array:
    """The pixels of an image, (H, W, C)."""
    return np.atleast_3d(np.asarray(image))


def _with_channels(image: Image.Image, target: Target) -> Image.Image:
    """Convert an image to the target's number of channels. Transparent pixels show the background, not the colour
    stored under them. (Before any resizing: palette indices cannot be averaged.)"""
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
    sizes, channels, shape = target.sizes, target.channels, array.shape
    array = array[..., None] if array.ndim == len(sizes) and channels == 1 else array
    if array.ndim != len(sizes) + 1 or array.shape[-1] != channels or 0 in shape:
        axes = ("length", "height, width", "depth, height, width")[len(sizes) - 1]
        raise ValueError(f"{shape} {array.dtype}, not ({axes}, {channels}) as data.channels says")
    bands = np.moveaxis(scale(array, target.range, target.unbounded), -1, 0)
    if bands.shape[1:] == sizes:
        return bands
    if len(sizes) != 2:
        raise ValueError(f"its sides are {list(bands.shape[1:])}, and data.image_size is {list(sizes)}")
    fitted = np.stack([np.asarray(_cover(Image.fromarray(np.ascontiguousarray(band)), sizes)) for band in bands])
    return fitted.clip(-1, 1) if fitted.dtype == np.float32 and not target.unbounded else fitted


def scale(array: Array, declared: tuple[float, float] | None, unbounded: bool = False) -> Array:
    """Scale values from `declared` to [-1, 1] in float32; 8 bits stay as they are. Without, 16 bits are scaled whole.

    Raises ValueError if the range is not known, or does not hold all values and is not `unbounded`.
    """
    if array.dtype == np.uint8 and declared in (None, (0, 255)):
        return array
    numbers = array.dtype.kind in "biuf"
    array = array.astype(array.dtype.newbyteorder("="), copy=False) if numbers else array
    lowest, highest = (array.min(), array.max()) if array.size and numbers else (np.nan, np.nan)
    if declared is None and array.dtype != np.uint16:
        usual = [(0.0, 1.0), (-1.0, 1.0), (0, 255), (0, 4095), (0, 65535), (lowest, highest)]
        low, high = next((low, high) for low, high in usual if not (lowest < low or highest > high))
        span = f"its values are {array.dtype} from {lowest:g} to {highest:g}, whose range is not known"
        raise ValueError(f'{span}: declare it, such as with --data.range "[{low}, {high}]"')
    low, high = declared or (0, 65535)
    if (low <= lowest and highest <= high) or (unbounded and numbers):
        with np.errstate(over="ignore"):
            scaled = ((array.astype(np.float64) - low) * (2 / (high - low)) - 1).astype(np.float32)
        if np.isfinite(scaled).all():
            return scaled
    raise ValueError(f"its values, from {lowest:g} to {highest:g}, are not within data.range [{low:g}, {high:g}]")


def of_one_type(images: Sequence[Array]) -> Sequence[Array]:
    """Images as uint8 if all are, else as float32 in [-1, 1]."""
    if all(image.dtype == np.uint8 for image in images):
        return images
    return [image / np.float32(127.5) - 1 if image.dtype == np.uint8 else image for image in images]


def preprocess_all(images: Array, target: Target) -> Array:
    """Preprocess uint8 images in memory, (N, H, W) or (N, H, W, C): (N, C, *sizes). Those that fit are reordered."""
    if (images if images.ndim == 4 else images[..., None]).shape[1:] == (*target.sizes, target.channels):
        return images.reshape(*images.shape[:3], target.channels).transpose(0, 3, 1, 2).copy()
    return np.stack([preprocess(Image.fromarray(image), target) for image in images])
