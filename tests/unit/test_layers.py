import numpy as np
import pytest
import torch
from helpers import golden, tensor

from diffusion.models.layers import timestep_embedding, zero_module


@pytest.mark.parametrize("dim", [32, 33])
def test_timestep_embedding_is_the_published_one(dim):
    figures = golden("timestep_embedding.npz")
    np.testing.assert_allclose(timestep_embedding(tensor(figures["t"]), dim), figures[f"dim{dim}"], atol=1e-6, rtol=0)


def test_zero_module_zeroes_everything_and_lets_it_learn():
    layer = zero_module(torch.nn.Conv2d(3, 4, 3))
    assert all((p == 0).all() and p.requires_grad for p in layer.parameters())
