"""The U-Net of Nichol & Dhariwal (2021), section 2.5 and appendix A, with the published parameter names.

The options of its sequel (Dhariwal & Nichol 2021, "Diffusion Models Beat GANs", section 3) are the last ones of the
same class.

    x ─ conv ─┬─ level 0 ─┬─ down ─ level 1 ─┬─ ... ─ middle ─ ... ─ level 1 ─ up ─ level 0 ─ out
              └───────────┴── long skips, one for each input block ──────────────────┘

A level is a row of residual blocks, each followed by attention at the resolutions that ask for it. Every residual
branch and the output end in a convolution that starts at zero (`zero_module`), so at first each block is the
identity on its skip path and the network's output is 0.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffusion.errors import UsageError, prefixed
from diffusion.models.conditions import VectorEmbedding, with_images
from diffusion.models.layers import (
    Conv1d,
    Downsample,
    Linear,
    SiLU,
    Upsample,
    conv_nd,
    folded,
    normalization,
    timestep_embedding,
    zero_module,
)  # fmt: skip
from diffusion.models.rules import check_dims, check_input, check_sizes, check_widths

AVX2 = torch.backends.cpu.get_cpu_capability() == "AVX2"
"""Whether this is a processor on which channels last trains slower, by 2 to 5%; all sample faster with it."""


class ResBlock(nn.Module):
    """Two convolutions, the timestep's embedding between them, and a skip path.

    Args:
        channels: input channels.
        emb_channels: width of the embedding.
        dropout: probability, before the last convolution.
        out_channels: output channels; another number than `channels` puts a 1x1 convolution on the skip path.
        use_scale_shift_norm: the embedding scales and shifts the second normalisation instead of being added.
        use_checkpoint: recompute the activations in the backward pass instead of keeping them.
        resample: an `Upsample` or `Downsample` without weights, for both paths of a block that changes the size.
        use_norm: normalise.
    """

    def __init__(
        self, channels: int, emb_channels: int, dropout: float, out_channels: int, dims: int = 2,
        use_scale_shift_norm: bool = False, use_checkpoint: bool = False, resample: Upsample | Downsample | None = None,
        use_norm: bool = True,
    ):  # fmt: skip
        super().__init__()
        self.use_scale_shift_norm, self.use_checkpoint, self.resample = use_scale_shift_norm, use_checkpoint, resample
        norm = normalization if use_norm else nn.Identity
        self.in_layers = nn.Sequential(norm(channels), SiLU(), conv_nd(dims, channels, out_channels, 3, padding=1))
        self.emb_layers = nn.Sequential(SiLU(), Linear(emb_channels, out_channels * (2 if use_scale_shift_norm else 1)))
        last = zero_module(conv_nd(dims, out_channels, out_channels, 3, padding=1))
        self.out_layers = nn.Sequential(norm(out_channels), SiLU(), nn.Dropout(dropout), last)
        self.skip_connection = nn.Identity() if out_channels == channels else conv_nd(dims, channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x (B, channels, ...), emb (B, emb_channels) -> (B, out_channels, ...)."""
        if self.use_checkpoint and torch.is_grad_enabled():
            return checkpoint(self._forward, x, emb, use_reentrant=False)
        return self._forward(x, emb)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.resample is None:
            h = self.in_layers(x)
        else:
            h = self.in_layers[2](self.resample(self.in_layers[:2](x)))
            x = self.resample(x)
        emb_out = self.emb_layers(emb).to(h.dtype)[(...,) + (None,) * (h.ndim - 2)]
        if self.use_scale_shift_norm:
            scale, shift = emb_out.chunk(2, dim=1)
            h = self.out_layers[1:](torch.addcmul(shift, self.out_layers[0](h), 1 + scale))
        else:
            h = self.out_layers(h + emb_out)
        return self.skip_connection(x) + h


