"""Samples on disk: a grid, a folder of images, or an array.

A folder and an array are written batch by batch, and the same command continues where it stopped: of an array, the
batches lie in a folder beside it until all are done.

samples.npz.parts/
    samples.json     the settings of the images; parts of other settings are not used
    00000000.npy     images of the batch that begins at 0, (N, *sizes, C)
"""

import csv
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from diffusion.data.decode import PIL_MODES
from diffusion.data.values import to_stored, to_uint8
from diffusion.errors import UsageError
from diffusion.files.atomic import lock, replace_bytes, unlock
from diffusion.run.grids import beside, encode, save_grid, to_pil

SETTINGS = "samples.json"


class Taken(UsageError):
    """The place of samples holds something else."""


def numbered(out: Path) -> Iterator[Path]:
    """A path, and then those with _2, _3, ... in their name."""
    yield out
    yield from (out.with_stem(f"{out.stem}_{i}") for i in count(2))


def _check_free(out: Path) -> None:
    if os.path.lexists(out):
        raise Taken(f"--out {out} is there already: name another, or remove it")


class GridStore:
    """Images that are kept in memory until all are drawn, and then written as a grid (.png).

    Its methods are those of `SampleStore`.
    """

    def __init__(self, out: Path, classes: int, captions: Sequence[str] = (), conditions: Tensor | None = None):
        self.out, self.classes, self.captions, self.conditions = out, classes, captions, conditions
        self.drawn: dict[int, Tensor] = {}

    def begin(self) -> None:
        _check_free(self.out)
        self.out.parent.mkdir(parents=True, exist_ok=True)

    def is_done(self, batch: range) -> bool:
        return batch.start in self.drawn

    def write(self, batch: range, images: Tensor) -> None:
        self.drawn[batch.start] = to_uint8(images)

    def finish(self, batches: Sequence[range], main: bool) -> None:
        from accelerate.utils import gather_object  # takes long to import

        drawn = dict(gather_object(list(self.drawn.items())))
        if main:
            images = torch.cat([drawn[batch.start] for batch in batches])
            self.out = next(path for path in numbered(self.out) if not os.path.lexists(path))  # one may be new
            save_grid(beside(images, self.conditions), self.out, self.classes, captions=self.captions, by="sample")

    def close(self) -> None: ...


