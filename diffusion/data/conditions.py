"""Conditions beside classes: vectors of numbers and condition images, from files to what a network is given."""

import csv
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion.errors import UsageError, check_name, one_line, prefixed

Rows = NDArray[np.float32]
IMAGES_AND_LABELS = {"arr_0", "images", "x", "arr_1", "labels", "y"}
"""The arrays of an .npz that are no conditions."""


class Vectors(NamedTuple):
    """A condition vector for each image: columns of numbers, side by side."""

    widths: Mapping[str, int] = MappingProxyType({})
    """of each column, by its name"""
    rows: Rows = np.zeros((0, 0), np.float32)
    """(N, sum of the widths); of no columns (0, 0)"""

    def at(self, indices: Sequence[int] | NDArray[np.int64]) -> Rows:
        """The rows at `indices`, (B, sum of the widths)."""
        return self.rows[np.asarray(indices, np.int64)] if self.widths else np.zeros((len(indices), 0), np.float32)

    def select(self, indices: NDArray[np.int64]) -> "Vectors":
        return Vectors(self.widths, self.at(indices)) if self.widths else self

    @property
    def parts(self) -> tuple[Any, ...]:
        """What a hash of the data is made of."""
        return (dict(self.widths), self.rows) if self.widths else ()


NO_VECTORS = Vectors()


class Scale(NamedTuple):
    """The columns of a run's condition vectors, and how they are scaled to mean 0 and standard deviation 1."""

    widths: Mapping[str, int] = MappingProxyType({})
    mean: Sequence[float] = ()
    std: Sequence[float] = ()

    @classmethod
    def of(cls, vectors: Vectors) -> "Scale":
        """The scale of the vectors that are trained on. A number that never changes is only shifted."""
        rows = vectors.rows.astype(np.float64)
        spread = rows.std(0) if vectors.widths else np.zeros(0)
        spread[spread <= 1e-6 * np.abs(rows).max(0, initial=0)] = 1.0
        return cls(vectors.widths, rows.mean(0).tolist() if vectors.widths else [], spread.tolist())

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return self._asdict() | {"widths": dict(self.widths)}

    @property
    def size(self) -> int:
        """The numbers of a vector."""
        return sum(self.widths.values())

    def scaled(self, vectors: Tensor) -> Tensor:
        """Vectors (B, size) as the network is given them."""
        mean, std = (torch.tensor(values, dtype=torch.float64) for values in (self.mean, self.std))
        return ((vectors.double() - mean.to(vectors.device)) / std.to(vectors.device)).float()


NO_SCALE = Scale()


def vectors_of(columns: Mapping[str, Any], count: int, where: str, name_of: Callable[[int], str] = str) -> Vectors:
    """Condition vectors of columns, each (count,) or (count, width). Raises UsageError for what is not a finite
    number."""
    widths, parts = dict[str, int](), list[Rows]()
    for name, values in columns.items():
        try:
            numbers = np.asarray(values).astype(np.float32).reshape(len(values), -1)
        except (ValueError, TypeError):  # text, an empty cell, or lists of several lengths
            odd = next((i for i, value in enumerate(values) if not _is_numbers(value)), 0)
            what = f"{name} of {name_of(odd)} is {str(values[odd])[:40]!r}; it must be a finite number"
            raise UsageError(f"{where}: {what}, or leave the column out with --data.condition_columns") from None
        if len(numbers) != count or not numbers.size:
            raise UsageError(f"{where}: {name} has {len(numbers)} rows, and there are {count} images")
        if not np.isfinite(numbers).all():
            odd = int(np.flatnonzero(~np.isfinite(numbers).all(1))[0])
            raise UsageError(f"{where}: {name} of {name_of(odd)} is not a finite number")
        widths[name], parts = numbers.shape[1], [*parts, numbers]
    return Vectors(widths, np.concatenate(parts, axis=1))


def _is_numbers(value: Any) -> bool:
    try:
        np.asarray(value).astype(np.float32)
        return True
    except (ValueError, TypeError):
        return False


