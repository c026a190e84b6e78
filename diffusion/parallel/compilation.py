"""Compiling a network in place, so that its state-dict keys stay the published ones."""

import torch
from torch import nn

from diffusion.errors import one_line


def compile_network(network: nn.Module, device: torch.device) -> str | None:
    """Compile `network` at its first call for each kind of input, which takes half a minute or more.

    Returns None, or why this machine cannot compile, e.g. for want of a C++ compiler; the network is unchanged then.
    """
    try:
        torch.compile(lambda x: 2 * x + 1)(torch.ones(8, device=device))
    except Exception as error:  # whatever a compiler's installation lacks
        return one_line(error).split(" Set TORCHDYNAMO")[0]
    for module in network.modules():
        if isinstance(module, nn.Embedding):  # a compiled one adds up its gradient in another order at each call
            module.forward = torch.compiler.disable(module.forward)  # type: ignore[method-assign]
    network.compile()
    return None
