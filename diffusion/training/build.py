"""The optimizer, its learning rate, and the training step of a configuration."""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from diffusion.config.schema import Config, TrainConfig
from diffusion.errors import UsageError
from diffusion.models.initialisation import scalars
from diffusion.optimizers.muon import Muon
from diffusion.process import GaussianDiffusion
from diffusion.training.step import TrainingStep

DECAY_SHARE = 0.4
"""Share of the steps over which the learning rate of `wsd` falls to 0."""
OUTER = "input_blocks.0.", "label_emb.", "out."
"""Layers between images or labels and features, which Muon leaves to AdamW."""


def parameter_groups(network: nn.Module, scalar_lr_factor: float = 1.0, muon: bool = False) -> list[dict[str, Any]]:
    """All weights, then Fixup's scalars, if any, which do not decay. With `muon`, the hidden matrices and convolutions
    are first, in a group of their own."""
    scalar_params = scalars(network)
    hidden = [p for name, p in network.named_parameters() if p.ndim > 1 and not name.startswith(OUTER)] if muon else []
    apart = {id(p) for p in (*scalar_params, *hidden)}
    groups: list[dict[str, Any]] = [{"params": hidden, "factor": 1.0, "muon": True}] if muon else []
    groups.append({"params": [p for p in network.parameters() if id(p) not in apart], "factor": 1.0})
    if scalar_params:
        groups.append({"params": scalar_params, "factor": scalar_lr_factor, "weight_decay": 0.0})
    return groups


def learning_rate(train: TrainConfig, step: int) -> float:
    """The learning rate of optimizer step `step` (0, 1, ...): linear warm-up, then `lr_schedule`.

    A warm-up that lasts into the decay of `wsd` ends where the two meet.
    """
    warming = train.lr * (step + 1) / train.warmup_steps if step < train.warmup_steps else train.lr
    if train.lr_schedule == "wsd":
        return min(warming, train.lr * min(1.0, (1 - step / train.steps) / DECAY_SHARE))
    if train.lr_schedule == "constant" or step < train.warmup_steps:
        return warming
    done = (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps)
    return train.lr * 0.5 * (1 + math.cos(math.pi * done))


def build_step(
    config: Config, network: nn.Module, process: GaussianDiffusion, accelerator: Accelerator
) -> TrainingStep:
    """The training step of a configuration. Raises UsageError if its optimizer cannot train sharded weights."""
    train, muon = config.train, config.train.optimizer == "muon"
    if muon and accelerator.distributed_type == DistributedType.FSDP:
        raise UsageError("train.optimizer is muon, which needs whole matrices, and FSDP shards them: use adamw")
    network.to(accelerator.device)  # before its weights are given to the optimizer
    groups = parameter_groups(network, train.scalar_lr_factor, muon)
    kind = Muon if muon else torch.optim.AdamW
    return TrainingStep(
        network, process, kind(groups, lr=train.lr, weight_decay=train.weight_decay, fused=True),
        ema_rates=train.ema_rates, ema_warmup=train.ema_warmup, ema_lengths=train.ema_lengths,
        loss=config.diffusion.loss, weighting=config.diffusion.weighting,
        timestep_sampler=train.timestep_sampler, seed=train.seed,
        gradient_accumulation=train.gradient_accumulation or 1, grad_clip=train.grad_clip,
        label_dropout=train.label_dropout, random_flip=config.data.random_flip, low_res_size=config.data.low_res_size,
        accelerator=accelerator,
    )  # fmt: skip
