"""Checkpoints: a folder that holds all that a run is, and is whole or absent.

step_00001500/
    config.yaml            the resolved configuration
    state.json             the step, the class names, config.yaml's checksum, who wrote it
    model.safetensors      the weights in training
    ema_0.999.safetensors  a moving average, one file a rate (none at step 0, where all are the weights)
    training.pt            the optimizer's state and the loss scale (read with weights_only)
"""

from __future__ import annotations

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
from diffusion.errors import UsageError
from diffusion.unet import UNetModel

FORMAT = 2
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
        return self.weights() if self.step == 0 else _load_tensors(self.path / f"ema_{rate}.safetensors")

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
            training["scaler"], training["importance"]
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
) -> None:
    """Write the checkpoint `folder`: into a temporary folder first, which takes its name when all is on the disk."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    config.save(temporary / "config.yaml")
    state = {"format": FORMAT, "step": step, "class_names": class_names, "torch": torch.__version__,
             "sha256": {"config.yaml": _sha256(temporary / "config.yaml")}}  # fmt: skip
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
        if _sha256(folder / "config.yaml") != state["sha256"]["config.yaml"]:
            raise UsageError("it is not the one that was saved; settings are changed on the command line, not there")
        config = load_config(folder / "config.yaml")
    except (OSError, KeyError, TypeError, UsageError) as error:
        raise _damaged(folder / "config.yaml", error) from None
    return Checkpoint(folder, step, config, class_names)


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


def load_plain(path: Path) -> Any:
    """What `torch.save` wrote, if it is plain data and tensors: nothing in the file is run. Raises UsageError else."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of what it then refuses
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the broken part gave
        unsafe = "Unsupported" in str(error) or "GLOBAL" in str(error)
        reason = "it holds code or objects, of which nothing was run" if unsafe else _in_short(error)
        raise UsageError(f"{path} cannot be read as plain tensors: {reason}") from None


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> UsageError:
    state = "is damaged" if path.exists() else "is missing"
    reason = "" if isinstance(error, FileNotFoundError) else f": {_in_short(error)}"
    return UsageError(f"checkpoint {path.parent} is not whole: {path.name} {state}{reason}")


def _in_short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _on_cpu(weights: Weights) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in weights.items()}


def _to_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of files, has reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
