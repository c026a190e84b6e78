"""Data sets of the Hugging Face Hub, through `datasets`."""

import os
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from diffusion.config.fields import PathText, section
from diffusion.data.conditions import Vectors, vectors_of
from diffusion.data.containers import Rows
from diffusion.data.image_files import FileDataset, ImageFiles
from diffusion.errors import UsageError, check_name, refusing


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
    has_columns = True

    def list_files(self, split: str = "train") -> FileDataset:
        with refusing(lambda _: "data.source huggingface needs a package: pip install datasets", ImportError):
            import datasets
        if self.path is None:
            raise UsageError("data.source is huggingface: name the data set with --data.path ID_OR_FOLDER")
        with refusing(lambda reason: f"data.path {self.path} cannot be loaded as a data set ({reason})"):
            on_disk = any((Path(self.path) / name).is_file() for name in ("state.json", "dataset_dict.json"))
            table = datasets.load_from_disk(self.path) if on_disk else datasets.load_dataset(self.path, self.subset)
        if isinstance(table, dict):
            check_name(f"the split of data.path {self.path}", split, list(table))
            table = table[split]
        photos = [name for name, kind in table.features.items() if isinstance(kind, datasets.Image)]
        kinds = [name for name, kind in table.features.items() if isinstance(kind, datasets.ClassLabel)]
        if not photos:
            raise UsageError(f"data.path {self.path} has no column of images: it has {', '.join(table.features)}")
        image, label = self.image_column or photos[0], self.label_column or [*kinds, "none"][0]
        check_name("data.image_column", image, photos)
        check_name("data.label_column", label, [*kinds, "none"])
        labels, classes = np.zeros(len(table), np.int64), ()
        if label != "none":
            labels = np.array([-1 if value is None else value for value in table[label]])
            classes = tuple(table.features[label].names)
            if len(labels) and not 0 <= labels.min() <= labels.max() < len(classes):
                span = f"labels from {labels.min()} to {labels.max()}, and {len(classes)} classes"
                raise UsageError(f"data.label_column {label} has {span}: choose none")
        vectors = Vectors()
        if self.condition_columns and self.conditions is None:
            for name in self.condition_columns:
                check_name("data.condition_columns", name, list(table.features))
            columns = {name: list(table[name]) for name in self.condition_columns}
            vectors = vectors_of(columns, f"data.path {self.path}", [f"row {i}" for i in range(len(table))])
        rows = TableRows(self.path, table.cast_column(image, datasets.Image(decode=False)), image)
        return FileDataset(rows, np.arange(len(table)), self.target, labels, classes, "", self.on_error, {}, vectors)

    def where_conditions(self, name: str) -> dict[str, Any]:
        return {"image_column": name, "label_column": "none"}


class TableRows(Rows):
    """The images in a column of a table."""

    def __init__(self, path: str, table: Any, column: str):
        import pyarrow.compute as compute
        from datasets.config import HF_CACHE_HOME

        super().__init__(path, len(table))
        self.folders = tuple(os.path.join(os.path.abspath(folder), "") for folder in (path, HF_CACHE_HOME))
        self.table, self.column = table, column
        content = compute.struct_field(table.with_format("arrow")[:][column], "bytes")
        self.sizes = np.array(compute.fill_null(compute.binary_length(content), -1).to_pylist(), dtype=np.int64)

    def open(self, i: int) -> BinaryIO:
        cell = self.table[i][self.column]
        if cell is None:
            raise ValueError("it is null")
        if cell["bytes"] is not None:
            return BytesIO(cell["bytes"])
        file = os.path.abspath(cell["path"])
        if not file.startswith(self.folders):  # a stranger's table may name any file here
            raise ValueError(f"it is {file}, outside the data set")
        if not os.path.isfile(file):  # a pipe would block
            raise ValueError(f"{file} is not a file")
        return open(file, "rb")
