"""The diffusion transformer of Peebles & Xie (2022), "Scalable Diffusion Models with Transformers", with the published
parameter names.

    x ─ patches ─ + positions ─ block ─ ... ─ block ─ norm, scale and shift ─ linear ─ out

A block adds attention and an MLP to its input. The embedding of timestep and class scales and shifts what each is
given, and multiplies what each adds by a gate (adaLN-Zero). Gates, scales and shifts come from one linear layer that
starts at zero, as the output's does, so at first each block is the identity and the network's output is 0.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from diffusion.errors import prefixed
from diffusion.models.conditions import VectorEmbedding, with_images
from diffusion.models.layers import timestep_embedding, zero_module
from diffusion.models.rules import check_input, check_patches, check_transformer


class Linear(nn.Linear):
    """A linear layer that is drawn after Glorot & Bengio (2010), its bias zero."""

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 4 and x.device.type == "cpu":  # on some processors convolutions are twice as fast as products
            return F.conv2d(x.movedim(-1, 1), self.weight[..., None, None], self.bias).movedim(1, -1)
        return super().forward(x)


class Attention(nn.Module):
    """Multi-head self-attention: (B, rows, columns, width) -> the same shape."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads, self.qkv, self.proj = num_heads, Linear(width, 3 * width), Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        rows = rearrange(self.qkv(x), "b h w (three heads c) -> three b heads (h w) c", three=3, heads=self.num_heads)
        out = F.scaled_dot_product_attention(*rows)
        return self.proj(rearrange(out, "b heads (h w) c -> b h w (heads c)", h=x.shape[1]))


class MLP(nn.Module):
    """Two linear layers with GELU between them."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = Linear(width, hidden), Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Modulated(nn.Module):
    """What blocks and the output have in common: an embedding that gives `parts` vectors, zero at first."""

    def __init__(self, width: int, parts: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), zero_module(Linear(width, parts * width)))

    def vectors(self, emb: Tensor) -> Tensor:
        return rearrange(self.adaLN_modulation(emb), "b (parts c) -> parts b 1 1 c", c=emb.shape[1])

    def modulated(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return torch.addcmul(shift, self.norm(x), 1 + scale)


class DiTBlock(Modulated):
    """Attention and an MLP, each added to its input through a gate."""

    def __init__(self, width: int, num_heads: int, hidden: int):
        super().__init__(width, parts=6)
        self.attn, self.mlp = Attention(width, num_heads), MLP(width, hidden)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x (B, rows, columns, width), emb (B, width) -> (B, rows, columns, width)."""
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = self.vectors(emb)
        x = torch.addcmul(x, gate_attn, self.attn(self.modulated(x, shift_attn, scale_attn)))
        return torch.addcmul(x, gate_mlp, self.mlp(self.modulated(x, shift_mlp, scale_mlp)))


class FinalLayer(Modulated):
    """The output: a patch of values for each position."""

    def __init__(self, width: int, outputs: int):
        super().__init__(width, parts=2)
        self.linear = zero_module(Linear(width, outputs))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.linear(self.modulated(x, *self.vectors(emb)))


