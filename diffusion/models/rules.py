"""Which widths, heads and sizes the U-Net can have."""

from __future__ import annotations

from collections.abc import Sequence

from diffusion.errors import UsageError


def check_widths(
    model_channels: int,
    channel_mult: Sequence[float],
    attention_resolutions: Sequence[int],
    num_heads: int = 1,
    num_heads_upsample: int = -1,
    num_head_channels: int = -1,
) -> None:
    """Raise UsageError, which begins with the argument's name, where `UNetModel` cannot have these widths or heads."""
    if model_channels < 32 or model_channels % 32:
        nearest = max(32, round(model_channels / 32) * 32)
        raise UsageError(f"model_channels is {model_channels}; it must be a multiple of 32, such as {nearest}, with or "
                         "without normalisation, which is in 32 groups")  # fmt: skip
    widths = [mult * model_channels for mult in channel_mult]
    if not widths or not all(0 < mult <= 64 for mult in channel_mult) or any(width % 32 for width in widths):
        raise UsageError(f"channel_mult is {list(channel_mult)}; it must be a list of numbers above 0 and up to 64, "
                         f"each of which makes a multiple of 32 of model_channels {model_channels}")  # fmt: skip
    factors = [2**level for level in range(len(widths))]
    for factor in attention_resolutions:
        if factor not in factors:
            raise UsageError(f"attention_resolutions has {factor}, which is not a downsampling factor of "
                             f"{len(factors)} levels: choose from {', '.join(map(str, factors))}")  # fmt: skip
    by_width = num_head_channels != -1
    heads = {"num_head_channels": num_head_channels} if by_width else {
        "num_heads": num_heads,
        "num_heads_upsample": num_heads if num_heads_upsample == -1 else num_heads_upsample}  # fmt: skip
    for width, factor in zip(widths, factors, strict=True):
        if factor in attention_resolutions or width == widths[-1]:
            for name, value in heads.items():
                if value <= 0 or int(width) % value:
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
        raise UsageError(f"size is {'x'.join(map(str, sizes))}, which {levels} levels do not divide: the nearest that "
                         f"they do is {'x'.join(map(str, [*sizes[:-2], *nearest]))}")  # fmt: skip
