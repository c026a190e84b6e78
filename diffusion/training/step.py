"""The training step: from a batch of images to updated weights and averages.

Timesteps, noise, flips and dropped labels are functions of (seed, step, position in the global batch), so the same
images give the same update on one process or many, with any gradient accumulation, and after a resume.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from numpy.typing import NDArray
from torch import Tensor, nn

from diffusion.ema import EMA
from diffusion.errors import UsageError
from diffusion.losses import Loss, training_losses, unweighted
from diffusion.models.conditions import ABSENT, drop
from diffusion.optimizers import ANY_THREADS
from diffusion.parallel.cores import CORES
from diffusion.parallel.launchers import on_cpu
from diffusion.parallel.sharding import shard_like, to_full
from diffusion.process import GaussianDiffusion
from diffusion.randomness import generator_for, seed_for
from diffusion.timesteps import LogitNormal, LossSecondMoment

LOSS_SCALES = 1.0, 2.0**24
"""Bounds of fp16's loss scale. Below, gradients vanish unnoticed; above, torch loses steps to it."""


class Draws(NamedTuple):
    """The random numbers of a step, for the whole global batch: the same in every process."""

    t: Tensor
    weights: Tensor
    noise: Tensor
    flip: Tensor
    dropped: Tensor


class StepResult(NamedTuple):
    """What a step computed, on the device: reading it waits for the device."""

    losses: Tensor
    """(B,), of this process's images."""
    t: Tensor
    """(B,), their timesteps."""
    weights: Tensor
    """(B,), 1 but where t is drawn by importance: there, the mean of losses * weights estimates that over uniform t."""
    grad_norm: Tensor
    skipped: Tensor
    """1.0 where a loss or gradient was not finite, and no weight was changed; else 0.0."""