@dataclass
class SampleStore:
    """Images that are written batch by batch into `out`: a folder of images, or an array (.npz).

    Args:
        out: the file or folder.
        form: images or npz.
        n: how many images.
        shape: of one, (C, *sizes).
        labels: the class numbers, taken in turn; None without classes.
        settings: everything that the images depend on; samples of other settings are not continued.
        declared: the range of values that is written (see `to_stored`); None: 8 bits.
        vectors: columns of condition vectors (n, width), which are written, too: as arrays, or in conditions.csv.

    `begin` is called by one process, `is_done` and `write` by any, and `finish` by all when all are done.
    """

    out: Path
    form: Literal["images", "npz"]
    n: int
    shape: tuple[int, ...]
    labels: Sequence[int] | None
    settings: dict[str, Any]
    declared: tuple[float, float] | None = None
    vectors: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.dtype = to_stored(torch.zeros(1), self.declared).dtype
        self.settings = json.loads(json.dumps(self.settings | {"classes": self.labels}))
        self.folder = self.out if self.form == "images" else self.out.with_name(f"{self.out.name}.parts")
        self._lock: int | None = None
        self._is_new = False

    def begin(self) -> None:
        """Create the folder, or continue what the same command left there.

        Raises Taken if another process writes there, or it holds something else.
        """
        path = self.folder / SETTINGS
        if self.form == "npz" or not self.folder.is_dir():
            _check_free(self.out)
        self.folder.mkdir(parents=True, exist_ok=True)
        if not path.is_file() and any(self.folder.iterdir()):
            raise Taken(f"--out {self.folder} is not empty: name a new folder")
        try:
            self._lock = lock(path)
        except BlockingIOError:
            raise Taken(f"--out {self.folder} is in use by another process that writes there") from None
        self._is_new = not path.stat().st_size
        if self._is_new:  # in place, since the lock is on this file
            path.write_text(json.dumps(self.settings, indent=1))
        try:
            stored = dict(json.loads(path.read_bytes()))
        except (ValueError, TypeError):
            stored = {}
        for key in sorted(stored.keys() | self.settings.keys()):
            was, now = stored.get(key), self.settings.get(key)
            if was != now:
                self.close()
                differs = f"{key} was {was}, and is {now}"
                raise Taken(f"--out {self.folder} holds samples of other settings ({differs}): name another")

    def close(self) -> None:
        """Release the folder. A new one without images is removed."""
        if self._lock is not None:
            unlock(self._lock)
            self._lock = None
            if self._is_new and self.folder.exists() and os.listdir(self.folder) == [SETTINGS]:
                shutil.rmtree(self.folder)

    def is_done(self, batch: range) -> bool:
        """Whether a batch is on disk. (A power failure may leave empty files.)"""
        return all(path.is_file() and path.stat().st_size for path in self._files(batch))

    def write(self, batch: range, images: Tensor) -> None:
        """Write a batch of images in [-1, 1], each file atomically."""
        arrays = rearrange(to_stored(images, self.declared), "n c ... -> n ... c")
        for path, array in zip(self._files(batch), arrays if self.form == "images" else [arrays], strict=True):
            if not (path.is_file() and path.stat().st_size):
                content = _npy(array) if path.suffix == ".npy" else encode(to_pil(array), "PNG")
                replace_bytes(path, content, sync=False)

    def finish(self, batches: Sequence[range], main: bool) -> None:
        """Assemble the parts of an array, and remove them. Raises UsageError if one is missing."""
        if not main:
            return
        if any(not self.is_done(batch) for batch in batches):
            raise UsageError(f"--out {self.folder} lacks images: it must lie in a folder that all processes share")
        for left in self.folder.glob(".*.tmp"):  # left by a kill
            left.unlink(missing_ok=True)
        if self.form == "images" and self.vectors:
            names = [f"{name}{f'_{i}' * (len(x.T) > 1)}" for name, x in self.vectors.items() for i in range(len(x.T))]
            rows = zip(self._files(range(self.n)), torch.cat([*self.vectors.values()], dim=1).tolist(), strict=True)
            with (self.folder / "conditions.csv").open("w", newline="") as file:
                csv.writer(file).writerows([["file_name", *names], *([path.name, *row] for path, row in rows)])
        if self.form == "npz":
            whole = self.folder / "whole.npy"
            images = np.lib.format.open_memmap(whole, "w+", self.dtype, (self.n, *self.shape[1:], self.shape[0]))
            for batch in batches:
                images[batch.start : batch.stop] = np.load(self._files(batch)[0], allow_pickle=False)
            labels = [] if self.labels is None else [np.resize(np.array(self.labels, dtype=np.int64), self.n)]
            np.savez(self.folder / "whole.npz", images, *labels, **self.vectors)  # as arr_0, arr_1 and by name
            _check_free(self.out)
            (self.folder / "whole.npz").replace(self.out)
            shutil.rmtree(self.folder)

    def _files(self, batch: range) -> list[Path]:
        if self.form != "images":
            return [self.folder / f"{batch.start:08d}-{batch.stop:08d}.npy"]
        whole = self.dtype == np.uint8 or (self.dtype == np.uint16 and self.shape[0] == 1)
        suffix = ".png" if whole and len(self.shape) == 3 and self.shape[0] in PIL_MODES else ".npy"
        return [self.folder / f"{i:06d}{suffix}" for i in batch]


def _npy(array: np.ndarray) -> bytes:
    buffer = BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
