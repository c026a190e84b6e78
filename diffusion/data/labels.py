"""The classes of image files: from folders, from names, or from a file that lists them."""

import csv
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from diffusion.data.base import Labels
from diffusion.errors import UsageError, refusing

Classes = tuple[Labels, tuple[str, ...], str]
"""A label for each file, the classes' names, and why there are none, if so."""
Pairs = Sequence[tuple[str, Any]]
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "eval", "dev"}


def from_folders(names: Sequence[str], path: str) -> Classes:
    """Classes are the first level of folders.

    Folders around all others are passed over, and so is the only part of a data set (train). Raises UsageError for
    several parts (train, val): which of them is meant is not known.
    """
    folders, level = [name.split("/")[:-1] for name in names], 0
    while True:
        first = {"".join(folder[level : level + 1]) for folder in folders}
        splits = all(name.lower() in SPLITS for name in first)
        if splits and len(first) > 1:
            hint = f"name one, --data.path {path}/{min(first)}, or use all with --data.labels none"
            raise UsageError(f"data.path {path} holds the parts {', '.join(sorted(first))} of a data set: {hint}")
        if len(first) > 1 or "" in first or not (splits or all(len(folder) > level + 1 for folder in folders)):
            break
        level += 1
    if "" in first:
        stray = next(name for name, folder in zip(names, folders, strict=True) if len(folder) == level)
        beside = f", beside the folder {min(first - {''})}" if len(first) > 1 else ""
        return no_classes(len(names), f"{stray} lies in no class folder{beside}")
    return _numbered([folder[level] for folder in folders])


def from_prefix(names: Sequence[str], path: str) -> Classes:
    """Classes are what precedes the first "_" of a file's name, as in the published code. Raises UsageError."""
    prefixes = [name.rpartition("/")[2].partition("_") for name in names]
    if bad := [base for base, underscore, _ in prefixes if not underscore]:
        raise UsageError(f"data.labels is prefix, and {bad[0]} in data.path {path} has no _ after a class")
    return _numbered([prefix for prefix, _, _ in prefixes])


def no_classes(count: int, reason: str) -> Classes:
    return np.zeros(count, np.int64), (), reason


def unlabelled(names: Sequence[str], path: str) -> Classes:
    """No classes, whatever the names are."""
    return no_classes(len(names), "data.labels is none")


LABELS: dict[str, Callable[..., Classes]] = {"folders": from_folders, "prefix": from_prefix, "none": unlabelled}


def from_list(names: Sequence[str], file: str, listed: str | Pairs, unused: Sequence[str] = ()) -> Classes:
    """Labels that are listed for each name: in the text of a `dataset.json` as NVIDIA's tools write it, or of a CSV
    with the columns file_name, relative to the data's root, and label; or as pairs.

    Raises UsageError if an image has no label, or if a label has no image and is not for one of `unused`.
    """
    with refusing(lambda reason: f"data.labels {file} is not a list of files and labels ({reason})"):
        pairs = _parsed(file, listed) if isinstance(listed, str) else listed
        if pairs is None:
            return no_classes(len(names), f"{file} has none")
        table = {name.removeprefix("./"): label for name, label in pairs}
        if len(table) < len(pairs) or {type(label) for label in table.values()} not in ({int}, {str}):
            raise ValueError("a file is listed twice, or labels are not all whole numbers or all words")
        if bad := [name for name, label in table.items() if label == "" or str(label).startswith("-")]:
            raise ValueError(f"the label of {bad[0]} is empty or negative")
    if missing := sorted(set(names) - table.keys()):
        raise UsageError(f"data.labels {file} has no label for {missing[0]}")
    if extra := sorted(table.keys() - set(names) - set(unused)):
        raise UsageError(f"data.labels {file} has a label for {extra[0]}, which is not an image")
    return _numbered([table[name] for name in names])


def _parsed(file: str, text: str) -> Pairs | None:
    """The files and labels of a JSON or CSV file. None if it says that there are none."""
    if file.lower().endswith(".json"):
        listed = json.loads(text)["labels"]
        return listed and [(str(name), label) for name, label in listed]
    rows = csv.DictReader(text.splitlines())
    columns = rows.fieldnames or ()
    if not {"file_name", "label"} <= set(columns):
        raise ValueError(f"it has the columns {', '.join(columns)}, and needs file_name and label")
    return [(row["file_name"], number(row["label"] or "")) for row in rows]


def number(text: str) -> int | str:
    """A label as a number, if that reads the same: 01 is a name."""
    return int(text) if text.isascii() and text.isdecimal() and str(int(text)) == text else text


def _numbered(values: Sequence[Any]) -> Classes:
    """Classes from names or numbers, sorted."""
    classes = sorted(set(values))
    index = {name: i for i, name in enumerate(classes)}
    return np.array([index[value] for value in values], dtype=np.int64), tuple(map(str, classes)), ""
