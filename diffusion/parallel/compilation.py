"""How a network is computed: compiled in place, so that state-dict keys stay the published ones; in what precision."""

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.errors import one_line
from diffusion.parallel.launchers import on_cpu


def compile_network(network: nn.Module, device: torch.device) -> str | None:
    """Compile `network` at its first call, as one graph, which takes half a minute or more.

    It is compiled for the size of the first batch. Others, such as a last one, are computed without: compiling again
    takes longer. Returns None, or why this machine cannot compile, e.g. for want of a C++ compiler; then the network is
    unchanged.
    """
    try:
        torch.compile(lambda x: 2 * x + 1)(torch.ones(8, device=device))
    except Exception as error:  # whatever a compiler's installation lacks
        return one_line(error).split(" Set TORCHDYNAMO")[0]
    for module in network.modules():
        if isinstance(module, nn.Embedding):
            module.forward = MethodType(_look_up, module)  # type: ignore[method-assign]
    network.compile(dynamic=False)
    compiled: Any = network._compiled_call_impl
    sizes: dict[bool, int] = {}

    def call(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        usual = len(x) == sizes.setdefault(network.training, len(x))
        return (compiled if usual else network._call_impl)(x, *args, **kwargs)

    network._compiled_call_impl = call
    return None


def _look_up(table: nn.Embedding, rows: Tensor) -> Tensor:
    """Rows of a table by a matrix product: a compiled look-up adds up its gradient in another order at each call."""
    chosen = rows[..., None] == torch.arange(table.num_embeddings, device=rows.device)
    with torch.autocast(rows.device.type, enabled=False):
        return chosen.to(table.weight.dtype) @ table.weight


def precision_of(setting: str | None) -> str:
    """The mixed precision that train.precision means on this machine. (A processor without bf16 takes ten times as long
    for it.)"""
    if setting != "auto":
        return setting or "no"
    if on_cpu():
        has = getattr(torch.cpu, "get_capabilities", dict[str, bool])().get("avx512_bf16", False)
    else:
        has = torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if has else "no"
