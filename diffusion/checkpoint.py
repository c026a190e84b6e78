"""Checkpoints: a folder that holds all that a run is, and is whole or absent.

step_00001500/
    config.yaml            the resolved configuration
    state.json             the step, the class names, who wrote it
    model.safetensors      the weights in training
    ema_0.999.safetensors  a moving average, one file a rate (none at step 0, where all are the weights)
    training.pt            the optimizer's state and the loss scale (read with weights_only)
    SHA256SUMS             a checksum of each of them, as `sha256sum --check` reads them
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusion.config import Config, load_config
from diffusion.errors import UsageError, in_short
from diffusion.unet import UNetModel

FORMAT = 3
SUMS = "SHA256SUMS"
Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's folder, of which the small files have been read."""

    path: Path
    step: int
    config: Config
    class_names: tuple[str, ...]
    data: str | None = None
    """The fingerprint of the data set that it was trained on."""
    passed_over: tuple[str, ...] = ()
    """What was wrong with newer checkpoints of the run, in whose place this one is."""

    def weights(self) -> dict[str, Tensor]:
        """The weights in training."""
        return load_tensors(self.path / "model.safetensors")

    def ema(self, rate: float) -> dict[str, Tensor]:
        """The moving average at `rate`."""
        return self.weights() if self.step == 0 else load_tensors(self.path / f"ema_{rate}.safetensors")

    def chosen_weights(self, wanted: str | None = None) -> dict[str, Tensor]:
        """What a person's `--ema` names: a moving average by its rate, "none" for the weights in training, or None for
        the run's first average. Raises UsageError where the run has it not."""
        rates = {str(rate): rate for rate in self.config.train.ema_rates}
        if wanted == "none":
            return self.weights()
        if wanted is not None and wanted not in rates:
            raise UsageError(f"--ema is {wanted}; {self.path} has {', '.join(rates)}, or none")
        return self.ema(self.config.train.ema_rates[0] if wanted is None else rates[wanted])

    def fits_classes(self, names: tuple[str, ...]) -> bool:
        """Whether data with these classes can be the run's. A converted model's may be numbers that stand for names."""
        numbered = self.step == 0 and self.class_names == tuple(map(str, range(len(names))))
        return names == self.class_names or numbered

    def training(self, parameters: Sequence[Tensor]) -> dict[str, Any]:
        """What `save` was given as `training`, with an optimizer's state that fits `parameters`.

        Plain data and tensors only: nothing in the file is run. Raises UsageError where it is damaged or does not fit.
        """
        path = self.path / "training.pt"
        try:
            training = load_plain(path)
            moments = training["optimizer"]["state"]
            shapes = [moments[i][name].shape for i in range(len(parameters)) for name in ("exp_avg", "exp_avg_sq")]
            training["scaler"], training["importance"], training["meter"]
        except (UsageError, KeyError, TypeError, AttributeError) as error:
            raise _damaged(path, error) from None
        if shapes != [p.shape for p in parameters for _ in range(2)]:  # a fused optimizer would not look
            raise UsageError(f"checkpoint {self.path}: the optimizer's state in {path.name} is of another network")
        return training

    def network(self, weights: Weights) -> UNetModel:
        """The network with `weights`. Raises UsageError where they are of another architecture."""
        model = self.config.network(len(self.class_names))
        check_fits(model, weights, self.path)
        model.load_state_dict(weights)
        return model


def save(
    folder: Path,
    *,
    step: int,
    config: Config,
    class_names: tuple[str, ...],
    weights: Weights,
    averages: Mapping[float, Weights],
    training: dict[str, Any],
    data: str | None = None,
) -> None:
    """Write the checkpoint `folder` of a run whose own folder is there: into a temporary folder first, which takes its
    name when all is on the disk."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        folder.parent.mkdir(exist_ok=True)  # but not the run's own: a run that was moved away is not begun again
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        config.save(temporary / "config.yaml")
        state = {"format": FORMAT, "step": step, "class_names": class_names, "data": data, "torch": torch.__version__}
        (temporary / "state.json").write_text(json.dumps(state, indent=1))
        save_file(_on_cpu(weights), temporary / "model.safetensors")
        for rate, average in averages.items():
            save_file(_on_cpu(average), temporary / f"ema_{rate}.safetensors")
        torch.save(training, temporary / "training.pt")
        sums = [f"{_sha256(path)}  {path.name}\n" for path in sorted(temporary.iterdir())]
        (temporary / SUMS).write_text("".join(sums))
        for path in (*temporary.iterdir(), temporary):
            _to_disk(path)
    except Exception:
        shutil.rmtree(temporary, ignore_errors=True)  # on a full disk, its room is needed
        raise
    temporary.rename(folder)
    _to_disk(folder.parent)


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where a run keeps the checkpoint of `step`."""
    return run / "checkpoints" / f"step_{step:08d}"


