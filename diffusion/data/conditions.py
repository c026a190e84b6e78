"""Condition vectors: columns of numbers beside the images, from files to what a network is given."""

import csv
import dataclasses
import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion.errors import UsageError, did_you_mean, refusing

Rows = NDArray[np.float64]
FILES = "file_name"
"""The column that names the images."""
IMAGES_AND_LABELS = {FILES, "arr_0", "images", "x", "arr_1", "labels", "y"}
"""The arrays of an .npz that are no conditions."""
RESERVED = {"y", "image", "low_res", "vector", "label"}
"""Names of inputs that columns cannot have."""


class Vectors(NamedTuple):
    """A condition vector for each image: columns of numbers, side by side."""

    widths: Mapping[str, int] = {}
    """of each column, by its name"""
    rows: Rows = np.zeros((0, 0))
    """(N, sum of the widths); of no columns (0, 0)"""

    def at(self, indices: Sequence[int] | NDArray[np.int64]) -> Rows:
        """The rows at `indices`, (B, sum of the widths)."""
        return self.rows[np.asarray(indices, np.int64)] if self.widths else np.zeros((len(indices), 0))

    def select(self, indices: NDArray[np.int64]) -> "Vectors":
        return Vectors(self.widths, self.at(indices)) if self.widths else self

    @property
    def hashed(self) -> tuple[Any, ...]:
        """What a hash of the data is made of: nothing without columns."""
        return (dict(self.widths), self.rows) if self.widths else ()

    def describe(self, source: str | None) -> list[str]:
        """The columns and their ranges, in a line, if there are any. `source` is the file that they are from."""
        parts = zip(self.widths.items(), np.split(self.rows, np.cumsum([*self.widths.values()]), axis=1), strict=False)
        spans = [f"{name} from {x.min():g} to {x.max():g}" + f" ({w} numbers)" * (w > 1) for (name, w), x in parts]
        return [f"conditions{f' of {source}' if source else ''}: {', '.join(spans)}"] if spans else []


class Scale(NamedTuple):
    """The columns of a run's condition vectors, and how they are scaled to mean 0 and standard deviation 1."""

    widths: Mapping[str, int] = {}
    mean: Sequence[float] = ()
    std: Sequence[float] = ()

    @classmethod
    def of(cls, vectors: Vectors) -> "Scale":
        """The scale of the vectors that are trained on. A number that never changes is only shifted."""
        if not vectors.widths:
            return NO_SCALE
        spread = np.where(np.ptp(vectors.rows, axis=0) > 0, vectors.rows.std(0), 1.0)
        return cls(dict(vectors.widths), vectors.rows.mean(0).tolist(), spread.tolist())

    @property
    def size(self) -> int:
        """The numbers of a vector."""
        return sum(self.widths.values())

    def columns(self, vectors: Tensor) -> dict[str, Tensor]:
        """Vectors (B, size) as columns (B, width) by name."""
        return dict(zip(self.widths, vectors.split([*self.widths.values()], dim=1), strict=True))

    def captions(self, vectors: Tensor) -> list[str]:
        """The numbers of vectors (B, size) by name, in lines, but those of columns of several."""
        numbers = {name: x[:, 0].tolist() for name, x in self.columns(vectors).items() if x.shape[1] == 1}
        rows = zip(*numbers.values(), strict=True)
        return ["\n".join(f"{name} {x:.3g}" for name, x in zip(numbers, row, strict=True)) for row in rows]

    def scaled(self, vectors: Tensor) -> Tensor:
        """Vectors (B, size) as the network is given them."""
        mean, std = torch.tensor([self.mean, self.std], dtype=torch.float64)
        return ((vectors.cpu() - mean) / std).float()  # not every device computes in double precision


NO_VECTORS, NO_SCALE = Vectors(), Scale()


