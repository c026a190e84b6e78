"""The parts that the U-Net is made of, in 1, 2 or 3 dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
        # `F.group_norm` refuses one image of one pixel with one channel a group, of which the bias is left.
        out = torch.group_norm(x.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps)
        return out.to(x.dtype)


def normalization(channels: int) -> GroupNorm32:
    """The paper's normalisation: 32 groups (appendix A of the paper, after Ho et al. 2020)."""
    return GroupNorm32(32, channels)


class ShiftedSiLU(nn.SiLU):
    """SiLU behind a scalar bias."""

    bias_before: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x + self.bias_before)


class _Scaled:
    """A layer with Fixup's scalars: a bias on everything that it sees, padding included, and if it ends a branch a
    multiplier. Both are folded into the weights, since those are fewer than what they are multiplied with."""

    bias_before: nn.Parameter
    multiplier: nn.Parameter | None


class ScaledLinear(_Scaled, nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, *folded(self))


class _ScaledConv(_Scaled):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, *folded(self))  # type: ignore[attr-defined, arg-type]


class ScaledConv1d(_ScaledConv, nn.Conv1d): ...


class ScaledConv2d(_ScaledConv, nn.Conv2d): ...


class ScaledConv3d(_ScaledConv, nn.Conv3d): ...


Layer = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear
SCALED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: ScaledLinear, nn.Conv1d: ScaledConv1d, nn.Conv2d: ScaledConv2d, nn.Conv3d: ScaledConv3d,
}  # fmt: skip


def folded(layer: Layer) -> tuple[Tensor, Tensor]:
    """What the layer multiplies with and adds, its scalars, if any, included."""
    weight, bias = layer.weight, layer.bias
    assert bias is not None
    if isinstance(layer, _Scaled):
        bias = bias + layer.bias_before * weight.flatten(1).sum(1)
        if layer.multiplier is not None:
            weight, bias = layer.multiplier * weight, layer.multiplier * bias
    return weight, bias


def add_scalars(model: nn.Module, ends: Sequence[Layer]) -> None:
    """Fixup's third rule: a bias (0) before every layer and activation, a multiplier (1) for the `ends` of branches."""
    one = next(model.parameters()).detach().new_ones(1)  # of one element, since FSDP2 takes none of no axis
    for module in list(model.modules()):
        if isinstance(module, nn.SiLU):
            module.__class__ = ShiftedSiLU
        elif isinstance(module, Layer):
            module.__class__ = SCALED[type(module)]  # type: ignore[assignment]
            module.register_parameter("multiplier", None)
        else:
            continue
        module.bias_before = nn.Parameter(torch.zeros_like(one))
    for layer in ends:
        layer.multiplier = nn.Parameter(one.clone())


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
