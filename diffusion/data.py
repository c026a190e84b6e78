"""Images: where they come from, the paper's preprocessing, and their order as a function of seed and step."""

from __future__ import annotations

import hashlib
import multiprocessing
import multiprocessing.process
import os
import signal
import sys
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from diffusion.config import DataConfig
from diffusion.errors import UsageError, in_short
from diffusion.randomness import generator_for
from diffusion.signals import STOP_SIGNALS

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".npy")
Image.init()  # all of PIL's formats
FORMATS: list[str] = [name for name in ("PNG", "JPEG", "MPO", "WEBP", "BMP", "GIF", "TIFF") if name in Image.OPEN]
"""What PIL may take a file for, whatever its name says: of others, some are programs that it would have run."""
PIL_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
MAX_PIXELS = 2**30 // 12
"""A larger image may be made to fill the memory. (PIL only warns up to twice this; a warning's filter is not
thread-safe.)"""
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
IN_MEMORY_BYTES = 64 * 2**20
"""Folders that are no larger than this once preprocessed are read whole at the start."""

Batch = tuple[Tensor, Tensor]
"""Images (B, C, H, W), uint8, and their labels (B,), int64 (0 where there are no classes)."""
Loaded = tuple[NDArray[np.uint8], NDArray[np.int64], list[str]]
"""A batch, and what was wrong with images that others took the place of. (Arrays: torch would send tensors from a
worker through /dev/shm, which may be small, and then loses them without an error.)"""
POLL_SECONDS = 1
"""How often a process that waits for a worker's batch looks whether it is to stop."""


@dataclass
class ArrayDataset(Dataset):
    """Images in memory: (N, C, H, W), uint8, and labels (N,), int64."""

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    """What was wrong with files that are not among the images."""

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: Sequence[int]) -> Loaded:
        return self.images[list(indices)].numpy(), self.labels[list(indices)].numpy(), []

    def fingerprint(self) -> str:
        """A number that other images, labels, classes or another order would not have."""
        return _digest(self.images.numpy(), self.labels.numpy(), self.class_names)


@dataclass
class FolderDataset(Dataset):
    """Image files that are read as they are needed."""

    paths: list[Path]
    labels: Tensor
    class_names: tuple[str, ...]
    image_size: int
    channels: int
    on_error: Literal["fail", "skip"] = "fail"
    left_out = ()  # nothing has been read yet

    def __len__(self) -> int:
        return len(self.paths)

    def __getitems__(self, indices: Sequence[int]) -> Loaded | UsageError:
        """A batch, or the error that one of its files gave: raised in a worker it would lose its one-line message.

        Where such files are skipped, the next one that can be read takes the place: which, depends on nothing else.
        """
        images, labels, wrong = [], [], list[str]()
        for first in indices:
            for i in (first + further for further in range(len(self))):
                try:
                    image = self._read(self.paths[i % len(self)])
                    break
                except UsageError as error:
                    if self.on_error == "fail":
                        return error
                    wrong.append(str(error))
            else:
                return UsageError(f"none of the {len(self)} images can be read: {wrong[-1]}")
            images.append(image)
            labels.append(int(self.labels[i % len(self)]))
        return np.stack(images), np.array(labels, dtype=np.int64), wrong

    def _read(self, path: Path) -> NDArray[np.uint8]:
        return read_image(path, self.image_size, self.channels)

    def fingerprint(self) -> str:
        """A number that files of other names, sizes or classes would not have. (Their content is not read for it.)"""
        root = os.path.commonpath(self.paths)
        files = [(os.path.relpath(path, root), path.stat().st_size if path.exists() else -1) for path in self.paths]
        return _digest(files, self.labels.numpy(), self.class_names)

    def in_memory(self) -> ArrayDataset:
        """All of it, read now. Raises UsageError with the name of a file that cannot be read, if it is not left out."""

        def read(path: Path) -> NDArray[np.uint8] | UsageError:
            try:
                return self._read(path)
            except UsageError as error:
                return error

        with ThreadPoolExecutor() as pool:
            read_ones = list(pool.map(read, self.paths))
        wrong = [image for image in read_ones if isinstance(image, UsageError)]
        images = [image for image in read_ones if not isinstance(image, UsageError)]
        if wrong and (self.on_error == "fail" or not images):
            raise wrong[0]
        kept = torch.tensor([not isinstance(image, UsageError) for image in read_ones])
        return ArrayDataset(
            torch.from_numpy(np.stack(images)), self.labels[kept], self.class_names, tuple(map(str, wrong))
        )


