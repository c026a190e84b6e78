"""What a data set holds, in lines for people: in short before each run, in full for `diffusion check-data`."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from diffusion.data.base import Batch, DataConfig, DataSet, Labels, load, part
from diffusion.data.containers import PARTNER, stem
from diffusion.data.decode import decode, describe
from diffusion.data.image_files import FileDataset
from diffusion.data.values import to_x_start
from diffusion.errors import UsageError

MAX_HEADERS, MAX_IMAGES, MAX_DEEP = 1000, 64, 20
"""How many files' headers, images' values, and values of 16-bit files are read before a run."""
CHUNK = 512
REMARKS = {
    "16 bits": "of 16 bits, all of which are used",
    "reduced": "of 16 bits a channel, of which PIL reads 8 (.npy and .tif are read whole)",
    "alpha": "may have transparent pixels, which show data.background, unless data.channels is 2 or 4",
    "frames": "of several frames, of which the first is used",
    "turned": "are turned upright, as their EXIF orientation says",
    "colour": "in colour, which becomes grey (data.channels is below 3)",
    "grey": "are grey, and become RGB of equal channels (data.channels is above 2)",
}


def describe_data(config: DataConfig, dataset: DataSet, looked: int = MAX_HEADERS) -> list[str]:
    """What the data hold and what is done with them, as the lines that a run begins with. `looked` is the number of
    files whose headers are read."""
    files = dataset if isinstance(dataset, FileDataset) else getattr(dataset, "files", None)
    lines = _describe_files(files, looked) if files else []
    if dataset.left_out:
        lines.append(f"{len(dataset.left_out)} more are left out, since they cannot be read: {dataset.left_out[0]}")
    images, _, _, conditions = load(dataset, part(len(dataset), MAX_IMAGES).tolist())
    low, high = config.range or (0, 255)
    least, most = ((to_x_start(end).item() + 1) / 2 * (high - low) + low for end in torch.aminmax(images))
    bits = " on a scale of 8 bits" if config.range is None and images.is_floating_point() else ""
    some = f" (of {len(images)} read)" if len(images) < len(dataset) else ""
    shape = " x ".join(map(str, config.shape))
    lines.append(f"{len(dataset)} images as {shape}, values {least:g} to {most:g}{bits}{some}")
    if (share := (most - least) / (high - low)) < 1 / 4 and len(images) > 1:
        lines.append(f"the values take up {share:.1%} of the range {low:g} to {high:g}: declare it with --data.range")
    if config.random_flip:
        lines.append("half of the images are mirrored left to right, chosen anew each time (data.random_flip)")
    lines += dataset.vectors.describe(config.conditions)
    if dataset.condition_channels:
        whence = f", from {config.condition_images}" if config.condition_images else ", the last of each image"
        least, most = (to_x_start(end).item() for end in torch.aminmax(conditions))
        span = f"from {least:.2g} to {most:.2g} where -1 is black and 1 is white"
        lines.append(f"condition images of {dataset.condition_channels} channels{whence}, {span}{some}")
    if dataset.vectors.widths and config.random_flip:
        lines.append("a mirrored image keeps its condition vector: set data.random_flip to false if that is wrong")
    names = dataset.class_names
    if not names:
        return [*lines, f"no classes: {files.no_classes}" if files and files.no_classes else "no classes"]
    counts = np.bincount(np.asarray(dataset.labels), minlength=len(names))
    shown = ", ".join(f"{name} {count}" for name, count in zip(names[:10], counts, strict=False))
    more = f", and {len(names) - 10} more; {counts.min()} to {counts.max()} images each" if len(names) > 10 else ""
    return [*lines, f"{len(names)} classes: {shown}{more}"]


def _describe_files(files: FileDataset, looked: int) -> list[str]:
    """Formats, modes and sizes of up to `looked` files, and what happens to them."""
    chosen = part(len(files), looked).tolist()
    read = [(i, files.look(i, describe)) for i in chosen]
    described = [(i, *found) for i, found in read if not isinstance(found, UsageError)]  # training names the others
    kinds = Counter(kind for _, kind, _, _ in described) + Counter(unreadable=len(chosen) - len(described))
    sizes = Counter(size for _, _, size, _ in described if len(size) == 2)  # not of signals and volumes
    remarks = Counter(key for _, _, _, keys in described for key in keys)
    deep = [i for i, _, _, keys in described if "16 bits" in keys]
    some = "" if len(chosen) == len(files) else f" (of {len(chosen)} read)"
    by_name = Counter({f"{width}x{height}": count for (height, width), count in sizes.items()})
    lines = [f"{len(files)} files{some}: " + "; ".join(_counts(counter) for counter in (kinds, by_name) if counter)]
    lines += [f"{remarks[key]}{some} {text}" for key, text in REMARKS.items() if remarks[key]]
    lines += _pairs([files.key_of(i) for i in range(min(len(files), looked))])
    if deep and files.target.range is None:
        images = [files.look(i, decode) for i in deep[:: -(-len(deep) // MAX_DEEP)]]
        most = max((image.max() for image in images if not isinstance(image, UsageError)), default=-1)
        if most < -0.5:
            span = f"values up to {(most + 1) / 2 * 65535:.0f} of 65535, and look dark"
            lines.append(f"those of 16 bits have {span}: declare what they really span with --data.range")
    if sizes and len(files.target.sizes) == 2:
        lines += _resizing(sizes, files.target.sizes, some)
    if files.not_read:
        lines.append(f"not read: {_counts(Counter(files.not_read))}")
    return lines


def _pairs(names: Sequence[str]) -> Iterator[str]:
    """Whether images belong together by name: as 000.input.png and 000.mask.png, or a.png and a_mask.png."""
    groups = defaultdict[str, list[str]](list)
    for name in names:
        groups[PARTNER.sub("", stem(name))].append(name)
    # Larger groups are sequences, such as frame.001.png, frame.002.png, ...
    if together := [name for group in groups.values() if 1 < len(group) < 5 for name in group]:
        like = f"{len(together)} belong together, like {together[0]} and {together[1]}"
        yield f"{like}: --data.include chooses some, and --data.condition_images conditions on others"


def _resizing(sizes: Counter[tuple[int, ...]], target: tuple[int, ...], some: str) -> Iterator[str]:
    """How many images, counted by their (height, width), are cropped and enlarged to the target."""
    shares = {size: np.divide(target, size) for size in sizes}
    kept = {size: min(1.0, share.prod() / share.max() ** 2) for size, share in shares.items()}
    shape = f"{target[1]}x{target[0]}"
    if cut := sum(count for size, count in sizes.items() if kept[size] < 0.98):
        lost = 1 - sum(kept[size] * count for size, count in sizes.items()) / sizes.total()
        yield f"{cut}{some} are of another shape than {shape}: {lost:.0%} of all images' area is cut off at the margins"
    if small := sum(count for size, count in sizes.items() if shares[size].max() > 1):
        yield f"{small}{some} are smaller than {shape}, and are enlarged"


def _counts(counter: Counter[str]) -> str:
    """The four most frequent, and how many others."""
    most, rest = counter.most_common(4), len(counter) - 4
    return ", ".join(f"{count} {name}" for name, count in most) + (f", {rest} other kinds" if rest > 0 else "")


Checked = tuple[list[str], list[str], list[list[str]], Labels]
"""The errors; the names of images of a single value; those of images that the network sees as the same, in groups; and
the indices of the readable images."""


def check_images(dataset: DataSet, progress: Callable[[int], Any]) -> Checked:
    """Read every image once. `progress` is called with the number of images of each chunk."""

    def look(i: int) -> UsageError | tuple[bytes, bool]:
        loaded = dataset.__getitems__([i])
        if isinstance(loaded, UsageError):
            return loaded
        image = Batch.of(loaded, dataset.condition_channels).images.numpy()
        return hashlib.blake2b(image.tobytes(), digest_size=16).digest(), image.min() == image.max()

    seen, same = list[Any](), defaultdict[bytes, list[str]](list)
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(dataset), CHUNK):
            seen += pool.map(look, range(len(dataset))[start : start + CHUNK])
            progress(len(seen) - start)
    errors = [str(found) for found in seen if isinstance(found, UsageError)]
    readable = [i for i, found in enumerate(seen) if not isinstance(found, UsageError)]
    for i in readable:
        same[seen[i][0]].append(dataset.name_of(i))
    flat = [dataset.name_of(i) for i in readable if seen[i][1]]
    return errors, flat, [group for group in same.values() if len(group) > 1], np.array(readable, np.int64)
