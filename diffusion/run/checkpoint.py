"""Checkpoints: a self-contained folder, written atomically.

step_00001500/
    config.yaml            the resolved configuration
    state.json             the step, class names, origin of the weights, environment
    model.safetensors      the weights in training
    ema_0.999.safetensors  a moving average, one file each (none at step 0, whose averages are the weights)
    training.pt            the optimizer's state and the loss scale (read with weights_only)
    SHA256SUMS             a checksum of each of them, as `sha256sum --check` reads them
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from diffusion.config.files import load_config, save_config
from diffusion.config.schema import Config
from diffusion.ema import LONGEST, reconstruct
from diffusion.errors import UsageError, one_line
from diffusion.files.atomic import to_disk
from diffusion.files.tensors import load_plain, load_tensors
from diffusion.models.unet import UNetModel
from diffusion.run.checksums import MAX_JSON_BYTES, SUMS, Damaged, damaged, read_sums, reading, sha256, verify

FORMAT = 6
Weights = Mapping[str, Tensor]


class Stateful(Protocol):
    """A part of a run that is saved in a checkpoint: plain data and tensors."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, whose small files have been read and verified. Other files are verified when they are read."""

    path: Path
    step: int
    config: Config
    class_names: tuple[str, ...]
    data: str | None = None
    """The fingerprint of its training data."""
    origin: dict[str, Any] | None = None
    """The source of the run's first weights: path, step, file and its SHA-256."""
    environment: Mapping[str, Any] = field(default_factory=dict)
    """What rounding depends on: device, processes, threads, version of torch."""
    sums: Mapping[str, str] = field(default_factory=dict)
    """The SHA-256 of each file."""
    verified: bool = False
    passed_over: tuple[tuple[Path, str], ...] = ()
    """Newer checkpoints of the run that are damaged, each with the reason."""

    def weights(self) -> dict[str, Tensor]:
        """The weights in training."""
        return self._tensors("model.safetensors")

    def ema(self, key: float | str) -> dict[str, Tensor]:
        """The moving average `key` (see `diffusion.ema.EMA`)."""
        return self.weights() if self.step == 0 else self._tensors(f"ema_{key}.safetensors")

    def _tensors(self, name: str) -> dict[str, Tensor]:
        try:
            tensors = load_tensors(self.path / name)
        finally:
            self.file(name)  # verified once it is in memory: it may be overwritten in place while it is read
        for key, value in tensors.items():
            if value.dtype != torch.float32:
                raise UsageError(f"checkpoint {self.path}: {key} in {name} is of {value.dtype}; weights are float32")
        return tensors

    def chosen_weights(self, wanted: str | None = None) -> dict[str, Tensor]:
        """The weights that `--ema` selects: a moving average by its name, "none" for the weights in training, None for
        the run's first average, or "length0.07" for one that is reconstructed from those in the run's checkpoints.

        Raises UsageError if the run does not have it."""
        chosen = self.chosen(wanted)
        return self._reconstructed(chosen) if isinstance(chosen, float) else self._tensors(chosen)

    def fingerprint(self, wanted: str | None = None) -> str:
        """What distinguishes the weights that `--ema` selects from others."""
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
        parts = [(saved, of) for path in earlier if 0 < step_of(path) <= self.step
                 for saved in [self if path == self.path else _open_folder(path)] for of in lengths]  # fmt: skip
        coefficients, error = reconstruct([(of, saved.step) for saved, of in parts], length, self.step)
        if error > 0.1:
            steps = ", ".join(str(saved.step) for saved, of in parts if of == lengths[0])
            known = f"{', '.join(map(str, lengths))} after steps {steps}"
            raise UsageError(f"--ema is length{length}; the averages of lengths {known} express it with an error of "
                             f"{error:.0%}, above 10%: name a nearer one, or keep more checkpoints")  # fmt: skip
        total: dict[str, Tensor] = {}
        for coefficient, (saved, of) in zip(coefficients.tolist(), parts, strict=True):
            for name, value in saved.ema(f"length{of}").items():
                total[name] = total.get(name, 0) + coefficient * value.double()
        return {name: value.float() for name, value in total.items()}

    def file(self, name: str) -> Path:
        """The path of a file, verified. Raises Damaged if it is missing or differs from what was written, and
        UsageError if it cannot be read."""
        if name not in self.sums:
            raise Damaged(f"checkpoint {self.path} is not whole: {SUMS} does not name {name}")
        if not self.verified:
            verify(self.path, {name: self.sums[name]})
        return self.path / name

    def restore(self, parts: Mapping[str, Stateful]) -> None:
        """Restore the state of each part by its name. Raises UsageError if the file does not fit."""
        path = self.file("training.pt")
        training = load_plain(path)
        try:
            for name, part in parts.items():
                part.load_state_dict(training[name])
        except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            what = f"does not hold what a run of this network saves ({one_line(error)})"
            raise UsageError(f"checkpoint {self.path}: {path.name} {what}: --back_to STEP goes back") from None

    def network(self, weights: Weights) -> UNetModel:
        """The network with `weights`. Raises UsageError if they are of another architecture."""
        with torch.device("meta"):  # nothing is allocated or drawn before the sizes are checked
            model = self.config.network(len(self.class_names))
        check_fits(model, weights, self.path)
        model.load_state_dict(weights, assign=True)
        return model


