"""A run's folder: what marks it, its layout, and its lock.

runs/x/
    run.json                     marks the folder as a run, and is locked while a process trains there
    config.yaml                  every setting, resolved
    metrics.jsonl                a line each train.log_every steps
    metrics_superseded.jsonl     lines of steps that were done again, or of a run that began again
    scores.jsonl                 a line for each metric and checkpoint that was evaluated
    samples/                     grids
    checkpoints/step_00000300/   see `diffusion.run.checkpoint`
    best                         a link to the checkpoint with the lowest loss of held-out images

A path is a run if it holds run.json, a checkpoint if it holds state.json, and else neither.
"""

import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from diffusion.config.files import load_config, save_config
from diffusion.config.schema import Config
from diffusion.errors import UsageError, refusing
from diffusion.files.atomic import lock, replace_text, unlock
from diffusion.run.checkpoint import FORMAT, STATE

MARK, SCORES = "run.json", "scores.jsonl"
OWN = "config.yaml", "metrics.jsonl", "scores.jsonl", "samples", "checkpoints", "best", "report.html", "trackers"
"""What a run writes first beside its mark."""


def is_run(path: Path) -> bool:
    """Whether a path is a run's folder."""
    return (path / MARK).is_file()


def is_checkpoint(path: Path) -> bool:
    """Whether a path is a checkpoint's folder."""
    return (path / STATE).is_file()


def run_of(checkpoint: Path) -> Path | None:
    """The run that a checkpoint belongs to, if any."""
    run = checkpoint.parent.parent
    return run if checkpoint.parent.name == "checkpoints" and is_run(run) else None


def check_is_run(path: Path) -> None:
    """Raise UsageError if a path is neither a run nor a checkpoint, with the one that it lies in, if any."""
    if not path.exists():
        raise UsageError(f"{path} does not exist")
    if not is_run(path) and not is_checkpoint(path):
        around = [folder for folder in path.resolve().parents if is_run(folder) or is_checkpoint(folder)]
        hint = f": name {around[0]}" if around else f" (it holds no {MARK})"
        raise UsageError(f"{path} is not a run or a checkpoint{hint}")


def settings_of(out: Path) -> list[Path]:
    """The configuration file of the run in `out`, if it is one."""
    file = out / "config.yaml"
    return [file] if is_run(out) and file.exists() else []


def default_out(config_file: Path) -> Path:
    """The default folder for a configuration file. A run's own file continues that run."""
    if config_file.name == "config.yaml":
        if is_run(config_file.parent):
            return config_file.parent
        raise UsageError(f"--config is {config_file}: add --out with a folder for the run")
    return Path("runs") / config_file.stem


class RunFolder:
    """A run's folder, locked for this process.

    It is created if missing. `begin` writes the first files. `close` releases the folder, and removes what was created
    if the run did not begin. Raises UsageError if the folder is in use, cannot be written, or belongs to something
    else. `warn` is called if the file system has no locks.
    """

    def __init__(self, out: Path, warn: Callable[[str], None] = lambda message: None):
        if is_checkpoint(out):
            hint = f"name {out.parent.parent}, or --train.init_from {out} --out NEW"
            raise UsageError(f"--out {out} is a checkpoint: {hint}")
        real = out.resolve()
        if inside := [run for run in real.parents if is_run(run) and real.relative_to(run).parts[0] in OWN]:
            raise UsageError(f"--out {out} lies in a run: name {inside[0]} to continue it, or a folder outside it")
        if is_run(out) and _read_mark(out) is None:
            raise UsageError(f"--out {out} holds a {MARK} of something else: name another folder")
        self.path, self._begun, self._is_new = out, False, not is_run(out)
        present = [name for name in OWN if os.path.lexists(out / name)] if self._is_new else []
        if present and present != ["config.yaml"]:
            raise UsageError(f"--out {out} holds {present[-1]} and is not a run (no {MARK}): name another folder")
        self._made = [folder for folder in (out / MARK, out, *out.parents) if not os.path.lexists(folder)]
        self._lock: int | None = None
        with refusing(lambda reason: f"--out {out} cannot be written: {reason}", OSError):
            try:
                out.mkdir(parents=True, exist_ok=True)
                self._lock = lock(out / MARK, warn)
            except BlockingIOError:
                raise UsageError(f"--out {out} is in use by {_holder(out)}") from None
            except OSError:
                self.close()
                raise
        if self._is_new:
            self.describe()

    def describe(self, about: Sequence[str] | None = None) -> None:
        """Write what the run is into its mark, with lines about it for its page (None: those that it has)."""
        assert self._lock is not None
        mark = _mark(about_run(self.path) if about is None else about, process=os.getpid(), host=socket.gethostname())
        with suppress(OSError):  # a full disk is reported where a checkpoint is written
            os.pwrite(self._lock, mark, 0)  # in place, since the lock is on this file
            os.ftruncate(self._lock, len(mark))

    def begin(self, config: Config, step: int, damaged: Sequence[Path] = ()) -> int:
        """Write the configuration, and move away `damaged` checkpoints and the metrics after `step`.

        Returns the last step of the metrics that were moved away, or 0.
        """
        with refusing(lambda reason: f"--out {self.path} cannot be written: {reason}", OSError):
            self.describe()
            self._save_config(config)
            for folder in damaged:
                folder.rename(folder.with_name(f"damaged_{folder.name}_{time.time_ns()}"))
            for left in (self.path / "checkpoints").glob(".step_[0-9]*.tmp"):
                shutil.rmtree(left, ignore_errors=True)  # left by a kill during a save
            last = _truncate_metrics(self.path, step)
        self._begun = True
        return last

    def _save_config(self, config: Config) -> None:
        """Write the configuration, unless the file that is there reads as the same: it may have comments. Raises
        UsageError if somebody else's reads as another."""
        path = self.path / "config.yaml"
        somebodys = path.exists()
        with suppress(UsageError):
            if load_config(path) == config:
                return
            somebodys = "#" in path.read_text(errors="replace")  # a comment
        if path.exists() and self._is_new:
            raise UsageError(f"--out {self.path} holds a config.yaml with something else in it: name another folder")
        if somebodys:
            path.rename(path.with_name(f"config_{time.time_ns()}.yaml"))
        save_config(config, path)

    def close(self) -> None:
        """Release the folder."""
        if not self._begun:
            for path in self._made:  # innermost first; non-empty folders stay
                with suppress(OSError):
                    path.rmdir() if path.is_dir() else path.unlink()
        if self._lock is not None:
            unlock(self._lock)
            self._lock = None


