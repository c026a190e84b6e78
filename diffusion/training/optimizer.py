"""The optimizer's parameter groups, and the learning rate's schedule."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from diffusion.config import TrainConfig
from diffusion.models.initialisation import scalars


def parameter_groups(network: nn.Module, scalar_lr_factor: float = 1.0) -> list[dict[str, Any]]:
    """All weights, then Fixup's scalars, if any, which do not decay."""
    scalar_params = scalars(network)
    weights = [p for p in network.parameters() if not any(p is scalar for scalar in scalar_params)]
    groups: list[dict[str, Any]] = [{"params": weights, "factor": 1.0}]
    return (
        [*groups, {"params": scalar_params, "factor": scalar_lr_factor, "weight_decay": 0.0}]
        if scalar_params
        else groups
    )


def learning_rate(train: TrainConfig, step: int) -> float:
    """The learning rate of optimizer step `step` (0, 1, ...): linear warm-up, then constant or half a cosine."""
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    if train.lr_schedule == "constant":
        return train.lr
    done = (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps)
    return train.lr * 0.5 * (1 + math.cos(math.pi * done))
