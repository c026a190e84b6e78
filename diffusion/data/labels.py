"""The classes of image files: from folders, from names, or from a file that lists them."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from diffusion.data.base import Labels
from diffusion.errors import UsageError, one_line

Classes = tuple[Labels, tuple[str, ...], str]
"""A label for each file, the classes' names, and why there are none, if so."""
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "eval", "dev"}


def from_folders(names: Sequence[str], where: str) -> Classes:
    """Classes are the first level of folders.

    Folders around all others are passed over, and so is the only part of a data set (train). Several parts (train, val)
    are refused: which of them is meant is not known. Raises UsageError.
    """
    folders = [name.rpartition("/")[0] for name in names]
    paths = {folder: folder.split("/") if folder else [] for folder in dict.fromkeys(folders)}
    level = 0
    while True:
        first = {path[level] if len(path) > level else "" for path in paths.values()}
        parts = all(name.lower() in SPLITS for name in first)
        if parts and len(first) > 1:
            raise UsageError(f"data.path {where} holds the parts {', '.join(sorted(first))} of a data set: name one, "
                             f"--data.path {where}/{min(first)}, or use all with --data.labels none")  # fmt: skip
        if len(first) > 1 or "" in first or not (parts or all(len(path) > level + 1 for path in paths.values())):
            break
        level += 1
    if "" in first:
        stray = next(name for name, folder in zip(names, folders, strict=True) if len(paths[folder]) == level)
        beside = f", beside the folder {min(first - {''})}" if len(first) > 1 else ""
        return np.zeros(len(names), np.int64), (), f"{stray} lies in no class folder{beside}"
    return _numbered([paths[folder][level] for folder in folders])


def from_prefix(names: Sequence[str], where: str) -> Classes:
    """Classes are what stands before the first "_" of a file's name, as in the published code."""
    bases = [name.rpartition("/")[2] for name in names]
    bad = next((base for base in bases if "_" not in base), None)
    if bad is not None:
        raise UsageError(f"data.labels is prefix, and {bad} in data.path {where} has no _ after a class")
    return _numbered([base.split("_")[0] for base in bases])


def no_labels(names: Sequence[str], where: str) -> Classes:
    return np.zeros(len(names), np.int64), (), "data.labels is none"


LABELS: dict[str, Callable[[Sequence[str], str], Classes]] = {
    "folders": from_folders, "prefix": from_prefix, "none": no_labels,
}  # fmt: skip


def from_file(
    names: Sequence[str], file: str, content: bytes | Sequence[tuple[str, Any]], left_out: Sequence[str] = ()
) -> Classes:
    """Labels listed in a file: `dataset.json` as NVIDIA's tools write it, or a CSV with the columns file_name, relative
    to the data's root, and label; or as pairs. Raises UsageError if an image has no label, or a label no image. Images
    that are left out may have labels."""
    try:
        if not isinstance(content, bytes):
            pairs = list(content)
        elif file.lower().endswith(".json"):
            found = json.loads(content)["labels"]
            if found is None:
                return *no_labels(names, "")[:2], f"{file} has none"
            pairs = [(str(name), label) for name, label in found]
        else:
            rows = csv.DictReader(content.decode("utf-8-sig").splitlines())
            columns = rows.fieldnames or ()
            if not {"file_name", "label"} <= set(columns):
                raise ValueError(f"it has the columns {', '.join(columns)}, and needs file_name and label")
            pairs = [(row["file_name"], number(row["label"] or "")) for row in rows]
        table = {name.removeprefix("./"): label for name, label in pairs}
        if len(table) < len(pairs) or {type(label) for label in table.values()} not in ({int}, {str}):
            raise ValueError("a file stands there twice, or labels are not all whole numbers or all words")
        bad = next((name for name, label in table.items() if label == "" or str(label).startswith("-")), None)
        if bad is not None:
            raise ValueError(f"the label of {bad} is empty or negative")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, csv.Error) as error:
        raise UsageError(f"data.labels {file} is no list of files and labels ({one_line(error)})") from None
    missing, gone = sorted(set(names) - table.keys()), sorted(table.keys() - set(names) - set(left_out))
    if missing or gone:
        raise UsageError(f"data.labels {file} " + (f"has no label for {missing[0]}" if missing else
                                                   f"has a label for {gone[0]}, which is no image there"))  # fmt: skip
    return _numbered([table[name] for name in names])


def number(text: str) -> int | str:
    """A label as a number, if that says the same: 01 is a name."""
    return int(text) if text.isascii() and text.isdecimal() and str(int(text)) == text else text


def _numbered(values: Sequence[Any]) -> Classes:
    """Classes from names or numbers, sorted."""
    classes = sorted(set(values))
    number = {name: i for i, name in enumerate(classes)}
    return np.array([number[value] for value in values], dtype=np.int64), tuple(map(str, classes)), ""
