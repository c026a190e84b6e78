"""The layers of the U-Net, in 1, 2 or 3 dimensions."""

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def zero_module(module: M) -> M:
    """Set every parameter of `module` to zero and return it.

    This is done to the last layer of each residual branch (Zhang et al. 2019, "Fixup Initialization", rule 1). The
    branch adds nothing at first, so every block starts as the identity on its skip path.
    """
    for parameter in module.parameters():
        parameter.detach().zero_()
    return module


class GroupNorm32(nn.GroupNorm):
    """Group normalisation that computes in float32 whatever the input's type, also under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        # Unlike `F.group_norm`, this accepts one value per group, which normalises to the bias.
        out = torch.group_norm(x.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps)
        return out.to(x.dtype)


def normalization(channels: int) -> GroupNorm32:
    """The paper's normalisation: 32 groups (appendix A of the paper, after Ho et al. 2020)."""
    return GroupNorm32(32, channels)


class _Scalable(nn.Module):
    """A layer that may carry Fixup's scalars: a bias on all of its input, padding included, and a multiplier.

    Both are folded into the weights, which have fewer elements than the activations.
    """

    bias_before: nn.Parameter | None
    multiplier: nn.Parameter | None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.register_parameter("bias_before", None)
        self.register_parameter("multiplier", None)


class SiLU(nn.SiLU):
    """SiLU, with Fixup preceded by a scalar bias."""

    bias_before: nn.Parameter | None

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("bias_before", None)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x if self.bias_before is None else x + self.bias_before)


class Linear(_Scalable, nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, *folded(self))


class _Conv(_Scalable):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, *folded(self))  # type: ignore[operator, arg-type]


class Conv1d(_Conv, nn.Conv1d): ...


class Conv2d(_Conv, nn.Conv2d): ...


class Conv3d(_Conv, nn.Conv3d): ...


Layer = Conv1d | Conv2d | Conv3d | Linear


def folded(layer: Layer) -> tuple[Tensor, Tensor]:
    """The weight and bias of `layer` with its scalars, if any, folded in."""
    weight, bias = layer.weight, layer.bias
    assert bias is not None
    if layer.bias_before is not None:
        bias = bias + layer.bias_before * weight.flatten(1).sum(1)
    if layer.multiplier is not None:
        weight, bias = layer.multiplier * weight, layer.multiplier * bias
    return weight, bias


def add_scalars(model: nn.Module, ends: Sequence[Layer]) -> None:
    """Add the scalars of Fixup's third rule: a bias (0) before every layer and activation, and a multiplier (1) for the
    layers `ends`, each the last one of a branch."""
    one = next(model.parameters()).detach().new_ones(1)  # one element, since FSDP2 rejects tensors without an axis
    for module in model.modules():
        if isinstance(module, SiLU | Layer):
            module.bias_before = nn.Parameter(torch.zeros_like(one))
    for layer in ends:
        layer.multiplier = nn.Parameter(one.clone())


def conv_nd(dims: int, *args: Any, **kwargs: Any) -> Conv1d | Conv2d | Conv3d:
    """A convolution over `dims` axes (1, 2 or 3), with the arguments of `nn.Conv2d`."""
    kinds: dict[int, Any] = {1: Conv1d, 2: Conv2d, 3: Conv3d}
    return kinds[dims](*args, **kwargs)


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000) -> Tensor:
    """Sinusoids of `timesteps` (B,), which may be fractional: (B, dim), float32, cosines first.

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