def read_vectors(path: Path, columns: Sequence[str], names: Sequence[str], others: Sequence[str] = ()) -> Vectors:
    """Condition vectors from a .csv with file_name and columns of numbers, or from a .npy or .npz whose rows are in the
    order of the images.

    Args:
        columns: those to take; none: all.
        names: the images', in order.
        others: files beside them that may be listed, too.

    Raises UsageError if an image has no row, a row has no image, or something is not a finite number.
    """
    where = f"data.conditions {path}"
    if not path.is_file() or path.suffix not in (".csv", ".npy", ".npz"):
        raise UsageError(f"{where} is not {'a .csv, .npy or .npz' if path.exists() else 'there'}")
    if path.suffix == ".csv":
        return _from_csv(path, columns, names, others)
    with prefixed("data.conditions: "):
        arrays = read_arrays(path)
    wanted = columns or [name for name in arrays if name not in IMAGES_AND_LABELS]
    for name in wanted:
        check_name("data.condition_columns", name, list(arrays))
    if not wanted:
        raise UsageError(f"{where} holds no arrays but images and labels")
    return vectors_of({name: arrays[name] for name in wanted}, len(names), where, lambda i: names[i])


def read_arrays(path: Path) -> dict[str, Any]:
    """The arrays of a .npy, under its name, or of a .npz. Raises UsageError if it cannot be read."""
    try:
        loaded: Any = np.load(path, allow_pickle=False)
        return {path.stem: loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
    except Exception as error:  # numpy raises OSError, ValueError, BadZipFile, ...
        raise UsageError(f"{path} cannot be read: {one_line(error)}") from None


def read_table(path: Path, needed: Sequence[str]) -> dict[str, list[str]]:
    """The columns of a .csv. Raises UsageError if it cannot be read, or lacks one that is `needed`."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.reader(file, strict=True))
    except (OSError, ValueError, csv.Error) as error:
        raise UsageError(f"{path} cannot be read: {one_line(error)}") from None
    names, rows = rows[0] if rows else [], [row for row in rows[1:] if row]
    if missing := set(needed) - set(names):
        raise UsageError(f"{path} has the columns {', '.join(names)}, and no {min(missing)}")
    if odd := [row for row in rows if len(row) != len(names)]:
        raise UsageError(f"{path} has a row of {len(odd[0])} cells for {len(names)} columns: {','.join(odd[0])[:40]}")
    return {name: [row[i] for row in rows] for i, name in enumerate(names)}


def _from_csv(path: Path, columns: Sequence[str], names: Sequence[str], others: Sequence[str]) -> Vectors:
    where = f"data.conditions {path}"
    with prefixed("data.conditions: "):
        listed = read_table(path, ["file_name"])
    files = [name.removeprefix("./") for name in listed.pop("file_name")]
    listed.pop("label", None)
    if not listed:
        raise UsageError(f"{where} has no column of numbers beside file_name")
    for name in columns:
        check_name("data.condition_columns", name, list(listed))
    table = {name: i for i, name in enumerate(files)}
    if len(table) < len(files):
        raise UsageError(f"{where} lists {Counter(files).most_common(1)[0][0]} twice")
    if missing := [name for name in names if name not in table]:
        raise UsageError(f"{where} has no row for {missing[0]}")
    if extra := sorted(table.keys() - set(names) - set(others)):
        raise UsageError(f"{where} has a row for {extra[0]}, which is not an image")
    chosen = {name: [listed[name][table[image]] for image in names] for name in columns or listed}
    return vectors_of(chosen, len(names), where, lambda i: names[i])


def describe_vectors(vectors: Vectors) -> list[str]:
    """The columns and their ranges, in a line."""
    texts, start = list[str](), 0
    for name, width in vectors.widths.items():
        values = vectors.rows[:, start : start + width]
        wide = f" ({width} numbers)" if width > 1 else ""
        texts, start = [*texts, f"{name}{wide} from {values.min():g} to {values.max():g}"], start + width
    return [f"conditions: {', '.join(texts)}"] if texts else []
