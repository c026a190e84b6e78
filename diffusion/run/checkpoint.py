"""Checkpoints: a self-contained folder, written atomically. Nothing in it is pickled.

step_00001500/
    state.json             marks the folder: format, step, class names, origin of the weights, environment
    config.yaml            the resolved configuration
    model.safetensors      the weights in training
    ema_0.999.safetensors  a moving average, one file each (none at step 0, whose averages are the weights)
    training.safetensors   the state of the optimizer and of all else that a resumed run needs
    SHA256SUMS             a checksum of each of them, as `sha256sum --check` reads them
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from torch import Tensor, nn

from diffusion.config.files import load_config, save_config
from diffusion.config.schema import Config
from diffusion.data.conditions import NO_SCALE, Scale
from diffusion.ema import LONGEST, reconstruct
from diffusion.errors import UsageError, name_some, one_line, prefixed
from diffusion.files.atomic import sha256, to_disk

FORMAT = 7
STATE, SUMS = "state.json", "SHA256SUMS"
NAME = re.compile(r"step_[0-9]{8,}")
Weights = Mapping[str, Tensor]
T = TypeVar("T")


class Damaged(UsageError):
    """A file of a checkpoint is missing, or differs from what was written."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, whose small files have been read and verified. Others are verified as they are read."""

    path: Path
    step: int
    config: Config
    class_names: tuple[str, ...]
    vectors: Scale = NO_SCALE
    """The columns of the condition vectors, and how they are scaled."""
    data: str | None = None
    """A hash of its training data."""
    origin: dict[str, Any] | None = None
    """The source of the run's first weights: path, step, file and its SHA-256."""
    environment: Mapping[str, Any] = field(default_factory=dict)
    """What rounding depends on: device, processes, threads, version of torch, kind of processor."""
    numbers: Mapping[str, Any] = field(default_factory=dict)
    """What a resumed run needs beside tensors."""
    sums: Mapping[str, str] = field(default_factory=dict)
    """The SHA-256 of each file."""
    passed_over: tuple[tuple[Path, str], ...] = ()
    """Newer checkpoints of the run that are damaged, each with the reason."""

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors in a file. It is read into memory and then verified, since it may be overwritten meanwhile."""
        return safetensors.torch.load(_read(self.path / name, self.sums))

    def files(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of every file."""
        return {name: self.tensors(name) for name in self.sums if name.endswith(".safetensors")}

    def weights(self, wanted: str | None = None) -> dict[str, Tensor]:
        """The weights that `--ema` selects: a moving average by its name, "none" for the weights in training, None for
        the run's first average, or "length0.07" for one that is reconstructed from those in the run's checkpoints.

        Raises UsageError if the run does not have it."""
        chosen = self.chosen(wanted)
        if not isinstance(chosen, float):
            return self.tensors(chosen)
        try:
            return self._reconstructed(chosen)
        except Damaged as error:  # perhaps an earlier one: this one is not to be passed over
            raise UsageError(f"--ema is {wanted}, which is made of all checkpoints: {error}") from None

    def fingerprint(self, wanted: str | None = None) -> str:
        """A hash of the weights that `--ema` selects."""
        chosen = self.chosen(wanted)
        if isinstance(chosen, float):
            return f"length{chosen} of {self.sums[f'ema_length{self.config.train.ema_lengths[0]}.safetensors']}"
        return self.sums[chosen]

    def chosen(self, wanted: str | None = None) -> str | float:
        """The file of the weights that `--ema` selects, or the length of an average that is in none. Raises UsageError
        if the run does not have it."""
        names, lengths = [str(key) for key in self.config.train.averages], self.config.train.ema_lengths
        if wanted == "none" or (self.step == 0 and wanted in (None, *names)):
            return "model.safetensors"
        if wanted is None or wanted in names:
            return f"ema_{wanted or names[0]}.safetensors"
        length = re.fullmatch(r"length(0?\.\d+)", wanted)
        if self.step and lengths and length and 0 < float(length[1]) <= LONGEST:  # 0.10 is 0.1
            return f"ema_length{float(length[1])}.safetensors" if float(length[1]) in lengths else float(length[1])
        others = f", a length from length0.01 to length{LONGEST}" if self.step and lengths else ""
        raise UsageError(f"--ema is {wanted}; {self.path} has {', '.join(names)}{others}, or none")

    def name_of(self, wanted: str | None = None) -> str:
        """The weights that `--ema` selects, as it calls them."""
        name = f"{self.chosen(wanted)}".removesuffix(".safetensors").removeprefix("ema_")
        return "none" if name == "model" else wanted or name

    def _reconstructed(self, length: float) -> dict[str, Tensor]:
        """The power-function average of a length, from all that the run has stored up to this checkpoint."""
        lengths = self.config.train.ema_lengths
        earlier = folders(self.path.parent.parent) if self.path.parent.name == "checkpoints" else [self.path]
        saved = [open_folder(path) for path in earlier if path == self.path or 0 < step_of(path) <= self.step]
        parts = [(checkpoint, of) for checkpoint in saved for of in lengths]
        coefficients, error = reconstruct([(of, checkpoint.step) for checkpoint, of in parts], length, self.step)
        if error > 0.1:
            steps = ", ".join(str(checkpoint.step) for checkpoint in saved)
            stored = f"the averages of lengths {', '.join(map(str, lengths))} after steps {steps}"
            raise UsageError(f"--ema is length{length}; {stored} express it with an error of {error:.0%}, above 10%")
        total: dict[str, Tensor] = {}
        for coefficient, (checkpoint, of) in zip(coefficients.tolist(), parts, strict=True):
            for name, value in checkpoint.tensors(f"ema_length{of}.safetensors").items():
                total[name] = total.get(name, 0) + coefficient * value.double()
        return {name: value.float() for name, value in total.items()}

    def network(self, weights: Weights) -> nn.Module:
        """The network with `weights`. Raises UsageError if they are of another architecture."""
        with torch.device("meta"):  # nothing is allocated or drawn before the sizes are checked
            model = self.config.network(len(self.class_names), self.vectors.size)
        check_fits(model, weights, self.path)
        model.load_state_dict(weights, assign=True)
        return model


