"""The configuration that all networks share."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Self

from torch import nn

from diffusion.config.fields import Section, section
from diffusion.errors import UsageError


@section("model")
class ModelConfig(Section):
    """What all networks share. A network is called with x_t, its timestep input, and by keyword those conditions that
    it has: labels `y` (-1 is none), `vector` and `image` (NaN is none), and the small images `low_res` of an upsampler.
    """

    network: str
    """network"""
    class_cond: bool = True
    """condition on the data's classes (of a folder, its subfolders)"""

    identity_at_start: ClassVar[bool] = False
    """Whether the output of a new network is zero, and each of its blocks the identity."""
    width_field: ClassVar[str | None] = None
    """The field that all widths are multiples of, if there is one."""
    compute_only: ClassVar[frozenset[str]] = frozenset()
    """Fields that change neither the shape nor the meaning of weights."""

    def at_width(self, width: int) -> Self:
        """The same network of another width. Raises UsageError if there is none."""
        if self.width_field is None:
            raise UsageError(f"{self.network} has no width that all others are multiples of: set it to null")
        changed: dict[str, Any] = {self.width_field: width}
        return dataclasses.replace(self, **changed)

    def check_sizes(self, sizes: Sequence[int]) -> None:
        """Raise UsageError, which begins with "size", if the network does not take images of `sizes`."""

    def build(self, shape: Sequence[int], outputs: int, **conditions: int) -> nn.Module:
        """The network with fresh weights.

        Args:
            shape: of one image, (C, *sizes).
            outputs: channels of the output, C or 2 C.
            conditions: how large those are that the network is given, 0 for none: `num_classes`; `vector_size`, the
                numbers of a vector; `image_channels`, those of the condition images.
        """
        raise NotImplementedError
