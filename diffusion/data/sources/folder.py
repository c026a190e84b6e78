"""Image files in a folder, a zip or tar shards."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Literal

import numpy as np

from diffusion.data.containers import IMAGE_SUFFIXES, open_container
from diffusion.data.image_files import FileDataset, ImageFiles
from diffusion.data.labels import LABELS, from_file
from diffusion.errors import UsageError, check_name, one_line
from diffusion.fields import PathText, section

LABEL_FILES = ("dataset.json", "labels.csv")
"""Label files that are used unasked."""


@section("data")
class Folder(ImageFiles):
    """Your own images."""

    source: Literal["folder"] = "folder"
    path: PathText | None = None
    """the folder of images; or a .zip, a .tar, or a folder of .tar shards, which are not unpacked"""
    labels: PathText | None = None
    """classes: folders, prefix (of the file's name, up to _), none, or a file in path, .json as NVIDIA's tools write it
    or .csv; null: dataset.json or labels.csv if there, else folders"""

    def list_files(self, split: str = "train") -> FileDataset:
        if self.path is None:
            raise UsageError("data.source is folder: name the folder with --data.path FOLDER")
        container = open_container(Path(self.path))
        names = os.fsdecode(b"\0".join(container.names.tolist())).split("\0")  # quick for a million
        tails = [name.rpartition(".")[2] for name in names]
        lower = {tail: f".{tail.lower()}" if "/" not in tail and len(tail) < 10 else "" for tail in set(tails)}
        suffixes = [lower[tail] for tail in tails]
        ids = np.array([i for i, suffix in enumerate(suffixes) if suffix in IMAGE_SUFFIXES], dtype=np.int64)
        if not len(ids):
            raise UsageError(f"data.path {self.path} holds no images ({', '.join(IMAGE_SUFFIXES)})")
        files = [names[i] for i in ids]
        listed = {names[i]: i for i, suffix in enumerate(suffixes) if suffix in (".json", ".csv")}
        chosen = self.labels or next((name for name in LABEL_FILES if name in listed), "folders")
        if chosen not in listed and chosen.endswith((".json", ".csv")):
            raise UsageError(f"data.labels is {chosen}, and data.path {self.path} has no such file")
        check_name("data.labels", chosen, [*LABELS, *listed])
        if chosen in LABELS:
            labels, classes, why_none = LABELS[chosen](files, self.path)
        else:
            try:
                with container.open(listed[chosen]) as file:
                    labels, classes, why_none = from_file(files, chosen, file.read())
            except UsageError:
                raise
            except Exception as error:  # a broken link, a damaged archive
                raise UsageError(f"data.labels {chosen} cannot be read: {one_line(error)}") from None
        unused = [suffix for suffix, name in zip(suffixes, names, strict=True) if name != chosen]
        others = Counter(suffix or "without suffix" for suffix in unused if suffix not in IMAGE_SUFFIXES)
        return FileDataset(container, ids, labels, classes, self.target, self.on_error, why_none, others)
