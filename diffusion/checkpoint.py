"""Checkpoints: a folder that holds all that a run is, and is whole or absent.

step_00001500/
    config.yaml            the resolved configuration
    state.json             the step, the class names, who wrote it
    model.safetensors      the weights in training
    ema_0.999.safetensors  a moving average, one file a rate
    training.pt            the optimizer's state and the loss scale (read with weights_only)
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusion.config import Config, load_config
from diffusion.errors import UsageError
from diffusion.unet import UNetModel

FORMAT = 1
Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's folder, of which the small files have been read."""

    path: Path
    step: int
    config: Config
    class_names: tuple[str, ...]

    def weights(self) -> dict[str, Tensor]:
        """The weights in training."""
        return _load_tensors(self.path / "model.safetensors")

    def ema(self, rate: float) -> dict[str, Tensor]:
        """The moving average at `rate`."""
        return _load_tensors(self.path / f"ema_{rate}.safetensors")

    def chosen_weights(self, wanted: str | None = None) -> dict[str, Tensor]:
        """What a person's `--ema` names: a moving average by its rate, "none" for the weights in training, or None for
        the run's first average. Raises UsageError where the run has it not."""
        rates = {str(rate): rate for rate in self.config.train.ema_rates}
        if wanted == "none":
            return self.weights()
        if wanted is not None and wanted not in rates:
            raise UsageError(f"--ema is {wanted}; {self.path} has {', '.join(rates)}, or none")
        return self.ema(self.config.train.ema_rates[0] if wanted is None else rates[wanted])

    def training(self, parameters: Sequence[Tensor]) -> dict[str, Any]:
        """What `save` was given as `training`, with an optimizer's state that fits `parameters`.

        Plain data and tensors only: nothing in the file is run. Raises UsageError where it is damaged or does not fit.
        """
        path = self.path / "training.pt"
        try:
            training = torch.load(path, map_location="cpu", weights_only=True)
            moments = training["optimizer"]["state"]
            shapes = [moments[i][name].shape for i in range(len(parameters)) for name in ("exp_avg", "exp_avg_sq")]
            training["scaler"], training["importance"]
        except Exception as error:  # torch raises whatever the broken part gave
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
) -> None:
    """Write the checkpoint `folder`: into a temporary folder first, which takes its name when all is on the disk."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    config.save(temporary / "config.yaml")
    state = {"format": FORMAT, "step": step, "class_names": class_names, "torch": torch.__version__}
    (temporary / "state.json").write_text(json.dumps(state, indent=1))
    save_file(_on_cpu(weights), temporary / "model.safetensors")
    for rate, average in averages.items():
        save_file(_on_cpu(average), temporary / f"ema_{rate}.safetensors")
    torch.save(training, temporary / "training.pt")
    for path in (*temporary.iterdir(), temporary):
        _to_disk(path)
    temporary.rename(folder)
    _to_disk(folder.parent)


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where a run keeps the checkpoint of `step`."""
    return run / "checkpoints" / f"step_{step:08d}"


def newest(run: Path) -> Path | None:
    """A run's checkpoint with the highest step, or None."""
    found = {
        int(m[1]): path
        for path in (run / "checkpoints").glob("step_*")
        if (m := re.fullmatch(r"step_(\d+)", path.name))
    }
    return found[max(found)] if found else None


def open_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint's folder, or the newest of a run's. Raises UsageError where there is none or it is not whole."""
    if not path.exists():
        raise UsageError(f"checkpoint {path} is not there")
    folder = path if (path / "state.json").exists() or path.name.startswith("step_") else newest(path)
    if folder is None:
        raise UsageError(f"{path} is no checkpoint, and no run that has saved one (no checkpoints/step_... in it)")
    state_path = folder / "state.json"
    try:
        state = json.loads(state_path.read_text())
        step, class_names = state["step"], tuple(map(str, state["class_names"]))
        if type(step) is not int or step < 0:
            raise ValueError(f"step is {step!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(state_path, error) from None
    if folder.name.startswith("step_") and folder.name != f"step_{step:08d}":
        raise UsageError(f"checkpoint {folder} is of step {step}: give the folder its name back, step_{step:08d}")
    if state.get("format") != FORMAT:
        raise UsageError(f"checkpoint {folder} has format {state.get('format')}; this version reads {FORMAT}")
    try:
        config = load_config(folder / "config.yaml")
    except UsageError as error:
        raise _damaged(folder / "config.yaml", error) from None
    return Checkpoint(folder, step, config, class_names)


def check_fits(model: torch.nn.Module, weights: Weights, source: Path) -> None:
    """Raise UsageError, with the first difference, where `weights` are not those of `model`."""
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in weights.items()}
    for name in sorted(wanted.keys() | given.keys()):
        if wanted.get(name) != given.get(name):
            raise UsageError(
                f"checkpoint {source} is of another architecture: {name} is "
                f"{given.get(name, 'missing')} there and {wanted.get(name, 'missing')} in the model"
            )


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> UsageError:
    state = "is damaged" if path.exists() else "is missing"
    reason = "" if isinstance(error, FileNotFoundError) else f": {' '.join(str(error).split())[:200]}"
    return UsageError(f"checkpoint {path.parent} is not whole: {path.name} {state}{reason}")


def _on_cpu(weights: Weights) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in weights.items()}


def _to_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of files, has reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