def read_columns(path: Path) -> dict[str, Any]:
    """The columns of a .csv, the arrays of an .npz, or that of a .npy under its name. Raises UsageError if it cannot be
    read."""
    with refusing(lambda reason: f"{path} cannot be read as .csv, .npy or .npz: {reason}"):
        if path.suffix in (".npy", ".npz"):
            loaded: Any = np.load(path, allow_pickle=False)
            arrays = {path.stem: loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
            return {name: np.atleast_1d(array) for name, array in arrays.items()}
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            names, rows = list(reader.fieldnames or ()), list(reader)
    if len({*names, ""}) <= len(names) or not rows:
        raise UsageError(f"{path} must have a row of names, no two alike, and rows of cells: it has {', '.join(names)}")
    if longer := [row for row in rows if None in row]:
        raise UsageError(f"{path} has a row with more cells than columns: {', '.join(map(str, longer[0].values()))}")
    return {name: [row[name] for row in rows] for name in names}


def check_columns(where: str, names: Sequence[str], columns: Collection[str]) -> None:
    """Raise UsageError if one of the columns `names` is missing."""
    if missing := [name for name in names if name not in columns]:
        raise UsageError(f"{where} has no column {missing[0]}: {did_you_mean(missing[0], columns)}")


def conditioned(dataset: Any, config: Any, split: str = "train") -> Any:
    """A data set with the condition vectors that `data.conditions` names, if any.

    Rows of a .csv belong to the images that its column `file_name` names; those of other files without such a column
    are in the order of the images. Raises UsageError if an image has no row, a row has no image, or a value is not a
    finite number.
    """
    if config.conditions is None or dataset.vectors.widths:
        return dataset
    path, names = Path(config.conditions), [*map(dataset.key_of, range(len(dataset)))]
    path = path if path.is_file() else Path(getattr(config, "path", None) or "", path)
    columns, where, is_table = read_columns(path), f"data.conditions {path}", path.suffix == ".csv"
    left_out = {FILES, "label"} if is_table else IMAGES_AND_LABELS if path.suffix == ".npz" else set()
    chosen = config.condition_columns or [name for name in columns if name not in left_out]
    check_columns(where, [*([FILES] if is_table else []), *(chosen or [f"of numbers beside {FILES}"])], columns)
    if FILES in columns:
        table = {str(name).removeprefix("./"): i for i, name in enumerate(columns[FILES])}
        listed = {*names, *map(os.fsdecode, getattr(getattr(dataset, "container", None), "names", ()))}
        if missing := sorted(set(names) - table.keys()) or sorted(table.keys() - listed):
            what = "a row for {}, which is not an image" if missing[0] in table else "no row for {}"
            raise UsageError(f"{where} has {what.format(missing[0])}")
        for name in (FILES, *chosen):
            if len(columns[name]) != len(table):
                raise UsageError(f"{where} has {len(columns[name])} rows of {name}, and names {len(table)} files")
        columns = {name: [columns[name][table[image]] for image in names] for name in chosen}
    elif split != "train":
        raise UsageError(f"{where} has its rows in the order of the training images, and not those of {split}")
    return dataclasses.replace(dataset, vectors=vectors_of({name: columns[name] for name in chosen}, where, names))


def vectors_of(columns: Mapping[str, Any], where: str, names: Sequence[str]) -> Vectors:
    """Condition vectors of columns, each (N,) or (N, width), of images with `names`, sorted by the columns' names.
    Raises UsageError for what is not a finite number, and for a name that has another meaning."""
    parts = dict[str, Rows]()
    for name, values in sorted(columns.items()):
        if name in RESERVED:
            raise UsageError(f"{where}: a condition cannot be called {name}, which means something else: rename it")
        if len(values) != len(names):
            raise UsageError(f"{where}: {name} has {len(values)} rows, and there are {len(names)} images")
        if not _are_numbers(values):
            odd = next((i for i in range(len(values)) if not _are_numbers(values[i : i + 1])), 0)
            what = f"{name} of {names[odd]} is {str(values[odd])[:40]!r}; it must be a finite number"
            raise UsageError(f"{where}: {what} (--data.condition_columns chooses columns)")
        parts[name] = np.asarray(values).astype(np.float64).reshape(len(names), -1)
    return Vectors({name: part.shape[1] for name, part in parts.items()}, np.concatenate([*parts.values()], axis=1))


def _are_numbers(values: Any) -> bool:
    """Whether values are finite as float32, which networks compute in."""
    with suppress(ValueError, TypeError), np.errstate(over="ignore"):  # text, an empty cell, lists of several lengths
        array = np.asarray(values)
        return array.dtype.kind not in "cmM" and bool(array.size and np.isfinite(array.astype(np.float32)).all())
    return False
