"""A check that a configuration resumes exactly, on the user's machine and data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from diffusion import checkpoint
from diffusion.config import Config
from diffusion.training.build import parameter_groups
from diffusion.training.trainer import Trainer

STEPS = 4


class _Break(Exception):
    """Ends a run early, as a kill would."""


def verify_resume(config: Config, folder: Path) -> str | None:
    """Train a few steps in `folder` without interruption, and again with one.

    Returns None if both end with the same bits, otherwise the first tensor that differs, and by how much.
    """
    config = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, steps=STEPS),
        sample=dataclasses.replace(config.sample, every=STEPS + 1, n=1),
        checkpoint=dataclasses.replace(config.checkpoint, every=STEPS // 2, keep_last=0),
    )

    def break_off(step: int, metrics: object) -> None:
        if step == STEPS - 1:  # one step after the checkpoint is lost
            raise _Break

    Trainer(config, folder / "whole").run()
    broken = Trainer(config, folder / "broken")
    try:
        broken.run(break_off)
    except _Break:
        broken.close()
    Trainer(config, folder / "broken").run()
    ours, theirs = (dict(_tensors(folder / name, config)) for name in ("whole", "broken"))
    for name, value in ours.items():
        if not torch.equal(value, theirs[name]):
            return f"{name} differs by up to {(value.double() - theirs[name].double()).abs().max().item():.3g}"
    return None


def _tensors(run: Path, config: Config) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a run's last checkpoint, with a descriptive name."""
    saved = checkpoint.open_checkpoint(checkpoint.checkpoint_folder(run, STEPS))
    weights = saved.weights()
    yield from ((f"the weight {name}", value) for name, value in weights.items())
    for key in config.train.averages:
        yield from ((f"the average at {key} of {name}", value) for name, value in saved.ema(key).items())
    training = checkpoint.load_plain(saved.path / "training.pt")
    # in the optimizer's order
    model = saved.network(weights)
    named = {id(p): name for name, p in model.named_parameters()}
    names = [named[id(p)] for group in parameter_groups(model, 1.0) for p in group["params"]]
    for i, moments in training["step"]["optimizer"].items():
        yield from ((f"the optimizer's {kind} of {names[i]}", value) for kind, value in moments.items())
    for part in ("scaler", "importance"):
        values = (training["step"][part] or {}).items()
        yield from ((f"{part} {name}", torch.as_tensor(value)) for name, value in values if value is not None)
