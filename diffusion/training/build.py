"""The optimizer, its learning rate, and the training step of a configuration."""

import dataclasses
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from diffusion.config.schema import Config, TrainConfig
from diffusion.models.initialisation import scalars
from diffusion.process import GaussianDiffusion
from diffusion.training.step import TrainingStep

SAME_IN_TRAIN = "ema_rates", "ema_warmup", "ema_lengths", "seed", "grad_clip", "label_dropout", "steps"
SAME_IN_DATA = "random_flip", "unbounded"
"""Settings that the training step takes under the same name."""


def parameter_groups(
    network: nn.Module, scalar_lr_factor: float = 1.0, narrow: nn.Module | None = None
) -> list[dict[str, Any]]:
    """All weights, then Fixup's scalars, if any, which do not decay; each group with the factor of its learning rate.

    With `narrow`, the same network of the width at which the rate was found, a weight with n times its inputs there has
    the factor 1 / n (muP; Yang et al. 2022, table 3, Adam). A table of classes has as many inputs at any width."""
    scalar_params, base = scalars(network), network if narrow is None else narrow
    apart, inputs = set(map(id, scalar_params)), {name: p.shape[1] for name, p in base.named_parameters() if p.ndim > 1}
    tables = {id(module.weight) for module in network.modules() if isinstance(module, nn.Embedding)}
    groups: dict[float, list[nn.Parameter]] = {}
    for name, p in network.named_parameters():
        if id(p) not in apart:
            factor = inputs[name] / p.shape[1] if name in inputs and id(p) not in tables else 1.0
            groups.setdefault(factor, []).append(p)
    fixup = {"params": scalar_params, "factor": scalar_lr_factor, "weight_decay": 0.0}
    weights: list[dict[str, Any]] = [{"params": params, "factor": factor} for factor, params in groups.items()]
    return [*weights, fixup] if scalar_params else weights


def learning_rate(train: TrainConfig, step: int) -> float:
    """The learning rate of optimizer step `step` (0, 1, ...): at most that of a linear warm-up."""
    warming = train.lr * (step + 1) / train.warmup_steps if step < train.warmup_steps else train.lr
    return min(warming, train.lr * train.component("lr_schedule")(step, train.steps, train.warmup_steps))


def build_step(
    config: Config, network: nn.Module, process: GaussianDiffusion, accelerator: Accelerator, *conditions: int
) -> TrainingStep:
    """The training step of a configuration, for its network of `conditions`: the arguments of `Config.network`."""
    train = config.train
    network.to(accelerator.device)  # before its weights are given to the optimizer
    narrow = None
    if train.lr_base_width is not None:
        with torch.device("meta"):
            base = dataclasses.replace(config, model=config.model.at_width(train.lr_base_width))
            narrow = base.network(*conditions)
    groups = parameter_groups(network, train.scalar_lr_factor, narrow)
    optimizer = train.component("optimizer")(network, groups, train.lr)
    options: dict[str, Any] = {name: getattr(train, name) for name in SAME_IN_TRAIN}
    options |= {name: getattr(config.data, name) for name in SAME_IN_DATA}
    options |= dict(loss=config.diffusion.component("loss"), weighting=config.diffusion.component("weighting"))
    options |= dict(timesteps=train.component("timestep_sampler")(process.num_timesteps), accelerator=accelerator)
    options |= dict(gradient_accumulation=train.gradient_accumulation or 1)
    return TrainingStep(network, process, optimizer, **options)