def mark_run(out: Path, about: Sequence[str]) -> None:
    """Make a folder a run that no process trains, such as a converted model."""
    (out / MARK).write_bytes(_mark(about))


def _mark(about: Sequence[str], **holder: Any) -> bytes:
    return f"{json.dumps({**holder, 'format': FORMAT, 'about': about}, indent=1)}\n".encode()


def _read_mark(out: Path) -> dict[str, Any] | None:
    """What the mark of a run says: nothing if it is damaged, and None if another program wrote it."""
    try:
        mark = json.loads((out / MARK).read_text(errors="replace"))
    except (OSError, ValueError):
        return {}
    return mark if isinstance(mark, dict) and "about" in mark else None


def _holder(out: Path) -> str:
    """Who trains in a run, in words."""
    mark = _read_mark(out) or {}
    process, host = mark.get("process"), mark.get("host")
    if (process, host) == (os.getpid(), socket.gethostname()):
        return "this process: close() its other trainer first"
    return "another process that trains there" + (f": {process} on {host}" if process else "")


def about_run(out: Path) -> list[str]:
    """The lines about a run in its mark."""
    about = (_read_mark(out) or {}).get("about")
    return list(map(str, about)) if isinstance(about, list) else []


def _truncate_metrics(out: Path, step: int) -> int:
    """Move lines after `step`, and what a kill left of a line, to another file. Returns the last step moved, or 0."""
    path, kept, moved, last = out / "metrics.jsonl", list[str](), list[str](), 0
    for line in path.read_text(errors="surrogateescape").splitlines() if path.exists() else ():
        match = re.fullmatch(r'\{"step": (\d+)\b.*\}', line)
        (kept if match and int(match[1]) <= step else moved).append(f"{line}\n")
        last = max(last, int(match[1])) if match else last
    if moved:
        with (out / "metrics_superseded.jsonl").open("a", errors="surrogateescape") as file:
            file.writelines(moved)
    replace_text(path, "".join(kept))
    return last if last > step else 0


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of JSON objects, as far as they can be read."""
    lines = []
    for line in path.read_text(errors="replace").splitlines():
        with suppress(ValueError, RecursionError):  # a kill or a full disk cuts a line off
            lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict)]


def newest_scores(run: Path) -> list[dict[str, Any]]:
    """The newest scores of a run by each metric of each of its weights, on each part of the data, the newest first."""
    newest, lines = dict[Any, dict[str, Any]](), list[dict[str, Any]]()
    with suppress(OSError):  # there are none, or they are not ours to read
        lines = read_lines(run / SCORES)
    for line in reversed(lines):
        newest.setdefault((line.get("metric"), line.get("weights"), line.get("settings", {}).get("split")), line)
    return list(newest.values())


def append_line(path: Path, values: dict[str, Any]) -> None:
    """Add a line of JSON to a file, or leave the file as it was. A file that was moved away is made anew."""
    whole = path.stat().st_size if path.exists() else 0
    try:
        with path.open("ab+") as file:
            file.seek(max(0, whole - 1))
            cut_off = file.read() not in (b"", b"\n")  # by a kill
            file.write(b"\n" * cut_off + json.dumps(values, allow_nan=False).encode() + b"\n")
    except OSError:
        with suppress(OSError):
            os.truncate(path, whole)
        raise