def save(
    folder: Path,
    step: int,
    config: Config,
    class_names: tuple[str, ...],
    weights: Weights,
    averages: Mapping[float | str, Weights],
    training: dict[str, Any],
    *,
    data: str | None = None,
    origin: dict[str, Any] | None = None,
    environment: Mapping[str, Any] | None = None,
    held_out_loss: float | None = None,
) -> None:
    """Write a checkpoint atomically: into a temporary folder, which is renamed once all is on disk. The run's own
    folder must exist."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        folder.parent.mkdir(exist_ok=True)  # not the run's own: a run that was moved away must not be begun again
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        save_config(config, temporary / "config.yaml")
        state = {"format": FORMAT, "step": step, "class_names": class_names, "data": data, "origin": origin,
                 "environment": dict(environment or {}), "held_out_loss": held_out_loss}  # fmt: skip
        (temporary / "state.json").write_text(json.dumps(state, indent=1))
        save_file(_on_cpu(weights), temporary / "model.safetensors")
        for key, average in averages.items():
            save_file(_on_cpu(average), temporary / f"ema_{key}.safetensors")
        torch.save(training, temporary / "training.pt")
        sums = [f"{sha256(path)}  {path.name}\n" for path in sorted(temporary.iterdir())]
        (temporary / SUMS).write_text("".join(sums))
        for path in (*temporary.iterdir(), temporary):
            if path.is_file():
                shutil.copymode(temporary / "state.json", path)  # safetensors creates files that the group cannot read
            to_disk(path)
    except Exception:
        shutil.rmtree(temporary, ignore_errors=True)  # on a full disk, the space is needed
        raise
    temporary.rename(folder)
    to_disk(folder.parent)


def checkpoint_folder(run: Path, step: int) -> Path:
    """The path of a run's checkpoint of `step`."""
    return run / "checkpoints" / f"step_{step:08d}"