def folders(run: Path) -> list[Path]:
    """A run's checkpoints, the newest first."""
    steps = {path: re.fullmatch(r"step_(\d+)", path.name) for path in (run / "checkpoints").glob("step_*")}
    return sorted((path for path, match in steps.items() if match), key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """The step that a checkpoint's name says."""
    return int(folder.name.removeprefix("step_"))


def prune(run: Path, keep_last: int, keep_every: int) -> None:
    """Remove a run's checkpoints but the last `keep_last` (0: all stay) and those of each `keep_every`-th step."""
    for path in folders(run)[keep_last:] if keep_last else []:
        if not keep_every or step_of(path) % keep_every:
            removed = path.rename(path.with_name(f".{path.name}.tmp"))  # half of a checkpoint must not look like one
            shutil.rmtree(removed, ignore_errors=True)


def open_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint's folder, or the newest of a run's that is whole, with every file's checksum verified.

    Raises UsageError where there is none. Of a run, damaged ones are passed over if an older one is whole.
    """
    if not path.exists():
        raise UsageError(f"checkpoint {path} is not there")
    if (path / "state.json").exists() or path.name.startswith("step_"):
        return _open_folder(path)
    damage: list[UsageError] = []
    for folder in folders(path):
        try:
            return dataclasses.replace(_open_folder(folder), passed_over=tuple(map(str, damage)))
        except UsageError as error:
            damage.append(error)
    if len(damage) > 1:
        raise UsageError(f"none of the {len(damage)} checkpoints of {path} is whole; of the newest: {damage[0]}")
    raise (
        damage[0]
        if damage
        else UsageError(f"{path} is no checkpoint, and no run that has saved one (no checkpoints/step_... in it)")
    )


def _verify(folder: Path) -> None:
    """Raise UsageError, with the file's name, where one is missing or is not what was written."""
    try:
        lines = (folder / SUMS).read_text().splitlines()
        sums = {name: wanted for wanted, name in (line.split("  ", 1) for line in lines)}
        if not {"config.yaml", "state.json", "model.safetensors", "training.pt"} <= sums.keys():
            raise ValueError("it does not name every file")
    except (OSError, ValueError) as error:
        raise _damaged(folder / SUMS, error) from None
    for name, wanted in sums.items():
        try:
            if _sha256(folder / name) != wanted:
                hint = " (settings are changed on the command line)" if name == "config.yaml" else ""
                raise ValueError(f"it is not what was written there{hint}")
        except (OSError, ValueError) as error:
            raise _damaged(folder / name, error) from None


def _open_folder(folder: Path) -> Checkpoint:
    state_path = folder / "state.json"
    try:
        state = json.loads(state_path.read_text())
        step, class_names = state["step"], checked_names(state["class_names"])
        if type(step) is not int or step < 0:
            raise ValueError(f"step is {step!r}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(state_path, error) from None
    if state.get("format") != FORMAT:
        raise UsageError(f"checkpoint {folder} has format {state.get('format')}; this version reads {FORMAT}")
    _verify(folder)
    if folder.name.startswith("step_") and folder.name != f"step_{step:08d}":
        raise UsageError(f"checkpoint {folder} is of step {step}: give the folder its name back, step_{step:08d}")
    return Checkpoint(folder, step, load_config(folder / "config.yaml"), class_names, state.get("data"))


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
    """Class names as a file of ours has them. Raises ValueError where they are not a list of different strings."""
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value) or len(set(value)) < len(value):
        raise ValueError("class names must be a list of different strings")
    return tuple(value)


def load_plain(path: Path) -> Any:
    """What `torch.save` wrote, if it is plain data and tensors: nothing in the file is run. Raises UsageError else."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of what it then refuses
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the broken part gave
        unsafe = "Unsupported" in str(error) or "GLOBAL" in str(error)
        reason = "it holds code or objects, of which nothing was run" if unsafe else in_short(error)
        raise UsageError(f"{path} cannot be read as plain tensors: {reason}") from None


def load_tensors(path: Path) -> dict[str, Tensor]:
    """What a safetensors file holds. Raises UsageError where it is damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path} cannot be read: {in_short(error)}") from None


def _damaged(path: Path, error: Exception) -> UsageError:
    state = "is damaged" if path.exists() else "is missing"
    reason = "" if isinstance(error, FileNotFoundError) else f": {in_short(error)}"
    return UsageError(f"checkpoint {path.parent} is not whole: {path.name} {state}{reason}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _on_cpu(weights: Weights) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in weights.items()}


def _to_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of files, has reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
