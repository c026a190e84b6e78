"""What networks do with conditions beside classes, and how conditions are dropped."""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ABSENT = {"y": -1, "vector": math.nan, "image": math.nan}
"""What conditions are dropped by, in training and for guidance. (What an upsampler enlarges is never dropped.)"""


def drop(conditions: Mapping[str, Tensor], dropped: Tensor) -> dict[str, Tensor]:
    """Conditions without those of the images where `dropped` (B,) is true."""
    return {
        name: value.masked_fill(dropped.view(-1, *[1] * (value.ndim - 1)), ABSENT[name]) if name in ABSENT else value
        for name, value in conditions.items()
    }


class VectorEmbedding(nn.Module):
    """A linear layer for condition vectors (B, size) that starts at zero. Of NaN, which is no condition, it gives 0."""

    def __init__(self, size: int, channels: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(channels, size)), nn.Parameter(torch.zeros(channels))

    def forward(self, vector: Tensor) -> Tensor:
        given = ~vector.isnan().any(1, keepdim=True)
        return given * F.linear(vector.nan_to_num(), self.weight, self.bias)


def with_images(x: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
    """Images and their condition images `low_res` and `image`, if any, enlarged to the images' sizes, as channels. NaN,
    no condition, becomes 0."""
    mode, sizes = ("linear", "bilinear", "trilinear")[x.ndim - 3], x.shape[2:]
    images = [conditions[name].nan_to_num() for name in ("low_res", "image") if name in conditions]
    same = [image if image.shape[2:] == sizes else F.interpolate(image, sizes, mode=mode) for image in images]
    return torch.cat([x, *same], dim=1) if same else x
