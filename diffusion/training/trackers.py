"""Trackers of metrics and images, such as TensorBoard and wandb, through accelerate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import filter_trackers, get_available_trackers
from accelerate.utils import LoggerType
from PIL import Image

from diffusion.config.schema import Config
from diffusion.errors import UsageError, check_name, one_line


def check_trackers(names: Sequence[str]) -> list[str]:
    """The trackers `names`. Raises UsageError if accelerate does not know one, or it is not installed."""
    for name in names:
        check_name("train.log_with", name, [kind.value for kind in LoggerType if kind.value != "all"])
        if name not in [getattr(kind, "value", kind) for kind in get_available_trackers()]:
            raise UsageError(f"train.log_with has {name}, which is not installed: pip install {name}")
    return list(names)


class Trackers:
    """The trackers that `train.log_with` names. One that fails is left out from then on, and ends nothing.

    Raises UsageError if one cannot be started.
    """

    def __init__(self, accelerator: Accelerator, config: Config, out: Path, warn: Callable[[str], None]):
        self.accelerator, self.warn = accelerator, warn
        names = config.train.log_with
        if not names:
            return
        accelerator.project_configuration.set_directories(str(out / "trackers"))
        accelerator.log_with = filter_trackers(check_trackers(names), str(out / "trackers"))
        settings = {name: value if isinstance(value, int | float | str) else str(value)
                    for name, value in config.flat().items()}  # fmt: skip
        try:
            accelerator.init_trackers(out.name, config=settings)
        except Exception as error:  # of any tracker's own type
            raise UsageError(f"train.log_with {', '.join(names)} cannot be started: {one_line(error)}") from None

    def log(self, values: dict[str, Any], step: int) -> None:
        """Pass numbers on."""
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float) and name != "step"}
        self._each(lambda tracker: tracker.log(numbers, step=step))

    def log_grid(self, path: Path, step: int) -> None:
        """Pass a grid on, to the trackers that take images."""

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
            except Exception as error:  # of any tracker's own type: a full disk, no network
                self.accelerator.trackers.remove(tracker)
                self.warn(f"{tracker.name} failed, and is left out from now on: {one_line(error)}")
