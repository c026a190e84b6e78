"""Optimizers and learning-rate schedules. Each is a function, and a line in `OPTIMIZERS` or `LR_SCHEDULES`.

Keyword-only parameters are the component's settings in the section `train`; a tuple in an `Annotated` type is a range.
"""

import math
from collections.abc import Callable
from typing import Annotated, Any

import torch
from torch import nn

from diffusion.optimizers.muon import Muon

Groups = list[dict[str, Any]]
Decay = Annotated[float, (0, 1e9)]
Share = Annotated[float, (0, 1)]


def adamw(network: nn.Module, groups: Groups, lr: float, *, weight_decay: Decay = 0.0) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019)."""
    return torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, fused=True)


def muon(network: nn.Module, groups: Groups, lr: float, *, weight_decay: Decay = 0.0, momentum: Share = 0.95) -> Muon:
    """Muon for hidden matrices and convolutions (see `Muon`), AdamW for the rest: what is named in the network's
    `outer`, and all that has one dimension."""
    outer: tuple[str, ...] = getattr(network, "outer", ())
    hidden = {id(p) for name, p in network.named_parameters() if p.ndim > 1 and not name.startswith(outer)}
    inner = [{**group, "params": [p for p in group["params"] if id(p) in hidden], "muon": True} for group in groups]
    rest = [{**group, "params": [p for p in group["params"] if id(p) not in hidden]} for group in groups]
    split = [group for group in (*inner, *rest) if group["params"]]
    return Muon(split, momentum, lr=lr, weight_decay=weight_decay, fused=True)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"adamw": adamw, "muon": muon}
ANY_THREADS = Muon, torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD
"""Optimizers whose step has the same bits on any number of threads."""


def constant(step: int, steps: int, warmup_steps: int) -> float:
    """The learning rate after the warm-up."""
    return 1.0


def cosine(step: int, steps: int, warmup_steps: int) -> float:
    """Half a cosine, from the end of the warm-up to 0 after the last step."""
    done = max(0, step - warmup_steps) / max(1, steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * done))


def wsd(step: int, steps: int, warmup_steps: int, *, decay_share: Annotated[float, (1e-9, 1)] = 0.4) -> float:
    """Warm-up, stable, decay: linearly to 0 over the last `decay_share` of the steps. A warm-up that lasts into the
    decay ends where the two meet."""
    return min(1.0, (1 - step / steps) / decay_share)


LR_SCHEDULES: dict[str, Callable[..., float]] = {"constant": constant, "cosine": cosine, "wsd": wsd}
"""(step, steps, warmup_steps) -> the factor of the learning rate at step 0, 1, ... (a linear warm-up bounds it)."""