def _digest(*parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        array = isinstance(part, np.ndarray)
        digest.update(repr((part.shape, str(part.dtype)) if array else part).encode("utf-8", "surrogateescape"))
        digest.update(part.tobytes() if array else b"")
    return digest.hexdigest()[:16]


def open_dataset(config: DataConfig, train: bool = True) -> ArrayDataset | FolderDataset:
    """The data set that a configuration names; of mnist and cifar10 the part for training or the one for testing.

    Raises UsageError where it is not there or cannot be read.
    """
    if config.name == "folder":
        if config.path is None:
            raise UsageError("data.name is folder: say which with --data.path FOLDER")
        folder = _open_folder(Path(config.path), config)
        small = len(folder) * config.channels * config.image_size**2 <= IN_MEMORY_BYTES
        return folder.in_memory() if small else folder
    if config.name == "digits":
        with (files("diffusion") / "digits.npz").open("rb") as file, np.load(file) as arrays:
            images, labels = arrays["images"], arrays["labels"]
        names = tuple(map(str, range(10)))
    else:
        images, labels, names = _open_torchvision(config.name, config.path, train)
    if images.shape[1:3] != (config.image_size, config.image_size) or config.channels != (images.shape[3:] or (1,))[0]:
        chw = np.stack([preprocess(Image.fromarray(image), config.image_size, config.channels) for image in images])
    else:
        chw = images.reshape(*images.shape[:3], config.channels).transpose(0, 3, 1, 2)
    return ArrayDataset(torch.from_numpy(chw.copy()), torch.from_numpy(labels.astype(np.int64)), names)


def _open_torchvision(
    name: str, path: str | None, train: bool
) -> tuple[NDArray[np.uint8], NDArray[np.int64], tuple[str, ...]]:
    from torchvision import datasets  # takes seconds to import, and only these two data sets need it

    kind = {"mnist": datasets.MNIST, "cifar10": datasets.CIFAR10}[name]
    inside = {"mnist": "MNIST", "cifar10": "cifar-10-batches-py"}[name]
    root = Path(path or "data")
    root = root.parent if root.name == inside else root  # torchvision wants the folder that holds it
    try:
        data = kind(root, train=train, download=path is None)
    except Exception as error:  # torchvision raises whatever its download or its files gave
        reason = " ".join(str(error).split()).split(". ")[0]
        if path is None:
            raise UsageError(
                f"{name} could not be downloaded to data/ ({reason}): name its folder with --data.path"
            ) from None
        raise UsageError(f"data.path {path} holds no {name} as torchvision lays it out ({reason})") from None
    names = tuple(map(str, range(10))) if name == "mnist" else tuple(data.classes)
    images, labels = np.asarray(data.data), np.asarray(data.targets)
    if len(images) != len(labels) or not ((labels >= 0) & (labels < len(names))).all():
        raise UsageError(
            f"data.path {root} holds {len(images)} images and {len(labels)} labels up to {labels.max(initial=0)}; "
            f"{name} has {len(names)} classes: use --data.name folder for other data"
        )
    return images, labels, names


def _open_folder(root: Path, config: DataConfig) -> FolderDataset:
    if not root.is_dir():
        raise UsageError(f"data.path {root} is {'not a folder' if root.exists() else 'not there'}")
    paths = sorted(path for path in _files(root) if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise UsageError(f"data.path {root} holds no images ({', '.join(IMAGE_SUFFIXES)})")
    folders = [path.relative_to(root).parts[0] if path.parent != root else "" for path in paths]
    # Images beside the class folders belong to no class, so there are no classes.
    names = [] if "" in folders else sorted(set(folders))
    number = {name: i for i, name in enumerate(names)}
    labels = torch.tensor([number.get(folder, 0) for folder in folders])
    return FolderDataset(paths, labels, tuple(names), config.image_size, config.channels, config.on_error)


def _files(root: Path) -> Iterator[Path]:
    """Every file under a folder, links to folders followed, each folder once. Raises UsageError where one cannot be
    listed."""

    def fail(error: OSError) -> None:
        raise UsageError(f"data.path {root}: {error.filename} cannot be listed: {in_short(error)}")

    seen = set()
    for folder, folders, names in os.walk(root, onerror=fail, followlinks=True):
        if os.path.realpath(folder) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(folder))
        yield from (Path(folder, name) for name in names)


def read_image(path: Path, size: int, channels: int) -> NDArray[np.uint8]:
    """One file, preprocessed: (C, size, size), uint8. Raises UsageError with its name where it cannot be read."""
    try:
        if not path.is_file():  # a pipe would be waited for
            raise ValueError("it is no file" if path.exists() else "it is a link to nowhere")
        if path.suffix.lower() == ".npy":
            array = np.load(path, allow_pickle=False)
            if array.ndim != 3 or array.dtype != np.uint8 or array.shape[2] != channels:
                raise ValueError(f"{array.shape} {array.dtype}, not (height, width, {channels}) uint8")
            layers = [preprocess(Image.fromarray(array[:, :, c]), size, 1) for c in range(channels)]
            return np.concatenate(layers)
        with open_image(path) as image:
            return preprocess(image, size, channels)
    except Exception as error:  # PIL raises OSError, ValueError, SyntaxError, struct.error, ... for broken files
        raise UsageError(f"{path} cannot be read as an image ({in_short(error)})") from None


@contextmanager
def open_image(path: Path, formats: list[str] = FORMATS) -> Iterator[Image.Image]:
    """Open an image file. Raises ValueError where it has more than `MAX_PIXELS`, the same in every thread."""
    with Image.open(path, formats=formats) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"it has {image.width} x {image.height} pixels, more than {MAX_PIXELS}")
        yield image


