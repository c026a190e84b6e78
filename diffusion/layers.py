"""The parts that the U-Net is made of, in 1, 2 or 3 dimensions."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def zero_module(module: M) -> M:
    """Set every parameter of `module` to zero and return it.

    The last layer of each residual branch is treated so (Zhang et al. 2019, "Fixup Initialization", rule 1):
    the branch adds nothing at first, so every block starts as the identity on its skip path.
    """
    for parameter in module.parameters():
        parameter.detach().zero_()
    return module


def conv_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """A convolution over `dims` axes (1, 2 or 3), with the arguments of `nn.Conv2d`."""
    return {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims](*args, **kwargs)


class GroupNorm32(nn.GroupNorm):
    """Group normalisation that computes in float32 whatever the input's type, also under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        out = F.group_norm(x.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps)
        return out.to(x.dtype)


def normalization(channels: int) -> GroupNorm32:
    """The paper's normalisation: 32 groups (appendix A of the paper, after Ho et al. 2020)."""
    return GroupNorm32(32, channels)


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000) -> Tensor:
    """Sinusoids of `timesteps` (B,), which need not be whole: (B, dim), float32, cosines first.

    An odd `dim` ends in a column of zeros.
    """
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps.float()[:, None] * torch.exp(-math.log(max_period) * exponents)
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return F.pad(embedding, (0, dim % 2))


def _spatial_factor(dims: int) -> int | tuple[int, int, int]:
    """Levels halve height and width; a third axis (time, depth) keeps its length."""
    return (1, 2, 2) if dims == 3 else 2


class Upsample(nn.Module):
    """Nearest-neighbour upsampling to twice the size, then a 3x3 convolution if `use_conv`."""

    def __init__(self, channels: int, use_conv: bool, dims: int = 2):
        super().__init__()
        self.scale_factor = _spatial_factor(dims)
        if use_conv:
            self.conv = conv_nd(dims, channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        factor = self.scale_factor if isinstance(self.scale_factor, tuple) else float(self.scale_factor)
        x = F.interpolate(x, scale_factor=factor, mode="nearest")
        return self.conv(x) if hasattr(self, "conv") else x


class Downsample(nn.Module):
    """Half the size: by a strided 3x3 convolution if `use_conv`, else by the mean of each block."""

    def __init__(self, channels: int, use_conv: bool, dims: int = 2):
        super().__init__()
        factor = _spatial_factor(dims)
        if use_conv:
            self.op: nn.Module = conv_nd(dims, channels, channels, 3, stride=factor, padding=1)
        else:
            self.op = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}[dims](factor)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)
