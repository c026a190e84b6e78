"""Tensors that FSDP2 has cut up over processes (DTensors), and those that it has not, by the same words."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, as a view: all of it, where it is not cut up."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """The whole tensor. Where it is cut up, every process has to ask at the same time."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def cut_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, known to every process, cut up as `other` is: itself, where that is whole or of another shape."""
    if isinstance(other, DTensor) and tensor.shape == other.shape:
        return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements, src_data_rank=None)
    return tensor


def weights_have_changed(model: nn.Module) -> None:
    """Let FSDP2 forget the whole weights that it keeps between two forward passes."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
