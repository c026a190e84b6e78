"""Data sets of the Hugging Face Hub, through `datasets`."""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from diffusion.config.fields import PathText, section
from diffusion.data.image_files import FileDataset, ImageFiles
from diffusion.errors import UsageError, check_name, one_line


@section("data")
class HuggingFace(ImageFiles):
    """A data set of the Hugging Face Hub, or one that `save_to_disk` wrote."""

    source: Literal["huggingface"] = "huggingface"
    path: PathText | None = None
    """id on the Hub, such as ylecun/mnist, or a local folder"""
    subset: str | None = None
    """configuration of the data set, if it has several"""
    image_column: str | None = None
    """column of images; null: the first"""
    label_column: str | None = None
    """column of labels; null: the first of type ClassLabel, if any; none: no classes"""

    splits = ("train", "test")

    def list_files(self, split: str = "train") -> FileDataset:
        try:
            import datasets
        except ImportError:
            raise UsageError("data.source huggingface needs a package: pip install datasets") from None
        if self.path is None:
            raise UsageError("data.source is huggingface: name the data set with --data.path ID_OR_FOLDER")
        try:
            on_disk = any((Path(self.path) / name).is_file() for name in ("state.json", "dataset_dict.json"))
            found = datasets.load_from_disk(self.path) if on_disk else datasets.load_dataset(self.path, self.subset)
        except Exception as error:  # the Hub's, pyarrow's, the file system's
            raise UsageError(f"data.path {self.path} is no data set that can be loaded ({one_line(error)})") from None
        if isinstance(found, dict):
            check_name(f"the part of data.path {self.path} that is read", split, list(found))
            found = found[split]
        kinds = {kind: [name for name, feature in found.features.items() if isinstance(feature, kind)]
                 for kind in (datasets.Image, datasets.ClassLabel)}  # fmt: skip
        if not kinds[datasets.Image]:
            raise UsageError(f"data.path {self.path} has no column of images: it has {', '.join(found.features)}")
        image = self.image_column or next(iter(kinds[datasets.Image]), None)
        label = self.label_column or next(iter(kinds[datasets.ClassLabel]), "none")
        check_name("data.image_column", image, kinds[datasets.Image])
        check_name("data.label_column", label, [*kinds[datasets.ClassLabel], "none"])
        labels, classes = np.zeros(len(found), np.int64), ()
        if label != "none":
            labels = np.array([-1 if value is None else value for value in found[label]])
            classes = tuple(found.features[label].names)
            if len(labels) and (labels.min() < 0 or labels.max() >= len(classes)):
                raise UsageError(f"data.label_column {label} has labels from {labels.min()} to {labels.max()}, and "
                                 f"{len(classes)} classes: choose --data.label_column none")  # fmt: skip
        rows = Rows(found.cast_column(image, datasets.Image(decode=False)), str(image), self.path)
        return FileDataset(rows, np.arange(len(found)), labels, classes, self.target, self.on_error)


@dataclass
class Rows:
    """The images of a table as files."""

    table: Any
    column: str
    path: str
    suffix = ""

    def __post_init__(self) -> None:
        import pyarrow.compute as compute

        content = compute.struct_field(self.table.with_format("arrow")[:][self.column], "bytes")
        self.sizes = np.array(compute.fill_null(compute.binary_length(content), -1).to_pylist(), dtype=np.int64)
        self.names = np.array([b"%d" % i for i in range(len(self.table))])
        self.where = f"{self.path}: row "

    def open(self, i: int) -> BinaryIO:
        found = self.table[i][self.column]
        if found is None:
            raise ValueError("it is null")
        return BytesIO(found["bytes"]) if found["bytes"] is not None else Path(found["path"]).open("rb")
