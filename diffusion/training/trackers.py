"""Trackers of metrics and images, such as TensorBoard and wandb, through accelerate."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import filter_trackers
from accelerate.utils import LoggerType
from PIL import Image

from diffusion.config.schema import Config
from diffusion.errors import UsageError, check_name, one_line, refusing


def check_trackers(names: Sequence[str]) -> None:
    """Raise UsageError if accelerate does not know a tracker, or it is not installed."""
    for name in names:
        check_name("train.log_with", name, [kind.value for kind in LoggerType if kind.value != "all"])
        if not filter_trackers([name], logging_dir=""):
            raise UsageError(f"train.log_with has {name}, which is not installed: pip install {name}")


class Trackers:
    """The trackers that `train.log_with` names. One that fails is left out from then on, and ends nothing.

    Raises UsageError if one cannot be started.
    """

    def __init__(self, accelerator: Accelerator, config: Config, out: Path, warn: Callable[[str], None]):
        self.accelerator, self.warn = accelerator, warn
        names, folder = config.train.log_with, str(out / "trackers")
        accelerator.project_configuration.set_directories(folder)
        accelerator.log_with = filter_trackers(names, folder)
        settings = {name: v if isinstance(v, int | float | str) else str(v) for name, v in config.flat().items()}
        with refusing(lambda reason: f"train.log_with {', '.join(names)} cannot be started: {reason}"):
            accelerator.init_trackers(out.name, config=settings)

    def log(self, values: dict[str, Any], step: int) -> None:
        """Log the numbers among values."""
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float) and name != "step"}
        self._each(lambda tracker: tracker.log(numbers, step=step))

    def log_grid(self, path: Path, step: int) -> None:
        """Log a grid to the trackers that take images."""

        def log(tracker: Any) -> None:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            if hasattr(tracker, "log_images"):
                with Image.open(path) as image:
                    tracker.log_images({"samples": np.asarray(image.convert("RGB"))[None]}, step=step, **layout)

        self._each(log)

    def close(self) -> None:
        """Let trackers write what they still hold."""
        self._each(lambda tracker: tracker.finish())
        self.accelerator.trackers = []

    def _each(self, call: Callable[[Any], None]) -> None:
        for tracker in list(self.accelerator.trackers):
            try:
                call(tracker)
            except Exception as error:  # a full disk, no network: each tracker has types of its own
                self.accelerator.trackers.remove(tracker)
                self.warn(f"{tracker.name} failed, and is left out from now on: {one_line(error)}")
