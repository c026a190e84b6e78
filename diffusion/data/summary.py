"""What a data set holds, in lines for people: in short before each run, in full for `diffusion check-data`."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch

from diffusion.data.base import DataConfig, DataSet, Labels, load, part
from diffusion.data.containers import stem
from diffusion.data.decode import describe_image, native_sizes, open_image
from diffusion.data.image_files import FileDataset
from diffusion.data.values import to_x_start
from diffusion.errors import UsageError

LOOKED, VALUES, DEEP, CHUNK = 1000, 64, 20, 512
"""How many files' heads, images' values, and values of 16-bit files are looked at before a run."""
REMARKS = {
    "16 bits": "of 16 bits, all of which are used",
    "reduced": "of 16 bits a channel, of which PIL reads 8 (.npy and .tif are read whole)",
    "alpha": "may have transparent pixels, which show data.background, unless data.channels is 2 or 4",
    "frames": "of several frames, of which the first is used",
    "turned": "are turned upright, as their EXIF orientation says",
    "colour": "in colour, which becomes grey (data.channels is below 3)",
    "grey": "are grey, and become RGB of equal channels (data.channels is above 2)",
}


def describe_data(config: DataConfig, dataset: DataSet, looked: int = LOOKED) -> list[str]:
    """What was found and what is done with it, as the lines that a run begins with."""
    files = dataset if isinstance(dataset, FileDataset) else getattr(dataset, "files", None)
    lines = _describe_files(files, looked) if isinstance(files, FileDataset) else []
    if dataset.left_out:
        lines.append(f"{len(dataset.left_out)} more are left out, since they cannot be read: {dataset.left_out[0]}")
    images = load(dataset, part(len(dataset), VALUES).tolist())[0]
    low, high = config.range or (0, 255)
    least, most = ((to_x_start(end).item() + 1) / 2 * (high - low) + low for end in torch.aminmax(images))
    lines.append(f"{len(dataset)} images as {' x '.join(map(str, config.shape))}, values {least:g} to {most:g}"
                 + (" on a scale of 8 bits" if config.range is None and images.is_floating_point() else "")
                 + (f" in {len(images)} of them" if len(images) < len(dataset) else ""))  # fmt: skip
    if most - least < (high - low) / 4 and len(images) > 1:
        lines.append(f"the values take up {(most - least) / (high - low):.1%} of the range {low:g} to {high:g}, which "
                     "becomes -1 to 1: declare what they really span with --data.range")  # fmt: skip
    if config.random_flip:
        lines.append("half of the images are mirrored left to right, chosen anew each time (data.random_flip)")
    names = dataset.class_names
    counts = np.bincount(np.asarray(dataset.labels), minlength=len(names))
    shown = ", ".join(f"{name} {count}" for name, count in zip(names[:10], counts, strict=False))
    more = f", and {len(names) - 10} more; {counts.min()} to {counts.max()} images each" if len(names) > 10 else ""
    why = f": {files.no_classes}" if files and files.no_classes else ""
    return [*lines, f"{len(names)} classes: {shown}{more}" if names else f"no classes{why}"]


def _describe_files(files: FileDataset, looked: int) -> list[str]:
    """Formats, modes and sizes of up to `looked` files, and what happens to them."""
    kinds, sizes, remarks, deep = Counter[str](), Counter[tuple[int, ...]](), Counter[str](), list[int]()
    some = part(len(files), looked).tolist()
    first = [files.key_of(i) for i in range(min(len(files), looked))]
    key = [re.sub(r"[._-](masks?|seg|labels?|depth|gt)$", "", stem(name), flags=re.IGNORECASE) for name in first]
    samples = Counter(key)
    for i in some:
        try:
            with files.container.open(int(files.ids[i])) as file:
                if files.suffix_of(i) == ".npy":
                    kinds["arrays"] += 1
                    shape = native_sizes(file, ".npy", files.target)
                    sizes[shape[::-1]] += len(shape) == 2
                    continue
                with open_image(file, files.target.max_pixels) as image:
                    kind, size, found = describe_image(image, files.target.channels)
                    kinds[kind] += 1
                    sizes[size] += 1
                    remarks.update(found)
                    deep += [i] * ("16 bits" in found)
        except Exception:  # of any type; training names it, or skips it as data.on_error says
            kinds["unreadable"] += 1
    sizes = +sizes  # without signals and volumes
    looked_at = "" if len(some) == len(files) else f" (of {len(some)} looked at)"
    by_name = Counter({f"{width}x{height}": count for (width, height), count in sizes.items()})
    lines = [f"{len(files)} files{looked_at}: " + "; ".join(_counts(found) for found in (kinds, by_name) if found)]
    lines += [f"{remarks[key]}{looked_at} {text}" for key, text in REMARKS.items() if remarks[key]]
    several = [name for name, of in zip(first, key, strict=True) if 1 < samples[of] < 5]
    if several:  # unlike frame.001.png, frame.002.png, ...
        lines.append(f"{len(several)} belong together, like {several[0]} and {several[1]}: --data.include chooses some")
    if deep and files.target.range is None:
        most = -1.0
        for i in deep[:: -(-len(deep) // DEEP)]:
            with suppress(UsageError):  # named where it is read
                most = max(most, float(files.read(i).max()))
        if most < -0.5:
            lines.append(f"those of 16 bits have values up to {(most + 1) / 2 * 65535:.0f} of 65535, and look dark: "
                         "declare what they really span with --data.range")  # fmt: skip
    if sizes and len(files.target.sizes) == 2:
        height, width = files.target.sizes
        scales = {size: max(width / size[0], height / size[1]) for size in sizes}
        kept = {size: min(1.0, width * height / (size[0] * size[1] * scale**2)) for size, scale in scales.items()}
        cut = sum(count for size, count in sizes.items() if kept[size] < 0.98)
        lost = 1 - sum(kept[size] * count for size, count in sizes.items()) / sizes.total()
        small = sum(count for size, count in sizes.items() if scales[size] > 1)
        if cut:
            lines.append(f"{cut}{looked_at} are of another shape than {width}x{height}: {lost:.0%} of all "
                         "images' area is cut off at the margins")  # fmt: skip
        if small:
            lines.append(f"{small}{looked_at} are smaller than {width}x{height}, and are enlarged")
    return lines + ([f"not read: {_counts(Counter(files.not_read))}"] if files.not_read else [])


def _counts(counter: Counter[str]) -> str:
    """The four most frequent, and how many others."""
    most, rest = counter.most_common(4), len(counter) - 4
    return ", ".join(f"{count} {name}" for name, count in most) + (f", {rest} other kinds" if rest > 0 else "")


class Findings(NamedTuple):
    """What a look at every image found: errors; names of images of a single value; names of those that the network
    sees as the same, in groups; and which images could be read."""

    errors: Sequence[str]
    flat: Sequence[str]
    duplicates: Sequence[Sequence[str]]
    readable: Labels


def check_images(dataset: DataSet, progress: Callable[[int], Any] = lambda done: None) -> Findings:
    """Read every image once. `progress` is called with the number of images of each chunk."""
    errors, flat, same, readable = list[str](), list[str](), dict[bytes, list[str]](), list[int]()

    def look(i: int) -> tuple[bytes, bool] | str:
        try:
            image = load(dataset, [i])[0].numpy()
        except UsageError as error:
            return str(error)
        return hashlib.blake2b(image.tobytes(), digest_size=16).digest(), image.min() == image.max()

    with ThreadPoolExecutor() as pool:
        for start in range(0, len(dataset), CHUNK):
            chunk = range(start, min(start + CHUNK, len(dataset)))
            for i, found in zip(chunk, pool.map(look, chunk), strict=True):
                if isinstance(found, str):
                    errors.append(found)
                    continue
                readable.append(i)
                same.setdefault(found[0], []).append(dataset.name_of(i))
                if found[1]:
                    flat.append(dataset.name_of(i))
            progress(len(chunk))
    return Findings(errors, flat, [group for group in same.values() if len(group) > 1], np.array(readable, np.int64))
