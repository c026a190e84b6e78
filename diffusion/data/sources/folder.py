"""Image files in a folder, a zip or tar shards."""

import os
from collections import Counter
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import numpy as np

from diffusion.config.fields import PathText, section
from diffusion.data.containers import IMAGE_SUFFIXES, open_container, stem
from diffusion.data.image_files import FileDataset, ImageFiles
from diffusion.data.labels import LABELS, from_list, number
from diffusion.errors import UsageError, check_name, refusing


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

    def where_conditions(self, name: str) -> dict[str, Any]:
        where = {"include": name} if "*" in name else {"path": name}
        return {"include": self.include if name == self.path else None, "labels": "none", **where}

    def check_outside(self, out: Path, flag: str) -> None:
        """Raise UsageError if what is written would become data."""
        real = out.resolve()
        if self.path is not None and Path(self.path).resolve() in (real, *real.parents):
            raise UsageError(f"{flag} {out} lies in data.path {self.path}, and would become data: name another place")

    def list_files(self, split: str = "train") -> FileDataset:
        if self.path is None:
            raise UsageError("data.source is folder: name the folder with --data.path FOLDER")
        container = open_container(Path(self.path))

        def text(i: int) -> str:
            with refusing(lambda reason: f"data.labels {names[i]} cannot be read: {reason}"), container.open(i) as file:
                return file.read().decode("utf-8-sig")

        names = [os.fsdecode(name) for name in container.names.tolist()]
        suffixes = [os.path.splitext(name)[1].lower() for name in names]
        images = [i for i, suffix in enumerate(suffixes) if suffix in IMAGE_SUFFIXES]
        if not images:
            raise UsageError(f"data.path {self.path} holds no images ({', '.join(IMAGE_SUFFIXES)})")
        inside = [name.split("/", 1)[1] for name in names] if getattr(container, "by_shard", False) else names
        ids = [i for i in images if self._includes(inside[i])]
        if not ids:
            none = f"none of the {len(images)} images of data.path {self.path} match it, such as {inside[images[0]]}"
            raise UsageError(f"data.include is {self.include}; {none}")
        files, unused = [inside[i] for i in ids], [inside[i] for i in set(images).difference(ids)]
        beside = {stem(name): i for i, name in enumerate(names) if suffixes[i] == ".cls"}
        lists = {name: i for i, name in enumerate(names) if suffixes[i] in (".json", ".csv")}
        usual = [name for name in ("dataset.json", "labels.csv") if name in lists]
        how = self.labels or [*usual, "cls" if beside else "folders"][0]
        check_name("data.labels", how, [*LABELS, "cls", *lists])
        if how in LABELS:
            classes = LABELS[how](files, self.path)
        elif how in lists:
            classes = from_list(files, how, text(lists[how]), unused)
        else:
            stems = {names[i]: stem(names[i]) for i in ids}
            pairs = [(name, number(text(beside[key]).strip())) for name, key in stems.items() if key in beside]
            classes = from_list(list(stems), how, pairs)
        read = {*IMAGE_SUFFIXES, f".{how}"}
        others = [suffix for suffix, name in zip(suffixes, names, strict=True) if suffix not in read and name != how]
        not_read = Counter(suffix or "without suffix" for suffix in others)
        not_read["images that data.include leaves out"] = len(unused)
        return FileDataset(container, np.array(ids), self.target, *classes, self.on_error, +not_read)

    def _includes(self, name: str) -> bool:
        """Whether `include` matches a file's path, or, if it has no folder, its name."""
        pattern = self.include
        return pattern is None or fnmatchcase(name if "/" in pattern else name.rpartition("/")[2], pattern)
