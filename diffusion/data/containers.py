"""Where the files of a data set are stored: a folder; zip and tar archives, which are not unpacked; or a table."""

import contextlib
import os
import re
import stat
import tarfile
import threading
import zipfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from diffusion.data.values import Array
from diffusion.errors import UsageError, refusing

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".npy")
CLUTTER = {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found", "Thumbs.db"}
"""Folders and files that operating systems create. So are those whose names begin with a dot."""
MAX_MEMBER = 2**30
"""Bytes of the largest file that is read from an archive."""
ARCHIVES = threading.Lock()
"""Held while an archive is read: threads share its position."""


class Container(Protocol):
    """Files by number."""

    names: NDArray[np.bytes_]
    """(N,); numpy holds a million names in few bytes each"""
    where: str
    """what precedes a name in messages"""

    @property
    def sizes(self) -> NDArray[np.int64]:
        """(N,), in bytes."""

    def open(self, i: int) -> contextlib.AbstractContextManager[BinaryIO | Array]:
        """Open a file. Raises an exception of any type if it cannot be read."""


class Rows:
    """The rows of a table in place of files."""

    def __init__(self, path: str, count: int):
        self.names = np.array([b"%d" % i for i in range(count)], dtype=np.bytes_)
        self.where = f"{path}: row "


def open_container(path: Path) -> "Directory | Archives":
    """The container at `path`. Raises UsageError if there is none."""
    if path.is_dir():
        folder = Directory(path)
        names = [os.fsdecode(name) for name in folder.names.tolist()]
        shards = [path / name for name in names if name.endswith(".tar")]
        images = any(name.lower().endswith(IMAGE_SUFFIXES) for name in names)
        return Archives(path, shards) if shards and not images else folder
    if path.is_file() and path.suffix in (".zip", ".tar"):
        return Archives(path, [path])
    what = "a folder, a .zip or a .tar: add --data.source arrays for arrays" if path.exists() else "there"
    raise UsageError(f"data.path {path} is not {what}")


def _by_name(files: Iterable[tuple[Any, ...]]) -> tuple[NDArray[np.bytes_], NDArray[np.int64], list[tuple[Any, ...]]]:
    """Files, tuples of a name, a size and more, sorted folder by folder: names, sizes, and the tuples."""
    ordered = sorted(files, key=lambda file: file[0].split("/"))
    names = np.array([os.fsencode(file[0]) for file in ordered], dtype=np.bytes_)
    return names, np.array([file[1] for file in ordered], dtype=np.int64), ordered


class Directory:
    """A folder. Links are followed, each folder once."""

    def __init__(self, root: Path):
        self.root, self.where = root, f"{root}/"
        self.names, self.sizes, _ = _by_name(self._walk("", set()))

    def _walk(self, folder: str, visited: set[str]) -> Iterator[tuple[str, int]]:
        """The files under a folder and their sizes, -1 of what is not a regular file, but for folders in `visited`."""
        path = self.root / folder
        if (real := os.path.realpath(path)) in visited:
            return
        visited.add(real)
        with refusing(lambda reason: f"data.path {self.root}: {path} cannot be listed: {reason}"):
            # A folder is read under its own name, not that of a link to it, and in the same order everywhere.
            entries = sorted(os.scandir(path), key=lambda entry: (entry.is_symlink(), entry.name))
        for entry in entries:
            if is_clutter(entry.name):
                continue
            name, mode, size = f"{folder}/{entry.name}".lstrip("/"), 0, -1
            with contextlib.suppress(OSError):  # a broken link
                mode, size = entry.stat().st_mode, entry.stat().st_size
            if stat.S_ISDIR(mode):
                yield from self._walk(name, visited)
            else:
                yield name, size if stat.S_ISREG(mode) else -1

    def open(self, i: int) -> BinaryIO:
        path = self.root / os.fsdecode(self.names[i])
        if not path.is_file():  # a pipe would block
            raise ValueError("it is not a file" if path.exists() else "it is a broken link or gone")
        if path.stat().st_size != self.sizes[i]:
            raise ValueError("it has changed since the folder was listed: begin again")
        return path.open("rb")


class Archives:
    """A zip archive, or tar archives, one after another.

    If several archives have a file of the same name, names begin with that of their archive (`by_shard`).
    """

    def __init__(self, path: Path, archives: Sequence[Path]):
        self.archives, self.where = archives, f"{path}: "
        self._opened: dict[tuple[int, int], Any] = {}
        listed = ((shard, file) for shard in range(len(archives)) for file in self._list(shard))
        members = {(shard, name): rest for shard, (name, *rest) in listed}  # of one name, the last counts
        self.by_shard = len({name for _, name in members}) < len(members)
        prefixes = [f"{archive.name}/" if self.by_shard else "" for archive in archives]
        found = [(prefixes[shard] + name, size, shard, member) for (shard, name), (size, member) in members.items()]
        self.names, self.sizes, files = _by_name(found)
        self._places = [file[2:] for file in files]

    def _list(self, shard: int) -> Iterator[tuple[str, int, Any]]:
        """The files of an archive: name, size, and member."""
        path = self.archives[shard]
        with refusing(lambda reason: f"data.path {path} cannot be read as a {path.suffix[1:]} ({reason})"):
            if not path.is_file():  # a pipe would block
                raise ValueError("it is not a file")
            archive = self._archive(shard)
            if isinstance(archive, zipfile.ZipFile):
                members = [(member.filename, member.file_size, member) for member in archive.infolist()]
            else:
                members = [(file.name, file.size, file) for file in archive if file.isfile() or file.islnk()]
            for name, size, member in members:
                name = name.removeprefix("./")
                if name.startswith("/") or ".." in name.split("/") or size > MAX_MEMBER:
                    raise ValueError(f"{name} leads out of it, or is longer than {MAX_MEMBER:,} bytes")
                if not name.endswith("/") and not is_clutter(name):
                    yield name, size, member

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


PARTNER = re.compile(r"[._-](masks?|seg|labels?|depth|gt)$", re.IGNORECASE)
"""What the name of a mask or depth map adds to that of its image, as in a_mask.png."""


def paired(names: Sequence[str], others: Sequence[str], left: Collection[str] = ()) -> list[int]:
    """For each name, the index of the one of `others` that belongs to it: it has the same path up to the suffix, or, if
    not all have, begins alike, as a.mask.png and a_mask.png do for a.png.

    Raises UsageError if there is none or several, or if another belongs neither to a name nor to one of those `left`.
    """
    exact = {os.path.splitext(name)[0] for name in names} <= {os.path.splitext(name)[0] for name in others}
    key_of = (lambda name: os.path.splitext(name)[0]) if exact else stem
    keys = [key_of(name) for name in names]
    own = set(keys)
    theirs = [key if (key := key_of(name)) in own else PARTNER.sub("", key) for name in others]
    for key, count in Counter(keys).most_common(1) + Counter(theirs).most_common(1):
        if count > 1:
            raise UsageError(f"{count} images are called {key}: --data.include chooses some")
    found, known = {key: i for i, key in enumerate(theirs)}, own | set(map(key_of, left))
    if missing := [name for name, key in zip(names, keys, strict=True) if key not in found]:
        raise UsageError(f"there is none for {missing[0]}")
    if extra := [name for name, key in zip(others, theirs, strict=True) if key not in known]:
        raise UsageError(f"{extra[0]} belongs to no image")
    return [found[key] for key in keys]


def is_clutter(name: str) -> bool:
    """Whether a path is system clutter, such as __MACOSX."""
    return any(part in CLUTTER or part.startswith(".") for part in name.split("/"))
