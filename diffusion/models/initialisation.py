"""Initialisation: the papers', Fixup's for the U-Net, and two that show why these work.

Fixup (Zhang, Dauphin & Ma 2019, "Fixup Initialization: Residual Learning Without Normalization", section 3) has three
rules. In this U-Net:

1. The output convolution and the last layer of every residual branch are zero.
2. Other layers are drawn after He et al. (2015): variance 2 / fan_in behind an activation (their gain for ReLU, which
   the paper uses; of a unit normal's variance SiLU keeps 0.36, ReLU 0.5), 1 / fan_in where none comes before (on the
   main path, where a factor of 2 would add up). Inside a branch, weights are scaled by L^(-1 / (2m - 2)). L is the
   number of branches, residual and attention blocks alike: all of them lie one behind the other on the way through the
   bottleneck; the long skips are concatenated, not added, and start no branch. m, the layers in a row in a branch, is 2
   for both kinds: convolution and convolution; q, k and v, and their projection. The timestep's linear layer enters a
   residual branch beside its first convolution, before its last layer: it adds nothing to m, and is scaled alike.
   Embeddings of classes stay as torch draws them.
3. Every branch ends in a scalar multiplier (1), and a scalar bias (0) stands before every convolution, linear layer and
   activation. The bias is on all that a layer sees, a convolution's padding of zeros included, which lets it be folded
   into the layer's own bias; those, one a channel, are kept, as all layers of the U-Net have them.
"""

import math
from typing import Any, Literal, get_args

import torch
from torch import nn

from diffusion.errors import UsageError
from diffusion.models.layers import Layer, add_scalars
from diffusion.models.unet import AttentionBlock, ResBlock, UNetModel

InitName = Literal["zero", "default", "small", "fixup"]
SMALL = 1e-5
"""The factor of last layers in the DDPM++ network of EDM (Karras et al. 2022)."""


def check_init(init: str, use_norm: bool) -> None:
    """Raise UsageError, which begins with the argument's name, where `init` is unknown or not for such a network."""
    if init not in get_args(InitName):
        raise UsageError(f"init is {init!r}; it must be one of {', '.join(get_args(InitName))}")
    if init == "fixup" and use_norm:
        raise UsageError("init is fixup, which is for networks without normalisation: set model.use_norm to false")


def initialise(model: Any, init: InitName) -> None:
    """Give a newly built U-Net or transformer the weights, and with fixup the scalars, that `init` names.

    zero: as built, last layers zero (the papers). default: last layers as any other layer is drawn. small: the same
    times 1e-5, without bias. fixup: see above; the model must be a U-Net without normalisation. Raises UsageError for
    another `init`, fixup with normalisation, and a model that has scalars already.
    """
    check_init(init, any(isinstance(module, nn.GroupNorm | nn.LayerNorm) for module in model.modules()))
    if scalars(model):
        raise UsageError(f"init {init} is for a new model, and this one has Fixup's scalars: build another")
    if init in ("default", "small"):
        for layer in model.last_layers():
            layer.reset_parameters()
            if init == "small":
                with torch.no_grad():
                    layer.weight.mul_(SMALL)
                    layer.bias.zero_()
    elif init == "fixup":
        _fixup(model)


def layers(model: UNetModel) -> list[Layer]:
    """Every convolution and linear layer."""
    return [module for module in model.modules() if isinstance(module, Layer)]


def branches(model: UNetModel) -> list[ResBlock | AttentionBlock]:
    """The blocks with a residual branch."""
    return [module for module in model.modules() if isinstance(module, ResBlock | AttentionBlock)]


def scalars(model: nn.Module) -> list[nn.Parameter]:
    """Fixup's scalar multipliers and biases."""
    return [p for name, p in model.named_parameters() if name.endswith(("multiplier", "bias_before"))]


def _fixup(model: UNetModel) -> None:
    found, last = branches(model), model.last_layers()
    residual = [block for block in found if isinstance(block, ResBlock)]
    first = [layer for block in residual for layer in (block.in_layers[2], block.emb_layers[1])]
    activated = [model.time_embed[2], *first]  # layers behind an activation, except the last
    inside = [*first, *(block.qkv for block in found if isinstance(block, AttentionBlock))]  # branches, except the last
    for layer in layers(model):
        gain = 2.0 if layer in activated else 1.0
        scale = len(found) ** -0.5 if layer in inside else 1.0
        nn.init.normal_(layer.weight, std=scale * math.sqrt(gain / layer.weight[0].numel()))
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    for layer in last:
        nn.init.zeros_(layer.weight)
    add_scalars(model, last[:-1])
