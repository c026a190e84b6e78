"""A run's folder: its layout, its lock, and going back to an earlier checkpoint.

runs/x/
    config.yaml                  every setting, resolved
    metrics.jsonl                a line each train.log_every steps
    metrics_superseded.jsonl     lines of steps that were done again, or of a run that began again
    samples/                     grids
    checkpoints/step_00000300/   see `diffusion.run.checkpoint`
    .lock                        held while a process trains there
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion.config.files import load_config, save_config
from diffusion.config.schema import Config
from diffusion.errors import UsageError, one_line
from diffusion.files.atomic import check_no_dangling_link, lock, replace_text, unlock
from diffusion.run import checkpoint

OWN = {"config.yaml": Path.is_file, "metrics.jsonl": Path.is_file, "metrics_superseded.jsonl": Path.is_file,
       "checkpoints": Path.is_dir, "samples": Path.is_dir, ".lock": Path.is_file, "best": Path.is_symlink,
       "report.html": Path.is_file, "data.txt": Path.is_file, "trackers": Path.is_dir}  # fmt: skip


# --- what a path is ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """The run and the checkpoint that a path is or lies in, following links. A checkpoint may lie outside of any
    run."""

    path: Path
    run: Path | None = None
    checkpoint: Path | None = None

    @property
    def is_run(self) -> bool:
        return self.path == self.run


def locate(path: Path) -> Place:
    """Find the innermost run or checkpoint that `path` is or lies in."""
    real = Path(os.path.realpath(path))
    for folder in (real, *real.parents):
        in_run = folder.parent.name == "checkpoints"
        if (folder / "state.json").is_file() or (in_run and re.fullmatch(r"(damaged_|\.)?step_\d+.*", folder.name)):
            return Place(real, folder.parent.parent if in_run else None, folder)
        if is_begun(folder):
            return Place(real, folder)
    return Place(real)


LOCK_TEXT = "process "


def is_begun(out: Path) -> bool:
    """Whether a run was begun in a folder: it has saved a checkpoint, or its lock is marked."""
    if any((folder / "state.json").is_file() for folder in checkpoint.folders(out)):
        return True
    with contextlib.suppress(OSError):
        return (out / ".lock").is_file() and (out / ".lock").read_bytes()[:100].startswith(LOCK_TEXT.encode())
    return False


def settings_of(out: Path) -> list[Path]:
    """The configuration file of the run in `out`, if it is one."""
    if not locate(out).is_run:
        return []
    candidates = [out / "config.yaml", *(folder / "config.yaml" for folder in checkpoint.folders(out))]
    return [path for path in candidates if path.is_file() and path.stat().st_size][:1]  # empty after a power failure


def default_out(config_file: Path) -> Path:
    """The default folder for a configuration file. A run's own file continues that run."""
    place = locate(config_file)
    return place.run if place.run and place.path == place.run / "config.yaml" else Path("runs") / config_file.stem


def check_config_file(file: Path, out: Path | None) -> None:
    """Raise UsageError if `--config` names a run or a checkpoint: this would begin another run, not continue it."""
    place = locate(file)
    if place.is_run:
        raise UsageError(f"--config {file} is a run's folder: continue it with --out {file}")
    if place.checkpoint is not None and (out is None or place.path.is_dir()):
        raise UsageError(f"--config {file} belongs to {_called(place)}: {_ways_on(place)}")


def check_out(out: Path) -> None:
    """Raise UsageError if `--out` lies in a checkpoint or in another run."""
    place = locate(out)
    if place.checkpoint is not None:
        what = "is" if place.path == place.checkpoint else "lies in"
        raise UsageError(f"--out {out} {what} {_called(place)}: {_ways_on(place)}")
    if place.run is not None and not place.is_run and place.path.relative_to(place.run).parts[0] in OWN:
        raise UsageError(f"--out {out} lies in the run {place.run}: continue that with --out {place.run}")


def check_is_run(path: Path) -> None:
    """Raise UsageError if a path lies inside a run or a checkpoint, with the folder to name instead."""
    place = locate(path)
    inside = place.checkpoint or place.run
    if inside is not None and place.path != inside and not checkpoint.is_run_or_checkpoint(path):
        raise UsageError(f"{path} lies in the {'checkpoint' if place.checkpoint else 'run'} {inside}: name that folder")


