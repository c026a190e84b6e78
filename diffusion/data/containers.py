"""Where the files of a data set lie: a folder, or zip and tar archives, which are not unpacked."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from diffusion.errors import UsageError, one_line
from diffusion.files.atomic import cached_file, read_cache, write_cache

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".npy")
LEFT_BEHIND = {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found", "Thumbs.db"}
"""Folders and files that systems leave behind. So are those whose names begin with a dot."""
INDEX_FROM = 10_000
"""Folders of fewer files are listed anew each time, which takes a moment."""
SETTLED_NS = 2 * 10**9
"""A folder that was changed more recently may change again within the same tick of the clock: it is not indexed."""
MOST_SHARDS = 10_000
MAX_MEMBER = 2**30
"""Bytes of the largest file that is read from an archive."""
ARCHIVES = threading.Lock()
"""Held while an archive is read: threads share its position."""


class Container(Protocol):
    """Files by number: their names, bytes (N,), as numpy holds a million of them in few bytes each, and sizes (N,)."""

    names: NDArray[np.bytes_]
    where: str
    """what stands before a name in messages"""
    suffix: str
    """of files whose names have none"""

    @property
    def sizes(self) -> NDArray[np.int64]: ...

    def open(self, i: int) -> BinaryIO:
        """Open a file. Raises an exception of any type if it cannot be read."""


def open_container(path: Path) -> Container:
    """The container at `path`. Raises UsageError if there is none."""
    if path.is_dir():
        folder = Directory(path)
        names = [os.fsdecode(name) for name in folder.names[:MOST_SHARDS].tolist()]
        shards = [path / name for name in names if name.endswith(".tar")]
        if not shards or any(name.lower().endswith(IMAGE_SUFFIXES) for name in names):
            return folder
        return Archives(path, shards)
    if not path.is_file() or path.suffix not in (".zip", ".tar"):
        array = ": add --data.source arrays" if path.is_file() and path.suffix in (".npy", ".npz") else ""
        what = "not a folder, a .zip or a .tar" if path.exists() else "not there"
        raise UsageError(f"data.path {path} is {what}{array}")
    return Archives(path, [path])


def sorted_by_name(names: Sequence[str], *columns: Sequence[int]) -> list[NDArray[Any]]:
    """Names as bytes, and what belongs to each, sorted folder by folder."""
    order = sorted(range(len(names)), key=lambda i: names[i].split("/"))
    return [np.array([os.fsencode(names[i]) for i in order] or [b""][:0], dtype=np.bytes_),
            *(np.array([column[i] for i in order], dtype=np.int64) for column in columns)]  # fmt: skip


class Directory:
    """A folder. Links are followed, each folder once.

    The listing of a large one is kept in the user's cache, and made anew when the change time of any folder in it
    differs (the modification time can be set). A file that was changed in place is named when it is read.
    """

    suffix = ""

    def __init__(self, root: Path):
        self.root, self.where = root, f"{root}/"
        self._index = hashlib.sha256(os.fsencode(os.path.realpath(root))).hexdigest()[:24]
        if (kept := read_cache(self._index, "SiSi")) is not None:
            self.names, self.sizes, folders, stamps = kept
            with contextlib.suppress(Exception):  # a folder is gone, or the arrays do not fit each other
                times = [(root / os.fsdecode(name)).stat().st_ctime_ns for name in folders.tolist()]
                if times and times == stamps.tolist() and len(self.names) == len(self.sizes):
                    return
        found: dict[str, int] = {}
        began = time.time_ns()
        files = list(self._walk("", set(), found))
        self.names, self.sizes = sorted_by_name([name for name, _ in files], [size for _, size in files])
        if len(files) >= INDEX_FROM and max(found.values()) < began - SETTLED_NS:
            write_cache(self._index, self.names, self.sizes, *sorted_by_name(list(found), list(found.values())))

    def _walk(self, folder: str, visited: set[str], found: dict[str, int]) -> Iterator[tuple[str, int]]:
        """The files under a folder and their sizes, -1 of what is no regular file; and the folders with their times."""
        path = self.root / folder
        if (real := os.path.realpath(path)) in visited:
            return
        visited.add(real)
        try:
            found[folder or "."] = path.stat().st_ctime_ns
            # A folder is read under its own name, not that of a link to it, and in the same order everywhere.
            entries = sorted(os.scandir(path), key=lambda entry: (entry.is_symlink(), entry.name))
        except OSError as error:
            raise UsageError(f"data.path {self.root}: {path} cannot be listed: {one_line(error)}") from None
        for entry in entries:
            if is_left_behind(entry.name):
                continue
            name, at = f"{folder}/{entry.name}".lstrip("/"), None
            with contextlib.suppress(OSError):  # a broken link
                at = entry.stat()
            if at is not None and stat.S_ISDIR(at.st_mode):
                yield from self._walk(name, visited, found)
            else:
                yield name, at.st_size if at is not None and stat.S_ISREG(at.st_mode) else -1

    def open(self, i: int) -> BinaryIO:
        path = self.root / os.fsdecode(self.names[i])
        if not path.is_file():  # a pipe would block
            raise ValueError("it is not a file" if path.exists() else "it is a broken link or gone")
        if path.stat().st_size != self.sizes[i]:
            with contextlib.suppress(OSError, RuntimeError):
                cached_file(self._index).unlink(missing_ok=True)
            raise ValueError("it has changed since the folder was listed: begin again")
        return path.open("rb")


class Archives:
    """A zip archive, or tar archives, one after another.

    Names that several archives have begin with that of their archive (`by_shard`).
    """

    suffix = ""

    def __init__(self, path: Path, archives: Sequence[Path]):
        self.path, self.archives, self.where = path, list(archives), f"{path}: "
        self._opened: dict[tuple[int, int], Any] = {}
        found: dict[tuple[int, str], tuple[int, Any]] = {}
        for shard, archive in enumerate(self.archives):
            try:
                if not archive.is_file():  # a pipe would block
                    raise ValueError("it is not a file")
                for name, size, place in self._members(shard):
                    if name.startswith("/") or ".." in name.split("/") or "\0" in name or size > MAX_MEMBER:
                        raise ValueError(f"{name} leads out of it, or is longer than {MAX_MEMBER:,} bytes")
                    if not is_left_behind(name):
                        found[shard, name] = size, place  # of one name, the last counts
            except Exception as error:  # zipfile and tarfile have many types
                kind = archive.suffix.removeprefix(".")
                raise UsageError(f"data.path {archive} cannot be read as a {kind} ({one_line(error)})") from None
        names = [name for _, name in found]
        self.by_shard = len(set(names)) < len(names)
        if self.by_shard:
            names = [f"{self.archives[shard].name}/{name}" for shard, name in found]
        self.names, self.sizes, order = sorted_by_name(names, [size for size, _ in found.values()], range(len(names)))
        places = [(shard, place) for (shard, _), (_, place) in found.items()]
        self._places = [places[i] for i in order.tolist()]

    def _members(self, shard: int) -> Iterator[tuple[str, int, Any]]:
        """The files of an archive: name, size, and what finds them in it."""
        archive = self._archive(shard)
        if isinstance(archive, zipfile.ZipFile):
            found = [
                (member.filename, member.file_size, member) for member in archive.infolist() if not member.is_dir()
            ]
        else:
            found = [(member.name, member.size, member) for member in archive if member.isfile() or member.islnk()]
        return ((name.removeprefix("./"), size, member) for name, size, member in found)

    def _archive(self, shard: int) -> Any:
        """An archive, opened once in each process: processes that share a file share its position."""
        key, path = (os.getpid(), shard), self.archives[shard]
        if key not in self._opened:
            self._opened[key] = zipfile.ZipFile(path) if path.suffix == ".zip" else tarfile.open(path, "r:")  # noqa: SIM115
        return self._opened[key]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": {}}

    def open(self, i: int) -> BinaryIO:
        shard, member = self._places[i]
        with ARCHIVES:
            archive = self._archive(shard)
            file = archive.open(member) if isinstance(archive, zipfile.ZipFile) else archive.extractfile(member)
            return BytesIO(file.read())


def stem(name: str) -> str:
    """A path up to the first dot of the file's name: files that share it belong to one sample, as in WebDataset."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def is_left_behind(name: str) -> bool:
    """Whether a file or folder is no data, by any part of its name."""
    return any(part in LEFT_BEHIND or part.startswith(".") for part in name.split("/"))
