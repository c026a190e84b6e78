"""Randomness as a function of a key, never of what was drawn before.

Every random number comes from a generator that is seeded with the run's seed and a key such as ("train", step).
A resumed run therefore sees what an uninterrupted one sees, and image i of a seed is the same at any batch size.
(A GPU's generator gives other numbers than a CPU's.)
"""

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

BLOCK = 16
"""Images that share a generator: one each would cost a GPU a kernel launch per image and step."""


def seed_for(seed: int, *key: int | str) -> int:
    """A 64-bit seed for `key`, independent of those for other keys."""
    words = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in key]
    # The length ends the key, since a SeedSequence ignores trailing zeros.
    return int(np.random.SeedSequence([seed, *words, len(words)]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator_for(device: torch.device | str, seed: int, *key: int | str) -> torch.Generator:
    """A generator on `device` for `key`."""
    return torch.Generator(device).manual_seed(seed_for(seed, *key))


def image_noise(indices: range, shape: Sequence[int], device: torch.device | str, seed: int, step: int | str) -> Tensor:
    """Standard normal noise (len(indices), *shape) for images of `seed` at one step of a sampler, or at "x_T".

    Noise is drawn in blocks of `BLOCK` images and cut to `indices`, so an image's noise depends on its index only.
    Other shapes get other numbers: the stages of a cascade share a seed, but not their noise.
    """
    first, last = indices.start // BLOCK, (indices.stop - 1) // BLOCK
    generators = [generator_for(device, seed, "picture", *shape, step, block) for block in range(first, last + 1)]
    blocks = [torch.randn(BLOCK, *shape, device=device, generator=generator) for generator in generators]
    return torch.cat(blocks)[indices.start - first * BLOCK : indices.stop - first * BLOCK]
