"""What a continued run may change, and what is said of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion.config.fields import plain
from diffusion.config.schema import Config
from diffusion.errors import UsageError
from diffusion.run.checkpoint import Checkpoint

RESUMABLE = {
    "data": {"path", "workers", "allow_change", "on_error"},
    "model": {"use_checkpoint"},
    "train": {"steps", "gradient_accumulation", "lr", "lr_schedule", "scalar_lr_factor", "warmup_steps", "weight_decay",
              "grad_clip", "precision", "compile", "ema_warmup", "log_every", "log_with", "max_skipped"},
    "sample": {"every", "n", "sampler", "options", "steps", "guidance"},
    "checkpoint": {"every", "keep_last", "keep_every", "on_error"},
}  # fmt: skip
"""Settings that a continued run may change; any other would make it a different run."""


def continued_config(saved: Checkpoint, now: Config, out: Path) -> Config:
    """The configuration to continue with. Raises UsageError if it would make `out` a different run."""
    if saved.step == 0:
        raise UsageError(f"{out} is a converted model: begin a run with its weights with "
                         f"--config {out / 'config.yaml'} --train.init_from {out} --out NEW")  # fmt: skip
    if now.train.init_from is None:  # it matters no more
        now = dataclasses.replace(now, train=dataclasses.replace(now.train, init_from=saved.config.train.init_from))
    if now.train.steps < saved.step:
        raise UsageError(f"train.steps is {now.train.steps}, and {out} has done {saved.step}: --back_to STEP goes back")
    for section, name, before, after in _differences(saved.config, now):
        if name not in RESUMABLE.get(section, ()):
            raise UsageError(
                f"{section}.{name} is {plain(after)}, and {plain(before)} in the run {out} that this would continue: "
                f"set it back, or begin another run with --out NEW (with these weights, with --train.init_from {out})"
            )
    return now


def changes(saved: Checkpoint, now: Config, environment: Mapping[str, Any]) -> list[str]:
    """Messages about what has changed since `saved` was written: settings, and what rounding depends on."""
    settings = [f"{section}.{name} was {plain(before)} and is {plain(after)}"
                for section, name, before, after in _differences(saved.config, now)]  # fmt: skip
    rounding = [f"{name} {saved.environment.get(name)} then, {value} now"
                for name, value in environment.items() if saved.environment.get(name) != value]  # fmt: skip
    return [f"changed since step {saved.step}: {'; '.join(settings)}"] * bool(settings) + [
        f"the run continues with other rounding than it would have had: {'; '.join(rounding)}"
    ] * bool(rounding)


def _differences(before: Config, after: Config) -> list[tuple[str, str, Any, Any]]:
    """(section, field, value before, value after) of each field that differs, those of the data's source first."""
    old, new = dataclasses.asdict(before), dataclasses.asdict(after)
    return [(section, name, old[section].get(name), value) for section in old for name, value in new[section].items()
            if old[section].get(name) != value]  # fmt: skip