def check_not_a_runs(out: Path) -> None:
    """Raise UsageError, to be prefixed with the flag and the path, if a run itself writes this file or folder."""
    place = locate(out)
    own = place.checkpoint is not None
    if place.run is not None and not own:
        names = [re.escape(name) for name in OWN if name not in ("samples", "report.html")]
        kept = "|".join([*names, "checkpoints/.*", r"samples/step_\d+\.png"])
        own = bool(re.fullmatch(kept, place.path.relative_to(place.run).as_posix(), re.DOTALL))
    if own:
        raise UsageError(f"is part of what the run {place.run or place.checkpoint} keeps: name another")


def _called(place: Place) -> str:
    run = f" of the run {place.run}" if place.run else ""
    return f"the checkpoint {place.checkpoint.name if place.run and place.checkpoint else place.checkpoint}{run}"


def _ways_on(place: Place) -> str:
    assert place.checkpoint is not None
    new = f"begin another run with its weights with --train.init_from {place.checkpoint} --out NEW"
    if place.run is None:
        return new
    step = re.fullmatch(r"step_(\d+)", place.checkpoint.name)
    back = f"go back to it with --out {place.run} --back_to {int(step[1])}, or " if step else ""
    return f"continue the run with --out {place.run}, {back}{new}"


# --- who may write there ----------------------------------------------------------------------------------------------


class RunFolder:
    """A run's folder, locked for this process.

    It is created if missing. `begin` writes the first files. `close` releases the folder, and removes what was created
    if the run did not begin. Raises UsageError if the folder is in use, cannot be written, or belongs to something
    else. `warn` is called if the file system has no locks.
    """

    def __init__(self, out: Path, warn: Callable[[str], None] = lambda message: None):
        check_out(out)
        self.path, self._ours = out, is_begun(out)
        self._begun = False
        self._made: list[Path] = []
        self._lock: int | None = None
        with _told(out):
            check_no_dangling_link(out)
            _check_ours(out, self._ours)
            self._made = [folder for folder in (out, *out.parents) if not os.path.lexists(folder)]
            try:
                out.mkdir(parents=True, exist_ok=True)
                self._lock = self._acquire(warn)
            except BaseException:
                self.close()
                raise

    def _acquire(self, warn: Callable[[str], None]) -> int:
        path = self.path / ".lock"
        new = not path.exists()
        try:
            descriptor = lock(path, warn)
        except BlockingIOError:
            self._made.clear()
            holder = " ".join(path.read_text().split())[:100]
            held = f" ({holder})" if holder else ""
            raise UsageError(f"--out {self.path} is in use by another process that trains there{held}") from None
        if new:
            self._made.insert(0, path)
        if not os.fstat(descriptor).st_size:
            _sign(descriptor)
        return descriptor

    def begin(self, config: Config, step: int, damaged: Sequence[Path] = ()) -> int:
        """Write the configuration, and move away `damaged` checkpoints and the metrics after `step`.

        Returns the last step of the metrics that were moved away, or 0.
        """
        with _told(self.path):
            assert self._lock is not None
            self._save_config(config)
            for folder in damaged:
                folder.rename(folder.with_name(f"damaged_{folder.name}_{time.time_ns()}"))
            for left in (self.path / "checkpoints").glob(".step_*.tmp"):
                if re.fullmatch(r"\.step_\d+\.tmp", left.name):
                    shutil.rmtree(left, ignore_errors=True)  # left by a kill during a save
            last = _truncate_metrics(self.path, step)
            _sign(self._lock)
        self._begun = True
        return last

    def _save_config(self, config: Config) -> None:
        """Write the configuration, unless the file that is there reads as the same. Raises UsageError if somebody
        else's reads as another."""
        path = self.path / "config.yaml"
        with contextlib.suppress(UsageError):
            if load_config(path) == config:
                return
        if path.exists() and not self._ours:
            raise UsageError(f"--out {self.path} holds a config.yaml with something else in it: name another folder")
        if path.exists() and "#" in path.read_text(errors="replace"):  # somebody's comments
            path.rename(path.with_name(f"config_{time.time_ns()}.yaml"))
        save_config(config, path)

    def close(self) -> None:
        """Release the folder."""
        if not self._begun:
            for path in self._made:  # innermost first; non-empty folders stay
                with contextlib.suppress(OSError):
                    path.rmdir() if path.is_dir() else path.unlink()
        if self._lock is not None:
            unlock(self._lock)
            self._lock = None


@contextmanager
def _told(out: Path) -> Iterator[None]:
    """Turn an OSError in a run's folder into one line."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"--out {out} cannot be written: {one_line(error)}") from None


def _sign(descriptor: int) -> None:
    """Write who holds a run's lock, which also marks the folder as a run."""
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{LOCK_TEXT}{os.getpid()} on {socket.gethostname()}\n".encode(), 0)