@dataclass(eq=False)
class TrainingStep:
    """A callable that trains `network` on one batch.

    Args:
        network: moved to the accelerator's device and wrapped by it. Called with (x_t, t), and by keyword the labels y
            and conditions, if given.
        process: what the network's output means.
        optimizer: over the network's parameters. With torch's fused ones, a step never waits for the device.
        ema_rates: moving averages to keep, in `ema`, such as [0.9999]; `ema_warmup`, `ema_lengths`: see `EMA`.
        loss: see `training_losses`.
        weighting: see `diffusion.losses.WEIGHTINGS`.
        timesteps: what draws them (see `diffusion.timesteps`); None: all are equally likely.
        seed: of timesteps, noise, flips, dropout and dropped conditions.
        gradient_accumulation: micro-batches that each process's share of a batch is split into.
        grad_clip: the largest norm of the gradient.
        label_dropout: share of the images that are trained on without label, vector and image.
        random_flip: mirror half of the images, and their condition images, along their last axis.
        unbounded: images may have values beyond [-1, 1].
        steps: of the whole training, for losses that depend on the share that is done; None: all counts as done.
        accelerator: of several processes or mixed precision; by default a plain one.

    Attributes:
        step: how many steps are done.
    """

    network: nn.Module
    process: GaussianDiffusion
    optimizer: Any
    _: KW_ONLY
    ema_rates: Sequence[float] = ()
    ema_warmup: bool = True
    ema_lengths: Sequence[float] = ()
    loss: Loss | str = "rescaled_mse"
    weighting: Callable[[GaussianDiffusion], NDArray[np.float64]] = unweighted
    timesteps: LossSecondMoment | LogitNormal | None = None
    seed: int = 0
    gradient_accumulation: int = 1
    grad_clip: float | None = None
    label_dropout: float = 0.0
    random_flip: bool = False
    unbounded: bool = False
    steps: int | None = None
    accelerator: Accelerator = field(default_factory=lambda: Accelerator(cpu=on_cpu()))
    step: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        right = {"grad_clip": self.grad_clip is None or self.grad_clip > 0}
        right |= {"gradient_accumulation": self.gradient_accumulation >= 1}
        right |= {"label_dropout": 0 <= self.label_dropout < 1}
        if wrong := [name for name, holds in right.items() if not holds]:
            raise UsageError(f"{wrong[0]} is {getattr(self, wrong[0])}, which is out of range")
        optimized = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        if not any(id(p) in optimized for p in self.network.parameters()):
            raise UsageError("the optimizer has none of the network's parameters")
        whole, kind = getattr(self.optimizer, "whole_matrices", False), self.accelerator.distributed_type
        if whole and kind == DistributedType.FSDP:
            raise UsageError("train.optimizer is muon, which needs whole matrices, and FSDP shards them: use adamw")
        self.network.to(self.accelerator.device)
        # Only `model` is wrapped (DDP, autocast). Names and averages are those of `network`, which FSDP2 shards.
        self.model, self.optimizer = self.accelerator.prepare(self.network, self.optimizer)
        self.ema = EMA(self.network, self.ema_rates, self.ema_warmup, self.ema_lengths)
        self._weights = torch.from_numpy(self.weighting(self.process)).float().to(self.accelerator.device)
        self._importance = self.timesteps if isinstance(self.timesteps, LossSecondMoment) else None
        self._parameters, self._checked = list(self.network.parameters()), False
        self._groups = [dict(group) for group in self.optimizer.param_groups]
        self.model.train()

    def __call__(self, x_start: Tensor, y: Tensor | None = None, **conditions: Tensor) -> StepResult:
        """Train on this process's share of a batch.

        Args:
            x_start: (B, C, *sizes) in [-1, 1], in the order of `micro_batch_slices`.
            y: (B,), class labels, if the network has classes.
            conditions: the network's others by name, each of B rows.
        """
        accelerator, processes = self.accelerator, self.accelerator.num_processes
        given = conditions if y is None else {"y": y, **conditions}
        self._check(x_start, given)
        batch = len(x_start) * processes
        slices = micro_batch_slices(batch, accelerator.process_index, processes, self.gradient_accumulation)
        draws = self.draws(self.step, batch, x_start.shape[1:])
        done = 1.0 if self.steps is None else self.step / self.steps
        losses = torch.zeros_like(draws.weights)
        chunks = {name: value.chunk(len(slices)) for name, value in {"x_start": x_start, **given}.items()}
        for i, part in enumerate(slices):
            inputs = {name: mirror(values[i], draws.flip[part], x_start.ndim) for name, values in chunks.items()}
            images, inputs = inputs.pop("x_start"), drop(inputs, draws.dropped[part]) if self.label_dropout else inputs
            torch.manual_seed(seed_for(self.seed, "dropout", self.step, part.start))  # of whatever the network draws
            synced = nullcontext() if part == slices[-1] else accelerator.no_sync(self.model)
            with CORES.spared(self.network, images), synced:
                t, noise, model = draws.t[part], draws.noise[part], partial(self.model, **inputs)
                case = self.process, model, images, t, noise, self.loss, self._weights[t], done
                loss = training_losses(*case)["loss"]
                accelerator.backward((loss * draws.weights[part]).mean() / len(slices))
            losses[part] = loss.detach()
        if self._importance:
            self._importance.update(draws.t, accelerator.reduce(losses))  # every process learns of the whole batch
        grad_norm, skipped = self._update(losses)
        self.step += 1
        own, t, weights = (torch.cat([x[part] for part in slices]) for x in (losses, draws.t, draws.weights))
        return StepResult(own, t, weights, grad_norm, skipped)

    def _check(self, x_start: Tensor, given: Mapping[str, Tensor]) -> None:
        """Raise UsageError if a batch cannot be trained on."""
        if not len(x_start) or not x_start.is_floating_point():
            raise UsageError(f"x_start is {x_start.dtype} {tuple(x_start.shape)}; it must be float images in [-1, 1]")
        if not self._checked:  # once, since it waits for the device
            low, high = (end.item() for end in torch.aminmax(x_start))
            if not -1.001 <= low <= high <= 1.001 and not self.unbounded:
                raise UsageError(f"x_start has values from {low:g} to {high:g}; images must be scaled to [-1, 1]")
            self._checked = True
        if (y := given.get("y")) is not None and y.shape != x_start.shape[:1]:
            raise UsageError(f"labels y are {y.dtype} {tuple(y.shape)}; they must be integers ({len(x_start)},)")
        for name, value in given.items():
            if len(value) != len(x_start):
                raise UsageError(f"{name} has {len(value)} rows, and there are {len(x_start)} images")
        if self.label_dropout and not given.keys() & ABSENT.keys():
            raise UsageError(f"label_dropout is {self.label_dropout}, and there are no labels y and no conditions")
        if len(x_start) % self.gradient_accumulation:
            raise UsageError(f"{len(x_start)} images do not divide into {self.gradient_accumulation} micro-batches")

    def _update(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        """Let the optimizer take a step, unless a number is not finite. Returns the gradient's norm and `skipped`."""
        accelerator = self.accelerator
        accelerator.unscale_gradients(self.optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        if self.grad_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self.grad_clip, norm)
        norm = to_full(norm)
        finite = torch.isfinite(norm) & torch.isfinite(losses).all()
        skipped = (accelerator.reduce((~finite).float()) > 0).float()  # the same in all processes, without a sync
        # A scaler skips such a step by itself, and so do torch's fused optimizers if told, without a sync.
        optimizer = self.optimizer.optimizer
        fused = getattr(optimizer, "_step_supports_amp_scaling", False)
        if accelerator.scaler is None and fused:
            optimizer.found_inf = skipped
        if accelerator.scaler is not None or fused or not skipped:
            with CORES.spared(self.network) if isinstance(optimizer, ANY_THREADS) else nullcontext():
                self.optimizer.step()
        bound_loss_scale(accelerator.scaler)
        self.optimizer.zero_grad()
        if not accelerator.optimizer_step_was_skipped:
            self.ema.update(self.step, 1 - skipped)
        return norm, skipped

    def draws(self, step: int, batch: int, shape: Sequence[int]) -> Draws:
        """The random numbers of `step` for a global batch of `batch` images of `shape`."""
        device = self.accelerator.device
        generator = generator_for(device, self.seed, "step", step)
        t = torch.randint(self.process.num_timesteps, (batch,), device=device, generator=generator)
        weights = torch.ones(batch, device=device)
        if self.timesteps:
            drawn = self.timesteps.draw(batch, generator_for("cpu", self.seed, "timesteps", step))
            t, weights = (values.to(device) for values in drawn)
        noise = torch.randn(batch, *shape, device=device, generator=generator)
        flip = torch.rand(batch, device=device, generator=generator) < (0.5 if self.random_flip else 0.0)
        dropped = torch.rand(batch, device=device, generator=generator) < self.label_dropout
        return Draws(t, weights, noise, flip, dropped)

    def state_dict(self) -> dict[str, Any]:
        """The state beside weights and averages: the optimizer's, the loss scale and the history of losses."""
        others = {"scaler": self.accelerator.scaler, "importance": self._importance}
        states = {name: other.state_dict() for name, other in others.items() if other}
        # Some optimizers count in their groups, where the settings are, which a continued run may change.
        groups: dict[int, Any] = {}
        for i, (group, before) in enumerate(zip(self.optimizer.param_groups, self._groups, strict=True)):
            counted = [name for name in group if name not in ("lr", "params") and group[name] is not before.get(name)]
            groups[i] = {name: group[name] for name in counted}
        return {"optimizer": self.optimizer.state_dict()["state"], "groups": groups, **states}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned. The optimizer keeps its present learning rates."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        saved = {int(i): values for i, values in state.get("optimizer", {}).items()}
        moments = {i: {name: shard_like(x, parameters[i]) for name, x in values.items()} for i, values in saved.items()}
        self.optimizer.load_state_dict({"state": moments, "param_groups": self.optimizer.state_dict()["param_groups"]})
        for i, values in state.get("groups", {}).items():
            self.optimizer.param_groups[int(i)].update(values)
        if self._importance:
            self._importance.load_state_dict(state["importance"])
        if self.accelerator.scaler and "scaler" in state:
            self.accelerator.scaler.load_state_dict(state["scaler"])


def mirror(value: Tensor, flip: Tensor, ndim: int) -> Tensor:
    """Images (B, C, *sizes), of `ndim` axes, mirrored where `flip` (B,) is true; what has other axes, as it is."""
    return torch.where(flip.view(-1, *[1] * (ndim - 1)), value.flip(-1), value) if value.ndim == ndim else value


def micro_batch_slices(batch_size: int, rank: int, processes: int, accumulation: int) -> list[slice]:
    """The slices of the global batch that process `rank` trains on, one per micro-batch."""
    size = batch_size // (processes * accumulation)
    return [slice(first, first + size) for first in range(rank * size, batch_size, processes * size)]


def bound_loss_scale(scaler: torch.amp.GradScaler | None) -> None:
    """Keep fp16's loss scale within `LOSS_SCALES`."""
    low, high = LOSS_SCALES
    if scaler is not None and not low <= (scale := scaler.get_scale()) <= high:
        scaler.update(min(max(scale, low), high))