class AttentionBlock(nn.Module):
    """Multi-head self-attention over all positions, added to its input.

    The channels of `qkv` are split into heads first and into q, k and v inside each head, as in the published
    weights; with `new_order` into q, k and v first.
    """

    def __init__(
        self, channels: int, num_heads: int = 1, use_checkpoint: bool = False, new_order: bool = False,
        use_norm: bool = True,
    ):  # fmt: skip
        super().__init__()
        if channels % num_heads:
            raise UsageError(f"num_heads is {num_heads}, which does not divide {channels} channels")
        self.num_heads, self.use_checkpoint = num_heads, use_checkpoint
        rows = "three heads c" if new_order else "heads three c"
        self.split, self.three = f"b ({rows}) n 1 -> b n {rows}", 2 if new_order else 3
        self.norm = normalization(channels) if use_norm else nn.Identity()
        self.qkv = Conv1d(channels, 3 * channels, 1)
        self.proj_out = zero_module(Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) -> the same shape."""
        if self.use_checkpoint and torch.is_grad_enabled():
            return checkpoint(self._forward, x, use_reentrant=False)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        # Two-dimensional convolutions keep channels last, and on a CPU are twice as fast as matrix products.
        h = rearrange(self.norm(x), "b c ... -> b c (...) 1")
        weight, bias = folded(self.qkv)
        rows = rearrange(F.conv2d(h, weight[..., None], bias), self.split, heads=self.num_heads, three=3)
        # Of rows in this order the gradient has the layout of h, and only contiguous ones take torch's fused path.
        q, k, v = (part.transpose(1, 2) for part in rows.contiguous().unbind(self.three))
        h = rearrange(F.scaled_dot_product_attention(q, k, v), "b heads n c -> b (heads c) n 1")
        weight, bias = folded(self.proj_out)
        return x + F.conv2d(h, weight[..., None], bias).reshape(x.shape)


class TimestepEmbedSequential(nn.Sequential):
    """A sequence of layers that passes the timestep's embedding to residual blocks."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


