"""Image files in a folder, a zip or tar shards."""

from __future__ import annotations

import os
from collections import Counter
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import numpy as np

from diffusion.config.fields import PathText, section
from diffusion.data.containers import IMAGE_SUFFIXES, Archives, open_container, stem
from diffusion.data.image_files import FileDataset, ImageFiles
from diffusion.data.labels import LABELS, from_file, number
from diffusion.errors import UsageError, check_name, one_line

LABEL_FILES = ("dataset.json", "labels.csv")
"""Label files that are used unasked."""


@section("data")
class Folder(ImageFiles):
    """Your own images."""

    source: Literal["folder"] = "folder"
    path: PathText | None = None
    """the folder of images; or a .zip, a .tar, or a folder of .tar shards, which are not unpacked"""
    labels: PathText | None = None
    """classes: folders, prefix (of the file's name, up to _), cls (files beside the images, as in WebDataset), none, or
    a file in path, .json as NVIDIA's tools write it or .csv; null: dataset.json, labels.csv or cls if there, else
    folders"""
    include: str | None = None
    """pattern of the images to use, such as *.input.png or train/*; null: all"""

    def check_outside(self, out: Path, flag: str) -> None:
        """Raise UsageError if what is written would become data."""
        real = out.resolve()
        if self.path is not None and Path(self.path).resolve() in (real, *real.parents):
            raise UsageError(f"{flag} {out} lies in data.path {self.path}, and would become data: name another place")

    def list_files(self, split: str = "train") -> FileDataset:
        if self.path is None:
            raise UsageError("data.source is folder: name the folder with --data.path FOLDER")
        container = open_container(Path(self.path))

        def read(i: int) -> bytes:
            with container.open(i) as file:
                return file.read()

        names = os.fsdecode(b"\0".join(container.names.tolist())).split("\0")  # quick for a million
        tails = [name.rpartition(".")[2] for name in names]
        lower = {tail: f".{tail.lower()}" if "/" not in tail and len(tail) < 10 else "" for tail in set(tails)}
        suffixes = [lower[tail] for tail in tails]
        images = [i for i, suffix in enumerate(suffixes) if suffix in IMAGE_SUFFIXES]
        if not images:
            raise UsageError(f"data.path {self.path} holds no images ({', '.join(IMAGE_SUFFIXES)})")
        by_shard = isinstance(container, Archives) and container.by_shard
        inside = [name.split("/", 1)[1] for name in names] if by_shard else names
        ids = np.array([i for i in images if self._includes(inside[i])], dtype=np.int64)
        if not len(ids):
            raise UsageError(f"data.include is {self.include}, which none of the {len(images)} images of data.path "
                             f"{self.path} match: the first is {inside[images[0]]}")  # fmt: skip
        files = [inside[i] for i in ids]
        left_out = [inside[i] for i in images if not self._includes(inside[i])]
        beside = {stem(names[i]): i for i, suffix in enumerate(suffixes) if suffix == ".cls"}
        listed = {names[i]: i for i, suffix in enumerate(suffixes) if suffix in (".json", ".csv")}
        unasked = [*(name for name in LABEL_FILES if name in listed), *(["cls"] if beside else []), "folders"]
        chosen = self.labels or unasked[0]
        if chosen not in listed and chosen.endswith((".json", ".csv")):
            raise UsageError(f"data.labels is {chosen}, and data.path {self.path} has no such file")
        check_name("data.labels", chosen, [*LABELS, "cls", *listed])
        if chosen in LABELS:
            labels, classes, why_none = LABELS[chosen](files, self.path)
        else:
            try:
                if chosen == "cls":
                    files = [names[i] for i in ids]
                    pairs = [(name, number(read(beside[stem(name)]).decode().strip()))
                             for name in files if stem(name) in beside]  # fmt: skip
                    labels, classes, why_none = from_file(files, chosen, pairs)
                else:
                    labels, classes, why_none = from_file(files, chosen, read(listed[chosen]), left_out)
            except UsageError:
                raise
            except Exception as error:  # a broken link, a damaged archive
                raise UsageError(f"data.labels {chosen} cannot be read: {one_line(error)}") from None
        unused = [suffix for suffix, name in zip(suffixes, names, strict=True) if name != chosen]
        others = Counter(suffix or "without suffix" for suffix in unused
                         if suffix not in IMAGE_SUFFIXES and (suffix, chosen) != (".cls", "cls"))  # fmt: skip
        others["images that data.include leaves out"] = len(left_out)
        return FileDataset(container, ids, labels, classes, self.target, self.on_error, why_none, +others)

    def _includes(self, name: str) -> bool:
        """Whether `include` matches a file's path, or, if it has no folder, its name."""
        pattern = self.include
        return pattern is None or fnmatchcase(name if "/" in pattern else name.rpartition("/")[2], pattern)