def save(
    folder: Path, step: int, config: Config, class_names: tuple[str, ...], weights: Weights,
    averages: Mapping[float | str, Weights], training: Mapping[str, Any], **about: Any,
) -> None:  # fmt: skip
    """Write a checkpoint atomically: into a temporary folder, which is renamed once all is on disk.

    Args:
        folder: of the checkpoint; the run's own folder must exist.
        training: nested mappings of tensors, numbers and strings: what a resumed run needs beside weights and averages.
        about: vectors, data, origin and environment (see `Checkpoint`), and held_out_loss.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    flat = dict(flatten(training))
    tensors = {name: value for name, value in flat.items() if isinstance(value, Tensor)}
    numbers = {name: value for name, value in flat.items() if name not in tensors}
    absent: dict[str, Any] = {"data": None, "origin": None, "environment": {}, "held_out_loss": None}
    state = {"format": FORMAT, "step": step, "class_names": class_names, **absent, **about, "numbers": numbers}
    try:
        folder.parent.mkdir(exist_ok=True)  # not the run's own: a run that was moved away must not be begun again
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        (temporary / STATE).write_text(json.dumps(state, indent=1))
        save_config(config, temporary / "config.yaml")
        files = {"model": weights, **{f"ema_{key}": average for key, average in averages.items()}, "training": tensors}
        for name, content in files.items():
            on_cpu = {key: value.detach().cpu().contiguous().clone() for key, value in content.items()}
            safetensors.torch.save_file(on_cpu, temporary / f"{name}.safetensors")
        (temporary / SUMS).write_text("".join(f"{sha256(path)}  {path.name}\n" for path in sorted(temporary.iterdir())))
        for path in temporary.iterdir():
            shutil.copymode(temporary / STATE, path)  # safetensors creates files that the group cannot read
            to_disk(path)
        to_disk(temporary)
    except Exception:
        shutil.rmtree(temporary, ignore_errors=True)  # on a full disk, the space is needed
        raise
    temporary.rename(folder)
    to_disk(folder.parent)


def flatten(state: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings by their path, such as "step/optimizer/3/exp_avg"."""
    for name, value in state.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The nested mappings of `flatten`, whose keys are strings; empty ones are missing."""
    state: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, name = path.split("/")
        reduce(lambda inner, parent: inner.setdefault(parent, {}), parents, state)[name] = value
    return state


def checkpoint_folder(run: Path, step: int) -> Path:
    """The path of a run's checkpoint of `step`."""
    return run / "checkpoints" / f"step_{step:08d}"