def _check_ours(out: Path, begun: bool) -> None:
    """Raise UsageError if a folder has files that are named like a run's but are not."""
    present = [name for name in OWN if os.path.lexists(out / name)]
    for name in present:
        if not OWN[name](out / name):
            raise NotADirectoryError(errno.ENOTDIR, f"its {name} is a link to nowhere, or not what a run has")
        lock_of_a_kill = name == ".lock" and not (out / name).stat().st_size
        if not begun and name != "config.yaml" and not lock_of_a_kill:
            raise UsageError(f"--out {out} holds a {name}, and is not a run: name another folder")


NO_STEP = 10**12
"""The step of a malformed line: later than any."""


def _read_metrics(path: Path) -> list[tuple[int, str]]:
    """The lines of metrics with their steps. An incomplete last line, left by a kill, is dropped."""

    def step(line: str) -> int:
        try:
            found = json.loads(line)["step"]
        except (ValueError, LookupError, TypeError, RecursionError):
            return NO_STEP
        return found if type(found) is int else NO_STEP

    lines = path.read_text(errors="surrogateescape").splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith("\n") or step(line) != NO_STEP]
    return [(step(line), line.rstrip("\n") + "\n") for line in whole]


def _truncate_metrics(out: Path, step: int) -> int:
    """Keep the metrics up to `step`, and move later lines to another file. Returns the last step there was."""
    path = out / "metrics.jsonl"
    lines = _read_metrics(path)
    others = [line for at, line in lines if at > step]
    if others:
        with (out / "metrics_superseded.jsonl").open("a", errors="surrogateescape") as file:
            file.writelines(others)
    replace_text(path, "".join(line for at, line in lines if at <= step))
    return max((at for at, _ in lines if step < at < NO_STEP), default=0)


def append_line(path: Path, values: dict[str, Any]) -> None:
    """Add a line of JSON to a file, or leave the file as it was. A file that was moved away is made anew."""
    whole = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a") as file:
            file.write(json.dumps(values, allow_nan=False) + "\n")
    except OSError:
        with contextlib.suppress(OSError):
            os.truncate(path, whole)
        raise


# --- going back -------------------------------------------------------------------------------------------------------


def go_back(out: Path, step: int) -> Path | None:
    """Let the run in `out` continue from its checkpoint of `step`.

    Later checkpoints and grids are moved into a folder of the run, beside copies of its configuration and metrics:
    that folder is a run of its own. Returns it, or None if there is nothing later. A kill leaves a run that continues,
    and the same call does the rest. Raises UsageError if there is no whole checkpoint of that step.
    """
    if not locate(out).is_run:
        raise UsageError(f"--back_to is {step}, but --out {out} is no run that has saved a checkpoint")
    run = RunFolder(out)
    try:
        folder = checkpoint.checkpoint_folder(out, step)
        if not folder.is_dir():
            steps = ", ".join(str(checkpoint.step_of(path)) for path in reversed(checkpoint.folders(out)))
            raise UsageError(f"--back_to is {step}, and the run {out} has no checkpoint of that step; it has {steps}")
        checkpoint.open_checkpoint(folder)
        checkpoints = [path for path in checkpoint.folders(out) if checkpoint.step_of(path) > step]
        grids = [path for path in (out / "samples").glob("step_*.png")
                 if (match := re.fullmatch(r"step_(\d+)\.png", path.name)) and int(match[1]) > step]  # fmt: skip
        if not checkpoints and not grids and not any(at > step for at, _ in _read_metrics(out / "metrics.jsonl")):
            return None
        with _told(out):
            aside = out / f"after_step_{step:08d}_{time.strftime('%Y%m%d-%H%M%S')}_{os.getpid()}"
            temporary = out / f".{aside.name}.tmp"
            for name in ("checkpoints", "samples"):
                (temporary / name).mkdir(parents=True)
            for name in ("config.yaml", "metrics.jsonl"):
                if (out / name).exists():
                    shutil.copyfile(out / name, temporary / name)
            temporary.rename(aside)
            for path in (*grids, *checkpoints):  # newest first: the run always keeps the older ones
                path.rename(aside / path.parent.name / path.name)
            if (out / "report.html").exists():
                (out / "report.html").rename(aside / "report.html")
            checkpoint.link_best(out)
            lines = _read_metrics(out / "metrics.jsonl")
            replace_text(out / "metrics.jsonl", "".join(line for at, line in lines if at <= step))
        return aside
    finally:
        run.close()
