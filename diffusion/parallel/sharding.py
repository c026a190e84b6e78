"""One interface to plain and FSDP2-sharded tensors."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, as a view."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def to_full(tensor: Tensor) -> Tensor:
    """The whole tensor. All processes have to call this for a sharded one."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def to_host(state: Any, keep: bool = True) -> Any:
    """A state dict with whole tensors on the CPU, or, without `keep`, with None for each tensor. All processes have to
    call this."""
    if isinstance(state, Tensor):
        whole = to_full(state)
        return whole.cpu() if keep else None
    return {name: to_host(value, keep) for name, value in state.items()} if isinstance(state, Mapping) else state


def shard_like(tensor: Any, other: Tensor) -> Any:
    """A whole tensor, known to every process, sharded as `other` is; as it is if the shapes differ."""
    if isinstance(other, DTensor) and isinstance(tensor, Tensor) and tensor.shape == other.shape:
        return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements, src_data_rank=None)
    return tensor


def discard_full_weights(model: nn.Module) -> None:
    """Make FSDP2 discard the whole weights that it keeps between two forward passes, since the shards have changed."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