def preprocess(image: Image.Image, size: int, channels: int) -> NDArray[np.uint8]:
    """An image as the paper's pipeline cuts it: (C, size, size), uint8.

    Turned upright, if a camera said how (the published code does not look), then halved by box filter while its short
    side is at least twice `size`, then bicubic to `size`, then the centre.
    """
    if channels not in PIL_MODES:
        raise ValueError(f"{channels} channels need .npy files")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # PIL would cut 16 bits off at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(
            f"its pixels are of PIL mode {image.mode}, whose range is not known; save it with 8 or 16 bits"
        )
    if "transparency" in image.info:
        image = image.convert("RGBA")
    # Before any resizing: the colours of a palette image cannot be averaged by their numbers.
    image = image.convert(PIL_MODES[channels])
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    if max(image.size) * scale > 100 * size:
        raise ValueError(f"its sides {image.width} and {image.height} are too unequal to be cut to a square")
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    array = np.asarray(image).reshape(image.height, image.width, channels)
    top, left = (image.height - size) // 2, (image.width - size) // 2
    return array[top : top + size, left : left + size].transpose(2, 0, 1)


def to_x_start(images: Tensor) -> Tensor:
    """Images as they are stored, uint8, as the network sees them: float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def load(dataset: ArrayDataset | FolderDataset, indices: Sequence[int]) -> Batch:
    """The images at `indices`, in order. Raises UsageError with the name of a file that cannot be read."""
    loaded = dataset.__getitems__(indices)
    if isinstance(loaded, UsageError):
        raise loaded
    return torch.from_numpy(loaded[0]), torch.from_numpy(loaded[1])


def shrink(x_start: Tensor, size: int) -> Tensor:
    """The low-resolution input that an upsampler is trained on: the mean of each area, as in the published code."""
    return F.interpolate(x_start, size, mode="area")


def batch_indices(num_images: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Which images make up the global batch of `step`.

    Epochs are laid end to end, each shuffled anew, and cut into batches: every image is seen once an epoch, none
    is dropped, and a batch may reach over the end of one.
    """
    indices: list[int] = []
    position = step * batch_size
    while len(indices) < batch_size:
        epoch, start = divmod(position + len(indices), num_images)
        order = _epoch_order(num_images, seed, epoch)
        indices += order[start : start + batch_size - len(indices)].tolist()
    return indices


