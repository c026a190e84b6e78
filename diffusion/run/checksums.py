"""Checksums of a checkpoint's files: what is missing or differs from what was written is damage."""

from __future__ import annotations

import hashlib
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from diffusion.errors import UsageError, one_line

SUMS = "SHA256SUMS"
NEEDED = {"config.yaml", "state.json", "model.safetensors", "training.pt"}
MAX_JSON_BYTES = 2**26


class Damaged(UsageError):
    """A file of a checkpoint is missing, or differs from what was written."""


def verify(folder: Path, sums: Mapping[str, str]) -> None:
    """Raise Damaged, with the file's name, if one is missing or differs from what was written, and UsageError if it
    cannot be read."""
    for name, wanted in sums.items():
        with reading(folder / name):
            found = sha256(folder / name)
        if found != wanted:
            hint = " (settings are changed on the command line)" if name == "config.yaml" else ""
            raise damaged(folder / name, f"it is not what was written there{hint}")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Read a regular file. A missing one is damage; one that cannot be read is not."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise damaged(path, "it is no file")
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise damaged(path, "") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {one_line(error)}; nothing was changed") from None


def read_sums(folder: Path) -> dict[str, str]:
    """The checksums by file name; none if their file is missing. Raises Damaged if the file is malformed."""
    path = folder / SUMS
    if not path.exists():
        return {}
    with reading(path):
        text = path.read_bytes()[:MAX_JSON_BYTES]
    try:
        sums = {name: wanted for wanted, name in (line.split("  ", 1) for line in text.decode().splitlines())}
    except ValueError as error:
        raise damaged(path, one_line(error)) from None
    if not sums.keys() >= NEEDED or not all(re.fullmatch(r"\w[\w.-]*", name) for name in sums):
        raise damaged(path, "it does not name every file, or names others")
    return sums


def damaged(path: Path, reason: str) -> Damaged:
    state = "is damaged" if path.exists() else "is missing"
    return Damaged(f"checkpoint {path.parent} is not whole: {path.name} {state}{f': {reason}' if reason else ''}")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
