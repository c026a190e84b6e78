"""Networks as a configuration chooses them. Each is a section with its own fields, and a line in `NETWORKS`."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from diffusion.config.fields import Finite, Positive, section, settings_of
from diffusion.errors import prefixed
from diffusion.models.base import ModelConfig
from diffusion.models.dit import DiT
from diffusion.models.initialisation import InitName, check_init, initialise
from diffusion.models.rules import check_patches, check_sizes, check_transformer, check_widths
from diffusion.models.unet import UNetModel


@section("model")
class UNet(ModelConfig):
    """The U-Net of the paper and of its sequel."""

    network: Literal["unet"] = "unet"
    model_channels: Annotated[int, Field(ge=32, le=8192)] = 32
    """base width, a multiple of 32"""
    num_res_blocks: Annotated[int, Field(ge=1, le=1000)] = 1
    """residual blocks at each level"""
    channel_mult: Annotated[tuple[int | Finite, ...], Field(strict=False)] = (1, 1)
    """width of each level in multiples of the base; each level after the first halves the size"""
    attention_resolutions: Annotated[tuple[int, ...], Field(strict=False)] = ()
    """downsampling factors with attention: 1, 2, 4, ... (4: at a quarter of the image's size)"""
    num_heads: Positive = 2
    """attention heads"""
    num_heads_upsample: Annotated[int, Field(ge=-1)] = -1
    """attention heads on the way up; -1: as on the way down"""
    num_head_channels: Annotated[int, Field(ge=-1)] = -1
    """channels of an attention head, in place of a number of heads; -1: by number"""
    use_new_attention_order: bool = False
    """order the rows of q, k and v as some weights of the sequel (Dhariwal & Nichol 2021) do"""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """dropout probability in the residual blocks"""
    conv_resample: bool = True
    """down- and upsample with learned convolutions"""
    resblock_updown: bool = False
    """down- and upsample inside residual blocks, as the sequel does"""
    use_scale_shift_norm: bool = True
    """the timestep scales and shifts the normalisation instead of being added"""
    use_checkpoint: bool = False
    """recompute activations in the backward pass: less memory, a third more work"""
    init: InitName = "zero"
    """initial weights: zero (the paper), fixup (for networks without normalisation), default (no layer is zero), small
    (1e-5 in place of zero)"""
    use_norm: bool = True
    """normalise in groups"""

    identity_at_start = True
    width_field = "model_channels"
    compute_only = frozenset({"dropout", "use_checkpoint", "init"})

    def __post_init__(self) -> None:
        with prefixed("model."):
            heads = self.num_heads, self.num_heads_upsample, self.num_head_channels
            check_widths(self.model_channels, self.channel_mult, self.attention_resolutions, *heads)
            check_init(self.init, self.use_norm)

    def check_sizes(self, sizes: Sequence[int]) -> None:
        check_sizes(sizes, len(self.channel_mult))

    def build(self, shape: Sequence[int], outputs: int, **conditions: int) -> UNetModel:
        options = settings_of(self) | conditions
        del options["network"], options["class_cond"], options["init"]
        network = UNetModel(shape[0], out_channels=outputs, dims=len(shape) - 1, **options)
        initialise(network, self.init)
        return network


@section("model")
class Transformer(ModelConfig):
    """The diffusion transformer, DiT."""

    network: Literal["dit"] = "dit"
    patch_size: Positive = 2
    """side of the square patches, each of which is one position"""
    hidden_size: Annotated[int, Field(ge=4, le=8192)] = 96
    """width, a multiple of 4"""
    depth: Annotated[int, Field(ge=1, le=1000)] = 6
    """blocks, each attention and an MLP"""
    num_heads: Positive = 3
    """attention heads"""
    mlp_ratio: Annotated[Finite, Field(gt=0, le=64)] = 4.0
    """width inside the MLPs, in multiples of hidden_size"""
    init: Literal["zero", "default", "small"] = "zero"
    """initial weights of the layers that begin at zero: zero (the paper), default (as any other layer), small (1e-5
    times the default)"""

    identity_at_start = True
    width_field = "hidden_size"
    compute_only = frozenset({"init"})

    def __post_init__(self) -> None:
        with prefixed("model."):
            check_transformer(self.hidden_size, self.num_heads, self.mlp_ratio)

    def check_sizes(self, sizes: Sequence[int]) -> None:
        check_patches(sizes, self.patch_size)

    def build(self, shape: Sequence[int], outputs: int, **conditions: int) -> DiT:
        options = settings_of(self) | conditions
        del options["network"], options["class_cond"], options["init"]
        options |= dict(in_channels=shape[0], learn_sigma=outputs != shape[0])
        network = DiT(shape[1:], **options)
        initialise(network, self.init)
        return network


NETWORKS: dict[str, type[ModelConfig]] = {"unet": UNet, "dit": Transformer}