def folders(run: Path) -> list[Path]:
    """The checkpoints of a run, newest first."""
    steps = {path: re.fullmatch(r"step_\d{8,}", path.name) for path in (run / "checkpoints").glob("step_*")}
    return sorted((path for path, match in steps.items() if match), key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """The step in a checkpoint's name."""
    return int(folder.name.removeprefix("step_"))


def best(run: Path) -> Path | None:
    """The checkpoint with the lowest loss of held-out images, if a run has any: of those with the newest one's data."""
    losses, data = {}, list[Any]()
    for folder in folders(run):
        with suppress(OSError, ValueError, AttributeError):
            state = json.loads((folder / "state.json").read_bytes()[:MAX_JSON_BYTES])
            data.append(state.get("data"))
            if isinstance(state.get("held_out_loss"), float) and data[-1] == data[0]:
                losses[folder] = state["held_out_loss"]
    return min(losses, key=lambda folder: losses[folder]) if losses else None


def link_best(run: Path) -> Path | None:
    """Let the link `best` of a run point to its best checkpoint, if there is one, and return that."""
    chosen, link = best(run), run / "best"
    with suppress(OSError):  # some file systems have no links
        if os.path.lexists(link) and not os.readlink(link).startswith("checkpoints/"):
            return chosen  # somebody else's
        if chosen is None:
            (run / "best").unlink(missing_ok=True)
        else:
            temporary = run / f".best.{os.getpid()}.tmp"
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(chosen.relative_to(run))
            temporary.replace(run / "best")
    return chosen


def prune(run: Path, keep_last: int, keep_every: int) -> None:
    """Remove a run's checkpoints but the last `keep_last` (0: all stay), those of each `keep_every`-th step, and the
    best by held-out images."""
    chosen = link_best(run)
    for path in folders(run)[keep_last:] if keep_last else []:
        if path != chosen and (not keep_every or step_of(path) % keep_every):
            removed = path.rename(path.with_name(f".{path.name}.tmp"))  # it must not look like a checkpoint
            shutil.rmtree(removed, ignore_errors=True)


def is_run_or_checkpoint(path: Path) -> bool:
    """Whether a folder looks like a run that has saved a checkpoint, or like a checkpoint."""
    return (path / "checkpoints").is_dir() or (path / "state.json").exists()


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint, or a run's newest undamaged one, with every file verified.

    Raises UsageError if there is none, and if a file cannot be read for another reason than damage.
    """

    def verified(saved: Checkpoint) -> Checkpoint:
        verify(saved.path, saved.sums)
        return dataclasses.replace(saved, verified=True)

    return _newest(path, verified)


def open_weights(path: Path, ema: str | None = None) -> tuple[Checkpoint, dict[str, Tensor]]:
    """Open a checkpoint as `open_checkpoint` does, and its weights that `ema` selects (see `chosen_weights`).

    Only the files that are read are verified. A run in training may remove old checkpoints meanwhile.
    """
    loaded: dict[str, Tensor] = {}

    def with_weights(saved: Checkpoint) -> Checkpoint:
        loaded.update(saved.chosen_weights(ema))
        return saved

    return _newest(path, with_weights), loaded


def _newest(path: Path, use: Callable[[Checkpoint], Checkpoint]) -> Checkpoint:
    """Apply `use` to a checkpoint, or to a run's newest one for which it does not raise Damaged."""
    if not path.exists():
        raise UsageError(f"checkpoint {path} is not there")
    if (path / "state.json").exists() or path.name.startswith("step_"):
        return use(_open_folder(path.resolve() if path.is_symlink() else path))  # the link `best` may move on
    for _ in range(10):  # a run in training may remove what was just listed
        damage: list[tuple[Path, Damaged]] = []
        listed = folders(path)
        for folder in listed:
            try:
                passed_over = tuple((where, str(error)) for where, error in damage)
                return dataclasses.replace(use(_open_folder(folder)), passed_over=passed_over)
            except Damaged as error:
                if not folder.exists():
                    break
                damage.append((folder, error))
        else:
            break
    if not damage:
        hint = f"; name the folder, {path.parent}" if path.is_file() else ""
        raise UsageError(f"{path} is no checkpoint, and no run that has saved one (no checkpoints/step_...){hint}")
    first = str(damage[0][1])
    raise Damaged(first if len(damage) == 1 else
                  f"none of the {len(damage)} checkpoints of {path} is whole; of the newest: {first}")  # fmt: skip


def _open_folder(folder: Path) -> Checkpoint:
    sums = read_sums(folder)
    verify(folder, {name: sums[name] for name in ("state.json", "config.yaml") if name in sums})
    path = folder / "state.json"
    with reading(path):
        text = path.read_bytes()[:MAX_JSON_BYTES]
    try:
        state = json.loads(text)
        if not isinstance(state, dict):
            raise ValueError("it holds no object")
        if state["format"] != FORMAT:
            raise UsageError(f"checkpoint {folder} has format {state['format']}; this version reads {FORMAT}")
        step, class_names = state["step"], checked_names(state["class_names"])
        if type(step) is not int or step < 0:
            raise ValueError(f"step is {step!r}")
        origin, environment = state["origin"], state["environment"]
        if not isinstance(environment, dict) or not (origin is None or isinstance(origin, dict)):
            raise ValueError("origin and environment are no objects")
    except UsageError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if not sums:
            raise damaged(path, one_line(error)) from None
        # The checksum is right, so this is what was written.
        raise UsageError(f"checkpoint {folder}: state.json cannot be used: {one_line(error)}") from None
    if not sums:
        raise damaged(folder / SUMS, "")
    if folder.name.startswith("step_") and folder.name != f"step_{step:08d}":
        raise UsageError(f"checkpoint {folder} is of step {step}: give the folder its name back, step_{step:08d}")
    try:
        config = load_config(folder / "config.yaml")
    except UsageError as error:
        raise UsageError(f"checkpoint {folder} cannot be used: {str(error).removeprefix('--config ')}") from None
    return Checkpoint(folder, step, config, class_names, state.get("data"), origin, environment, sums)


def check_format(run: Path) -> None:
    """Raise UsageError if a run's newest checkpoint has another format: its settings may have other names."""
    for folder in folders(run)[:1]:
        found = FORMAT
        with suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
            found = json.loads((folder / "state.json").read_bytes()[:MAX_JSON_BYTES])["format"]
        if type(found) is int and found != FORMAT:
            raise UsageError(f"checkpoint {folder} has format {found}; this version reads {FORMAT}")


def check_fits(model: torch.nn.Module, weights: Weights, source: Path) -> None:
    """Raise UsageError, with the first differences, where `weights` are not those of `model`."""
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in weights.items()}
    differ = sorted(name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name))
    if differ:
        listed = "; ".join(
            f"{name} is {given.get(name, 'missing')} there and {wanted.get(name, 'missing')} in the model"
            for name in differ[:3]
        )
        more = f"; and {len(differ) - 3} more of {len(wanted)}" if len(differ) > 3 else ""
        raise UsageError(f"checkpoint {source} is of another architecture: {listed}{more}")


def checked_names(value: object) -> tuple[str, ...]:
    """Class names from a file. Raises ValueError if they are not a list of different strings."""
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value) or len(set(value)) < len(value):
        raise ValueError("class names must be a list of different strings")
    return tuple(value)


def _on_cpu(weights: Weights) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in weights.items()}
