"""The optimizer, its learning rate, and the training step of a configuration."""

from typing import Any

from accelerate import Accelerator
from torch import nn

from diffusion.config.schema import Config, TrainConfig
from diffusion.models.initialisation import scalars
from diffusion.process import GaussianDiffusion
from diffusion.training.step import TrainingStep

SAME_IN_TRAIN = "ema_rates", "ema_warmup", "ema_lengths", "seed", "grad_clip", "label_dropout", "steps"
SAME_IN_DATA = "random_flip", "unbounded"
"""Settings that the training step takes under the same name."""


def parameter_groups(network: nn.Module, scalar_lr_factor: float = 1.0) -> list[dict[str, Any]]:
    """All weights, then Fixup's scalars, if any, which do not decay."""
    scalar_params = scalars(network)
    apart = set(map(id, scalar_params))
    groups: list[dict[str, Any]] = [
        {"params": [p for p in network.parameters() if id(p) not in apart], "factor": 1.0},
        {"params": scalar_params, "factor": scalar_lr_factor, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def learning_rate(train: TrainConfig, step: int) -> float:
    """The learning rate of optimizer step `step` (0, 1, ...): at most that of a linear warm-up."""
    warming = train.lr * (step + 1) / train.warmup_steps if step < train.warmup_steps else train.lr
    return min(warming, train.lr * train.component("lr_schedule")(step, train.steps, train.warmup_steps))


def build_step(
    config: Config, network: nn.Module, process: GaussianDiffusion, accelerator: Accelerator
) -> TrainingStep:
    """The training step of a configuration."""
    train = config.train
    network.to(accelerator.device)  # before its weights are given to the optimizer
    optimizer = train.component("optimizer")(network, parameter_groups(network, train.scalar_lr_factor), train.lr)
    options: dict[str, Any] = {name: getattr(train, name) for name in SAME_IN_TRAIN}
    options |= {name: getattr(config.data, name) for name in SAME_IN_DATA}
    options |= dict(loss=config.diffusion.component("loss"), weighting=config.diffusion.component("weighting"))
    options |= dict(timesteps=train.component("timestep_sampler")(process.num_timesteps), accelerator=accelerator)
    options |= dict(gradient_accumulation=train.gradient_accumulation or 1)
    return TrainingStep(network, process, optimizer, **options)
