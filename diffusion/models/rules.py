"""Which widths, heads and sizes the networks can have, and what they can be called with."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from diffusion.errors import UsageError


def check_widths(
    model_channels: int, channel_mult: Sequence[float], attention_resolutions: Sequence[int], num_heads: int = 1,
    num_heads_upsample: int = -1, num_head_channels: int = -1,
) -> None:  # fmt: skip
    """Raise UsageError, which begins with the argument's name, where `UNetModel` cannot have these widths or heads."""
    if model_channels < 32 or model_channels % 32:
        nearest = max(32, round(model_channels / 32) * 32)
        raise UsageError(f"model_channels is {model_channels}; it must be a multiple of 32, such as {nearest}")
    widths = [mult * model_channels for mult in channel_mult]
    if not widths or not all(0 < mult <= 64 for mult in channel_mult) or any(width % 32 for width in widths):
        right = f"numbers up to 64, each of which makes a multiple of 32 of model_channels {model_channels}"
        raise UsageError(f"channel_mult is {list(channel_mult)}; it must be a list of {right}")
    factors = [2**level for level in range(len(widths))]
    for factor in attention_resolutions:
        if factor not in factors:
            right = f"downsampling factors of {len(factors)} levels, {', '.join(map(str, factors))}"
            raise UsageError(f"attention_resolutions has {factor}; they must be {right}")
    upward = num_heads if num_heads_upsample == -1 else num_heads_upsample
    by_number = {"num_heads": num_heads, "num_heads_upsample": upward}
    heads = by_number if num_head_channels == -1 else {"num_head_channels": num_head_channels}
    for width, factor in zip(widths, factors, strict=True):
        for name, value in heads.items():
            if (factor in attention_resolutions or width == widths[-1]) and (value <= 0 or int(width) % value):
                raise UsageError(f"{name} is {value}, which does not divide {int(width)} channels")


def check_dims(dims: int) -> None:
    """Raise UsageError if there is no network over so many axes."""
    if dims not in (1, 2, 3):
        raise UsageError(f"dims is {dims}; it must be 1, 2 or 3")


def check_sizes(sizes: Sequence[int], levels: int) -> None:
    """Raise UsageError if the levels do not divide `sizes`, of which three axes keep the first one's length."""
    divisor = 2 ** (levels - 1)
    if any(size % divisor for size in sizes[-2:]):
        nearest = [max(divisor, round(size / divisor) * divisor) for size in sizes[-2:]]
        size, right = ("x".join(map(str, values)) for values in (sizes, [*sizes[:-2], *nearest]))
        raise UsageError(f"size is {size}, which {levels} levels do not divide: the nearest that they do is {right}")


def check_transformer(hidden_size: int, num_heads: int, mlp_ratio: float) -> None:
    """Raise UsageError, which begins with the argument's name, where `DiT` cannot have these widths or heads."""
    if hidden_size % 4:
        nearest = max(4, round(hidden_size / 4) * 4)
        raise UsageError(f"hidden_size is {hidden_size}; it must be a multiple of 4, such as {nearest}")
    if hidden_size % num_heads:
        raise UsageError(f"num_heads is {num_heads}, which does not divide hidden_size {hidden_size}")
    if not round(hidden_size * mlp_ratio):
        raise UsageError(f"mlp_ratio is {mlp_ratio}; it must be at least {1 / hidden_size:.2g}, one of {hidden_size}")


def check_patches(sizes: Sequence[int], patch_size: int) -> None:
    """Raise UsageError if `sizes` are not two that patches divide."""
    size = "x".join(map(str, sizes))
    if len(sizes) != 2:
        raise UsageError(f"size is {size}; a transformer needs images of two sizes, height and width")
    if any(size % patch_size for size in sizes):
        raise UsageError(f"size is {size}, which patch_size {patch_size} does not divide")


def check_input(network: Any, x: Tensor, y: Tensor | None, conditions: Mapping[str, Tensor]) -> None:
    """Raise UsageError if a network with `in_channels`, `num_classes`, `vector_size` and `image_channels` (0: none)
    cannot be called with these."""
    channels, classes = network.in_channels, network.num_classes
    if (y is not None) != bool(classes):
        has = f"{classes} classes" if classes else "no classes"
        raise UsageError(f"the model has {has}, and the call gives {'no ' if y is None else ''}labels y")
    if y is not None and (y.shape != x.shape[:1] or y.is_floating_point()):
        raise UsageError(f"labels y are {y.dtype} {tuple(y.shape)}; they must be integers ({len(x)},)")
    if x.shape[1] != channels:
        raise UsageError(f"the input has {x.shape[1]} channels, and the model {channels}")
    numbers = sum(value.shape[1] for value in conditions.values() if value.ndim == 2)
    image_channels = sum(value.shape[1] for value in conditions.values() if value.ndim > 2)
    if (numbers, image_channels) != (network.vector_size, network.image_channels):
        has = f"condition vectors of {network.vector_size} numbers and images of {network.image_channels} channels"
        raise UsageError(f"the model has {has}, and the call gives {numbers} and {image_channels}")
