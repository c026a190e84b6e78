"""Diffusion models after Nichol & Dhariwal (2021), "Improved Denoising Diffusion Probabilistic Models"."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion.errors import UsageError
from diffusion.models.dit import DiT
from diffusion.models.unet import UNetModel
from diffusion.process import GaussianDiffusion
from diffusion.schedule import Schedule

if TYPE_CHECKING:
    from diffusion.run.loaded import Run
    from diffusion.training.trainer import Trainer

__version__ = "0.1.0"
__all__ = ["DiT", "GaussianDiffusion", "Schedule", "UNetModel", "UsageError", "__version__", "load", "train"]


def load(path: str | Path, ema: str | float | None = None) -> "Run":
    """Open a run or a checkpoint: its network, settings and process, and sampling (see `diffusion.run.loaded.Run`).

    Args:
        ema: a moving average by its name, or none for the weights in training (default: the run's first average).
    """
    from diffusion.run.loaded import load_run  # what is below needs neither pydantic nor PIL

    return load_run(path, None if ema is None else str(ema))


def train(
    data: Any, out: str | Path, settings: Mapping[str, Any] | None = None, config: str | Path | None = None
) -> "Trainer":
    """A run on images from Python, begun or continued: `for step, metrics in diffusion.train(...): ...` trains it.

    Args:
        data: images (N, C, *sizes), uint8 or float in [-1, 1]; a pair of them and labels (N,); a folder; a map-style
            data set of pairs (image, label); or a mapping of `images`, and if any `labels`, condition images as `image`
            (N, C, *sizes), and columns of condition vectors.
        out: the run's folder.
        settings: by name, such as {"train.steps": 100}. `model.class_cond` is true where labels are given.
        config: that the settings override: a YAML file, or a shipped configuration such as folder_small.
    """
    from diffusion.training.api import trainer_for

    return trainer_for(data, out, settings or {}, config)