def folders(run: Path) -> list[Path]:
    """The checkpoints of a run, newest first."""
    paths = [path for path in (run / "checkpoints").glob("step_*") if NAME.fullmatch(path.name)]
    return sorted(paths, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """The step in a checkpoint's name."""
    return int(folder.name.removeprefix("step_"))


def best(run: Path) -> Path | None:
    """The checkpoint with the lowest loss of held-out images, if a run has any: of those with the newest one's data."""
    scored = []
    for folder in folders(run):
        with suppress(OSError, ValueError):
            state = json.loads((folder / STATE).read_bytes())
            scored.append((state["held_out_loss"], state["data"], folder))
    same = [(loss, folder) for loss, data, folder in scored if loss is not None and data == scored[0][1]]
    return min(same, key=lambda pair: pair[0])[1] if same else None


def prune(run: Path, keep_last: int, keep_every: int) -> None:
    """Let the link `best` of a run point to its best checkpoint by held-out images, if any, and remove others but the
    last `keep_last` (0: all stay) and those of each `keep_every`-th step."""
    chosen, link, temporary = best(run), run / "best", run / ".best.tmp"
    if chosen and (link.is_symlink() or not link.exists()):
        with suppress(OSError):  # some file systems have no links
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(chosen.relative_to(run))
            temporary.replace(link)
    for path in folders(run)[keep_last:] if keep_last else []:
        if path != chosen and (not keep_every or step_of(path) % keep_every):
            # Renamed first: what is half removed must not look like a checkpoint.
            shutil.rmtree(path.rename(path.with_name(f".{path.name}.tmp")), ignore_errors=True)


def newest(path: Path, use: Callable[[Checkpoint], T]) -> tuple[Checkpoint, T]:
    """A checkpoint, or of a run the newest one for which `use` does not raise Damaged; and what `use` returns for it.

    Raises UsageError if there is none, and if a file cannot be read for another reason than damage.
    """
    if (path / STATE).exists() or NAME.fullmatch(path.name):
        checkpoint = open_folder(path.resolve())  # the link `best` may move on
        return checkpoint, use(checkpoint)
    damage: list[tuple[Path, str]] = []
    for folder in folders(path):
        try:
            checkpoint = open_folder(folder)
            return replace(checkpoint, passed_over=tuple(damage)), use(checkpoint)
        except Damaged as error:
            if folder.exists():  # a run in training may have removed it
                damage.append((folder, str(error)))
    if not damage:
        raise UsageError(f"{path} is not a checkpoint or a run that has saved one (no checkpoints/step_...)")
    raise Damaged(f"none of the {len(damage)} checkpoints of {path} is whole; of the newest: {damage[0][1]}")


def open_folder(folder: Path) -> Checkpoint:
    """Open one checkpoint, of which the small files are read. Raises Damaged if one is not what was written."""
    sums = read_sums(folder)
    state = json.loads(_read(folder / STATE, sums))
    if state["format"] != FORMAT:
        raise UsageError(f"checkpoint {folder} has format {state['format']}; this version reads {FORMAT}")
    if NAME.fullmatch(folder.name) and step_of(folder) != state["step"]:
        raise UsageError(f"checkpoint {folder} is of step {state['step']}: give the folder its name back")
    _read(folder / "config.yaml", sums)
    with prefixed(f"checkpoint {folder} cannot be used: "):
        config = load_config(folder / "config.yaml")
    about = {name: state[name] for name in ("step", "data", "origin", "environment", "numbers")}
    names, vectors = tuple(state["class_names"]), Scale(**state.get("vectors", {}))
    return Checkpoint(folder, config=config, class_names=names, vectors=vectors, sums=sums, **about)


def read_sums(folder: Path) -> dict[str, str]:
    """The checksums by file name. Raises Damaged if their file is missing or does not name every file."""
    sums = {line[66:]: line[:64] for line in _read(folder / SUMS, None).decode(errors="replace").splitlines()}
    if not sums.keys() >= {STATE, "config.yaml", "model.safetensors", "training.safetensors"}:
        if (folder / "training.pt").exists():
            raise UsageError(f"checkpoint {folder} is of an earlier version; this one reads format {FORMAT}")
        raise Damaged(f"checkpoint {folder} is not whole: {SUMS} is damaged")
    return sums


def _read(path: Path, sums: Mapping[str, str] | None) -> bytes:
    """The content of a file, verified. A missing or different one is damage; one that cannot be read is not."""
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise Damaged(f"checkpoint {path.parent} is not whole: {path.name} is missing") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {one_line(error)}; nothing was changed") from None
    if sums is not None and hashlib.sha256(content).hexdigest() != sums.get(path.name):
        hint = " (settings are changed on the command line)" if path.name == "config.yaml" else ""
        raise Damaged(f"checkpoint {path.parent} is not whole: {path.name} is damaged{hint}")
    return content


def misfits(model: nn.Module, weights: Weights) -> dict[str, str]:
    """The names that differ in shape, or that only a model or `weights` has, each with its shapes in a message."""
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in weights.items()}
    differ = [name for name in sorted(wanted.keys() | given.keys()) if wanted.get(name) != given.get(name)]
    return {n: f"{n} is {given.get(n, 'missing')}, and {wanted.get(n, 'missing')} in the model" for n in differ}


def check_fits(model: nn.Module, weights: Weights, source: Path) -> None:
    """Raise UsageError, with the first differences, where `weights` are not those of `model`."""
    if differ := misfits(model, weights):
        listed = name_some(list(differ.values()), f"of {len(model.state_dict())} weights differ")
        raise UsageError(f"checkpoint {source} is of another architecture: {listed}")