class DiT(nn.Module):
    """The diffusion transformer. Its arguments are those of the published class.

    Args:
        input_size: the image's size, or its height and width; any other size works, too, at its own positions.
        patch_size: side of the square patches, each of which is one position; divides both sizes.
        in_channels: channels of x.
        hidden_size: width; a multiple of 4 and of `num_heads`.
        depth: blocks.
        num_heads: attention heads.
        mlp_ratio: width inside the MLPs, in multiples of `hidden_size`.
        class_dropout_prob: above 0, the table of classes has a last row for no class. Nothing is dropped here: who
            trains gives the label -1.
        num_classes: condition on this many classes; None or 0 for none.
        learn_sigma: give twice as many channels, the second half for the variance.
        vector_size: numbers of a condition vector, 0 for none; as of `UNetModel`.
        image_channels: channels of condition images, 0 for none; as of `UNetModel`.

    Raises UsageError if `check_transformer` or `check_patches` does.
    """

    _no_split_modules = ("DiTBlock",)  # what accelerate's FSDP2 cuts up
    outer = "x_embedder.", "y_embedder.", "vector_emb.", "final_layer."
    """The layers between images or conditions and features, which Muon leaves to AdamW."""
    any_threads = True
    """See `parallel.cores`."""

    def __init__(
        self, input_size: int | Sequence[int] = 32, patch_size: int = 2, in_channels: int = 4, hidden_size: int = 1152,
        depth: int = 28, num_heads: int = 16, mlp_ratio: float = 4.0, class_dropout_prob: float = 0.1,
        num_classes: int | None = 1000, learn_sigma: bool = True, vector_size: int = 0, image_channels: int = 0,
    ):  # fmt: skip
        super().__init__()
        check_transformer(hidden_size, num_heads, mlp_ratio)
        sizes = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
        self.patch_size, self.in_channels, self.hidden_size = patch_size, in_channels, hidden_size
        self.num_classes, self.out_channels = num_classes or 0, in_channels * (2 if learn_sigma else 1)
        self.vector_size, self.image_channels = vector_size, image_channels
        patches = nn.Conv2d(in_channels + image_channels, hidden_size, patch_size, patch_size)
        nn.init.xavier_uniform_(patches.weight.view(hidden_size, -1))
        nn.init.zeros_(patches.bias)  # type: ignore[arg-type]
        self.x_embedder = nn.ModuleDict({"proj": patches})
        enter, leave = Linear(256, hidden_size), Linear(hidden_size, hidden_size)
        self.t_embedder = nn.ModuleDict({"mlp": nn.Sequential(enter, nn.SiLU(), leave)})
        drawn = [enter.weight, leave.weight]
        if num_classes:
            table = nn.Embedding(num_classes + (class_dropout_prob > 0), hidden_size)
            self.y_embedder = nn.ModuleDict({"embedding_table": table})
            drawn.append(table.weight)
        if vector_size:
            self.vector_emb = VectorEmbedding(vector_size, hidden_size)
        for weight in drawn:
            nn.init.normal_(weight, std=0.02)
        check_patches(sizes, patch_size)
        self.grid = sizes[0] // patch_size, sizes[1] // patch_size
        self.pos_embed = nn.Parameter(positions(self.grid, hidden_size)[None], requires_grad=False)
        widths = hidden_size, num_heads, round(hidden_size * mlp_ratio)
        self.blocks = nn.ModuleList(DiTBlock(*widths) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * self.out_channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, **conditions: Tensor) -> Tensor:
        """The output for noisy images.

        Args:
            x: (B, in_channels, height, width), its sizes divisible by `patch_size`.
            t: (B,), may be fractional.
            y: (B,) class labels, if and only if the model has classes; -1 is no class.
            conditions: as of `UNetModel`.

        Returns (B, out_channels, height, width). Raises UsageError if sizes or conditions do not fit.
        """
        check_input(self, x, y, conditions)
        with prefixed("the input's "):
            check_patches(x.shape[2:], self.patch_size)
        emb = self.t_embedder["mlp"](timestep_embedding(t, 256))
        if y is not None:
            emb = emb + self._class_embedding(y)
        if self.vector_size:
            emb = emb + self.vector_emb(conditions["vector"])
        grid = x.shape[2] // self.patch_size, x.shape[3] // self.patch_size
        where = self.pos_embed if grid == self.grid else positions(grid, self.hidden_size).to(x)[None]
        h = self.x_embedder["proj"](with_images(x, conditions)).movedim(1, -1) + where.view(1, *grid, -1)
        for block in self.blocks:
            h = block(h, emb)
        return rearrange(
            self.final_layer(h, emb), "b h w (p q c) -> b c (h p) (w q)", p=self.patch_size, q=self.patch_size
        )

    def _class_embedding(self, y: Tensor) -> Tensor:
        """Rows of the table; of no class, its last row or, without one, zero."""
        table: Any = self.y_embedder["embedding_table"]
        if table.num_embeddings > self.num_classes:
            return table(torch.where(y < 0, self.num_classes, y))
        return table(y.clamp(min=0)) * (y >= 0)[:, None]

    def last_layers(self) -> list[Any]:
        """The layers that start at zero."""
        modulated = [module for module in self.modules() if isinstance(module, Modulated)]
        return [*(module.adaLN_modulation[-1] for module in modulated), self.final_layer.linear]


def positions(grid: tuple[int, int], width: int) -> Tensor:
    """Fixed sinusoids of column and row: (rows * columns, width), a quarter each sine and cosine, columns first."""
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    rows, columns = (torch.arange(size, dtype=torch.float64)[:, None] * frequencies for size in grid)
    rows, columns = (torch.cat([angles.sin(), angles.cos()], dim=1) for angles in (rows, columns))
    both = columns.expand(grid[0], -1, -1), rows[:, None].expand(-1, grid[1], -1)
    return rearrange(torch.cat(both, dim=2), "h w c -> (h w) c").float()