_last_order: tuple[tuple[int, int, int], Tensor] | None = None


def _epoch_order(num_images: int, seed: int, epoch: int) -> Tensor:
    """The shuffled epoch; the last one is kept, since every step of an epoch asks for it."""
    global _last_order
    key = (num_images, seed, epoch)
    if _last_order is None or _last_order[0] != key:
        _last_order = key, torch.randperm(num_images, generator=generator_for("cpu", seed, "epoch", epoch))
    return _last_order[1]


@dataclass
class _Order(Sampler[list[int]]):
    """This process's micro-batches, step after step: `parts` are its slices of the global batch."""

    num_images: int
    batch_size: int
    seed: int
    steps: range
    parts: list[slice]

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            indices = batch_indices(self.num_images, self.batch_size, self.seed, step)
            yield from (indices[part] for part in self.parts)


def _leave_signals_to_the_run(worker: int) -> None:
    """A terminal, torchrun and schedulers signal workers too, which have to read on until the run is saved."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def micro_batches(
    dataset: ArrayDataset | FolderDataset,
    batch_size: int,
    seed: int,
    steps: range,
    parts: list[slice],
    workers: int = 0,
    skipped: Callable[[list[str]], None] = lambda wrong: None,
    waiting: Callable[[], None] = lambda: None,
) -> Generator[Batch]:
    """The images of `steps`: for each step this process's `parts` of the global batch, one after the other.

    `skipped` hears what was wrong with images in whose place others are. `waiting` is called each second that a
    worker's batch is waited for, and may raise. Raises UsageError with the name of a file that cannot be read.
    Has to be closed (or exhausted), so that its workers end.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=_Order(len(dataset), batch_size, seed, steps, parts),
        collate_fn=lambda batch: batch,
        num_workers=workers,
        generator=torch.Generator(),  # else it would draw from the global one, which dropout uses
        worker_init_fn=_leave_signals_to_the_run,
        timeout=POLL_SECONDS if workers else 0,
    )
    others = set(multiprocessing.active_children())
    try:
        batches = iter(loader)
        while (batch := _next(batches, waiting)) is not None:
            if isinstance(batch, UsageError):
                raise batch
            images, labels = torch.from_numpy(batch[0]), torch.from_numpy(batch[1])
            if batch[2]:
                skipped(batch[2])
            yield (images.pin_memory(), labels.pin_memory()) if torch.cuda.is_available() else (images, labels)
    except OSError as error:
        _end(set(multiprocessing.active_children()) - others)  # else torch waits 5 seconds for each
        # torch's half-made iterator complains when it is freed, which is now.
        hook, sys.unraisablehook = sys.unraisablehook, lambda unraisable: None
        error.with_traceback(None)
        sys.unraisablehook = hook
        raise UsageError(f"data.workers is {workers}, and they cannot be started: {in_short(error)}") from None
    finally:
        _end(set(multiprocessing.active_children()) - others)


def _next(batches: Iterator[Any], waiting: Callable[[], None]) -> Any:
    """The next batch, or None at the end."""
    while True:
        try:
            return next(batches, None)
        except RuntimeError as error:  # torch has no type of its own for this
            if "timed out" not in str(error):
                raise
            waiting()


def _end(workers: set[multiprocessing.process.BaseProcess]) -> None:
    """Kill workers, who are deaf to what Python ends them with at its own end, and would be waited for in vain."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if workers else None  # torch would take it for a crash
    for worker in workers:
        worker.kill()
        worker.join()
    if before is not None:
        signal.signal(signal.SIGCHLD, before)
