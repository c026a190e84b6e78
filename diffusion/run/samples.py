"""Samples on disk: each batch is written when it is done, and the same command continues where it stopped.

A folder of images is its own store. A grid and an array are assembled at the end from parts beside them:

samples.npz.parts/
    samples.json     the settings of the images; parts of other settings are not used
    00000000.npy     images of the batch that begins at 0, (N, *sizes, C)
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from diffusion.data.decode import PIL_MODES
from diffusion.data.values import to_stored
from diffusion.errors import UsageError
from diffusion.files.atomic import lock, replace_bytes, unlock
from diffusion.run.grids import png, save_grid

Form = Literal["grid", "images", "npz"]
SETTINGS = "samples.json"
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
SUFFIXES = {"grid": ".png", "images": "", "npz": ".npz"}


@dataclass
class SampleStore:
    """Images that are written batch by batch into `out`: a grid (.png), a folder of images, or an array (.npz).

    Args:
        out: the file or folder.
        form: grid, images or npz.
        n: how many images.
        shape: of one, (C, *sizes).
        labels: the class numbers, taken in turn; None without classes.
        settings: everything that the images depend on; samples of other settings are not continued.
        names: of the classes, written under the images of a grid, if given.
        declared: the range of values that is written (see `to_stored`); None: 8 bits, as always in a grid.

    `begin` is called by one process, `is_done` and `write` by any, and `finish` by one when all are done.
    """

    out: Path
    form: Form
    n: int
    shape: tuple[int, ...]
    labels: Sequence[int] | None
    settings: dict[str, Any]
    declared: tuple[float, float] | None = None
    names: Sequence[str] = ()

    def __post_init__(self) -> None:
        self.out = Path(os.path.realpath(self.out)) if self.out.is_symlink() else self.out  # links are followed
        self.declared = None if self.form == "grid" else self.declared
        self.dtype = to_stored(torch.zeros(1), self.declared).dtype
        self.settings = self.settings | {"classes": None if self.labels is None else list(self.labels)}
        self.folder = self.out if self.form == "images" else self.out.with_name(f"{self.out.name}.parts")
        self._lock: int | None = None
        self._ours = False  # whether the folder's settings are those of this call

    def begin(self) -> None:
        """Create the folder, or continue what the same command left there.

        Raises BlockingIOError if another process writes there, and FileExistsError if it holds something else.
        """
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        path = self.folder / SETTINGS
        if (os.path.lexists(self.folder) and not self.folder.is_dir()) or (path.exists() and not path.is_file()):
            raise FileExistsError(f"{self.folder} is there, and holds no samples: name another")
        if self.folder.exists() and not path.exists() and any(self.folder.iterdir()):
            raise FileExistsError(f"{self.folder} is not empty: name a new folder")
        self.folder.mkdir(exist_ok=True)
        self._lock = lock(self.folder / ".lock")
        self._ours = not path.exists()
        if self._ours:
            self._write_settings()
        try:
            found = json.loads(path.read_bytes())
            differ = {key for key in found.keys() | self.settings.keys() if found.get(key) != self.settings.get(key)}
        except (ValueError, AttributeError, RecursionError):
            self.close()
            raise FileExistsError(f"{path} cannot be read: name another folder, or remove it") from None
        if differ:
            self.close()
            key = min(differ)
            raise FileExistsError(f"{self.folder} holds samples of other settings ({key} was {found.get(key)}, and is "
                                  f"{self.settings.get(key)}): name another, or remove it")  # fmt: skip
        self._ours = True

    def _write_settings(self) -> None:
        replace_bytes(self.folder / SETTINGS, json.dumps(self.settings, indent=1).encode())

    def close(self) -> None:
        """Release the folder. An empty one is removed."""
        if self._lock is not None:
            (self.folder / ".lock").unlink(missing_ok=True)
            unlock(self._lock)
            self._lock = None
            if self._ours and self.folder.exists() and [path.name for path in self.folder.iterdir()] == [SETTINGS]:
                (self.folder / SETTINGS).unlink()
                self.folder.rmdir()

    def is_done(self, batch: range) -> bool:
        """Whether a batch is on disk."""
        return all(self._is_whole(path, batch) for path in self._files(batch))

    def _is_whole(self, path: Path, batch: range) -> bool:
        """Whether a file is complete, judged by its shape or its end: a power failure may leave it empty."""
        if not path.is_file():
            return False
        with path.open("rb") as file:
            if path.suffix == ".png":
                file.seek(max(0, path.stat().st_size - len(PNG_END)))
                return file.read() == PNG_END
        channels, *size = self.shape
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, OSError):
            return False
        one = (*size, channels)
        return array.dtype == self.dtype and array.shape == (one if self.form == "images" else (len(batch), *one))

    def write(self, batch: range, images: Tensor) -> None:
        """Write a batch of images in [-1, 1], each file atomically."""
        arrays = rearrange(to_stored(images, self.declared), "n c ... -> n ... c")
        if self.form != "images":
            replace_bytes(self._files(batch)[0], _npy(arrays), sync=False)
            return
        for path, array in zip(self._files(batch), arrays, strict=True):
            if not self._is_whole(path, batch):
                content = _npy(array) if path.suffix == ".npy" else png(rearrange(array, "h w c -> c h w"))
                replace_bytes(path, content, sync=False)

    def finish(self, batches: Sequence[range]) -> None:
        """Assemble the parts, and remove them. Raises UsageError if one is missing."""
        missing = next((batch for batch in batches if not self.is_done(batch)), None)
        if missing is not None:
            raise UsageError(
                f"image {missing.start} is not in {self.folder}, although all are drawn: --out must lie in a folder "
                "that all processes share"
            )
        for left in self.folder.glob(".*.tmp"):  # left by a kill
            left.unlink(missing_ok=True)
        labels = None if self.labels is None else [self.labels[i % len(self.labels)] for i in range(self.n)]
        if self.form != "images" and self.out.exists():
            raise UsageError(f"--out {self.out} was written by another command meanwhile: name another")
        if self.form == "grid":
            images = torch.from_numpy(np.concatenate(list(self._arrays(batches))))
            images = rearrange(images, "n ... c -> n c ...")
            captions = [self.names[label] for label in labels] if labels and self.names else ()
            save_grid(images, self.out, len(self.labels or ()), captions=captions, by="sample")
        elif self.form == "npz":
            temporary = self.folder / ".whole.tmp"
            self._save_npz(temporary, batches, labels)
            temporary.replace(self.out)
        if self.form == "images":
            if not (self.folder / SETTINGS).exists():
                self._write_settings()
        else:
            for batch in batches:
                self._files(batch)[0].unlink(missing_ok=True)
        self.close()

    def _files(self, batch: range) -> list[Path]:
        if self.form != "images":
            return [self.folder / f"{batch.start:08d}-{batch.stop:08d}.npy"]
        whole = self.dtype == np.uint8 or (self.dtype == np.uint16 and self.shape[0] == 1)
        suffix = ".png" if whole and len(self.shape) == 3 and self.shape[0] in PIL_MODES else ".npy"
        return [self.folder / f"{i:06d}{suffix}" for i in batch]

    def _arrays(self, batches: Sequence[range]) -> Iterator[NDArray[Any]]:
        for batch in batches:
            yield np.load(self._files(batch)[0], allow_pickle=False)

    def _save_npz(self, path: Path, batches: Sequence[range], labels: list[int] | None) -> None:
        """`np.savez` of arr_0 and arr_1, of which only one batch at a time is in memory."""
        kind, shape = np.lib.format.dtype_to_descr(self.dtype), (self.n, *self.shape[1:], self.shape[0])
        header = {"descr": kind, "fortran_order": False, "shape": shape}
        with zipfile.ZipFile(path, "w") as archive:
            with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(cast(BinaryIO, file), header)
                for array in self._arrays(batches):
                    file.write(array.tobytes())
            if labels is not None:
                archive.writestr(zipfile.ZipInfo("arr_1.npy"), _npy(np.array(labels, dtype=np.int64)))


def begin_unused(path: Path, make: Callable[[Path], SampleStore]) -> SampleStore:
    """Begin samples at `path`, with a number appended if that is taken by another command."""
    for i in count(1):
        samples = make(path.with_stem(f"{path.stem}_{i}") if i > 1 else path)
        if samples.form != "images" and samples.out.exists():
            continue
        try:
            samples.begin()
        except (BlockingIOError, FileExistsError):
            continue
        return samples
    raise AssertionError


def _npy(array: NDArray[Any]) -> bytes:
    buffer = BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