class UNetModel(nn.Module):
    """The U-Net with timestep embedding, attention, and optional class conditioning.

    Args:
        in_channels: channels of x.
        model_channels: the base width; a multiple of 32.
        out_channels: channels of the output (twice the image's where the variance is learned).
        num_res_blocks: residual blocks at each level on the way down; one more on the way up.
        attention_resolutions: the downsampling factors at which attention is used (4: at a quarter of the size).
        dropout: probability in the residual blocks.
        channel_mult: the width of each level, in multiples of `model_channels`.
        conv_resample: learned convolutions in down- and upsampling.
        dims: 1, 2 or 3 axes after the channels; of three, the first keeps its length.
        num_classes: condition on this many classes; None for none.
        use_checkpoint: save memory by recomputing activations.
        num_heads: attention heads; `num_heads_upsample` on the way up (-1: the same number).
        use_scale_shift_norm: condition on the embedding through the normalisation's scale and shift.
        num_head_channels: the width of a head, in place of the number of heads (-1: by number).
        resblock_updown: down- and upsample inside residual blocks.
        use_new_attention_order: split q, k and v across heads.
        image_size: of no effect, since the network runs at any size; the sequel's class has it.
        use_norm: normalise; without normalisation, see `diffusion.models.initialisation`.
        vector_size: condition on vectors of so many numbers (0: none), through a layer that starts at zero.
        image_channels: of condition images, concatenated to x. With those of x, it is the published SuperResModel.

    Raises UsageError if `check_widths` does.
    """

    _no_split_modules = "ResBlock", "AttentionBlock"  # what accelerate's FSDP2 cuts up
    outer = "input_blocks.0.", "label_emb.", "vector_emb.", "out."
    """The layers between images or conditions and features, which Muon leaves to AdamW."""

    # Long, so that the whole network can be read in one place.
    def __init__(
        self, in_channels: int, model_channels: int, out_channels: int, num_res_blocks: int,
        attention_resolutions: Sequence[int], dropout: float = 0, channel_mult: Sequence[float] = (1, 2, 4, 8),
        conv_resample: bool = True, dims: int = 2, num_classes: int | None = None, use_checkpoint: bool = False,
        num_heads: int = 1, num_heads_upsample: int = -1, use_scale_shift_norm: bool = False,
        num_head_channels: int = -1, resblock_updown: bool = False, use_new_attention_order: bool = False,
        image_size: int | None = None, use_norm: bool = True, vector_size: int = 0, image_channels: int = 0,
    ):  # fmt: skip
        super().__init__()
        heads = num_heads, num_heads_upsample, num_head_channels
        check_widths(model_channels, channel_mult, attention_resolutions, *heads)
        check_dims(dims)
        self.in_channels, self.out_channels, self.model_channels = in_channels, out_channels, model_channels
        self.num_classes, self.dims, self.levels = num_classes or 0, dims, len(channel_mult)
        self.vector_size, self.image_channels = vector_size, image_channels
        # See `parallel.cores`. The gradient of a scalar of Fixup's is a sum over a whole tensor, in parts by thread.
        self.any_threads = use_norm
        heads_up = num_heads if num_heads_upsample == -1 else num_heads_upsample
        emb_channels = 4 * model_channels

        def res_block(channels: int, width: int, resample: Upsample | Downsample | None = None) -> ResBlock:
            options = use_scale_shift_norm, use_checkpoint, resample, use_norm
            return ResBlock(channels, emb_channels, dropout, width, dims, *options)

        def attention(channels: int, heads: int) -> AttentionBlock:
            heads = heads if num_head_channels == -1 else channels // num_head_channels
            return AttentionBlock(channels, heads, use_checkpoint, use_new_attention_order, use_norm)

        def resample(kind: type[Upsample] | type[Downsample], channels: int) -> nn.Module:
            if resblock_updown:
                return res_block(channels, channels, kind(channels, False, dims))
            return kind(channels, conv_resample, dims)

        enter, leave = Linear(model_channels, emb_channels), Linear(emb_channels, emb_channels)
        self.time_embed = nn.Sequential(enter, SiLU(), leave)
        if num_classes:
            self.label_emb = nn.Embedding(num_classes, emb_channels)
        if vector_size:
            self.vector_emb = VectorEmbedding(vector_size, emb_channels)

        widths = [int(mult * model_channels) for mult in channel_mult]
        ch = widths[0]
        self.input_blocks = nn.ModuleList(
            [TimestepEmbedSequential(conv_nd(dims, in_channels + image_channels, ch, 3, padding=1))]
        )
        skip_channels = [ch]
        for level, width in enumerate(widths):
            for _ in range(num_res_blocks):
                layers: list[nn.Module] = [res_block(ch, width)]
                ch = width
                if 2**level in attention_resolutions:
                    layers.append(attention(ch, num_heads))
                self.input_blocks.append(TimestepEmbedSequential(*layers))
                skip_channels.append(ch)
            if level != len(widths) - 1:
                self.input_blocks.append(TimestepEmbedSequential(resample(Downsample, ch)))
                skip_channels.append(ch)

        self.middle_block = TimestepEmbedSequential(res_block(ch, ch), attention(ch, num_heads), res_block(ch, ch))

        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for i in range(num_res_blocks + 1):
                layers = [res_block(ch + skip_channels.pop(), width)]
                ch = width
                if 2**level in attention_resolutions:
                    layers.append(attention(ch, heads_up))
                if level and i == num_res_blocks:
                    layers.append(resample(Upsample, ch))
                self.output_blocks.append(TimestepEmbedSequential(*layers))

        last = zero_module(conv_nd(dims, ch, out_channels, 3, padding=1))
        self.out = nn.Sequential(normalization(ch) if use_norm else nn.Identity(), SiLU(), last)

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None, **conditions: Tensor) -> Tensor:
        """The output for noisy images.

        Args:
            x: (B, in_channels, ...), its last one (`dims` 1) or two sizes divisible by 2^(levels - 1).
            timesteps: (B,), may be fractional.
            y: (B,) class labels, if and only if the model has classes; -1 is no class (classifier-free guidance).
            conditions: `vector` (B, vector_size), `low_res` and `image` (B, C, ...), as far as the model has them.

        Returns (B, out_channels, ...). Raises UsageError if the size or the conditions do not fit.
        """
        check_input(self, x, y, conditions)
        with prefixed("the input's "):
            check_sizes(x.shape[2:], self.levels)
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels))
        if y is not None:
            emb = emb + self.label_emb(y.clamp(min=0)) * (y >= 0)[:, None]
        if self.vector_size:
            emb = emb + self.vector_emb(conditions["vector"])
        h = with_images(x, conditions)
        if self.dims == 2 and x.device.type == "cpu" and not (AVX2 and torch.is_grad_enabled()):
            h = h.contiguous(memory_format=torch.channels_last)
        skips = []
        for block in self.input_blocks:
            h = block(h, emb)
            skips.append(h)
        h = self.middle_block(h, emb)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), emb)
        return self.out(h)

    def last_layers(self) -> list[Any]:
        """The layers that the paper sets to zero: the output's, and the last one of every branch."""
        blocks = [module for module in self.modules() if isinstance(module, ResBlock | AttentionBlock)]
        ends = [block.out_layers[-1] if isinstance(block, ResBlock) else block.proj_out for block in blocks]
        return [*ends, self.out[-1]]
