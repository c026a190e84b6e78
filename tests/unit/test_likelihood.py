import math

import numpy as np
import pytest
import torch
from helpers import golden, process, small_unet, tensor

from diffusion.likelihood import bits_per_dim

FIGURES = golden("sampling.npz")


@pytest.mark.parametrize(("schedule", "steps", "respacing"), [("cosine", 1000, "20"), ("linear", 40, "")])
def test_bits_per_dim_are_the_published_ones(schedule, steps, respacing):
    x0 = tensor(FIGURES["x0"])
    model = small_unet()
    torch.manual_seed(6)
    bits = bits_per_dim(process(schedule, steps, respacing), model, x0, lambda step: torch.randn_like(x0))
    key = f"bpd|{schedule}|{steps}|{respacing or None}"
    for name, name_there in (("total", "total_bpd"), ("prior", "prior_bpd")):
        np.testing.assert_allclose(getattr(bits, name), FIGURES[f"{key}|{name_there}"], rtol=1e-4, atol=1e-3)
    for name in ("vb", "xstart_mse", "mse"):  # the published ones begin at T - 1
        np.testing.assert_allclose(getattr(bits, name).flip(1), FIGURES[f"{key}|{name}"], rtol=1e-4, atol=1e-3)


def test_the_ideal_denoiser_of_a_gaussian_gives_its_entropy():
    """For data N(mu, s^2) the reverse process is Gaussian and known, so the bound is the likelihood itself.

    Rounded to 256 levels of width 2 / 255 such data have log2(s * sqrt(2 pi e) * 255 / 2) bits each.
    """
    mu, s = 0.1, 0.2
    p = process("cosine", 200, variance="learned", rescale=False)
    alpha_bar = torch.tensor(p.tables["alphas_cumprod"], dtype=torch.float64)
    beta = torch.tensor(p.tables["betas"], dtype=torch.float64)

    def ideal(x, t):
        a, b = alpha_bar[t.long()][:, None], beta[t.long()][:, None]
        signal = a * s**2 + 1 - a  # the variance of x_t
        eps = torch.sqrt(1 - a) * (x - torch.sqrt(a) * mu) / signal
        variance = b * (signal - b) / (1 - b) / signal  # of x_{t-1} given x_t
        return torch.cat([eps, variance.log().expand_as(x)], dim=1).float()

    generator = torch.Generator().manual_seed(0)
    x0 = mu + s * torch.randn(500, 64, generator=generator)
    x0 = ((x0 + 1) * 127.5).round() / 127.5 - 1
    bits = bits_per_dim(p, ideal, x0, lambda step: torch.randn(500, 64, generator=generator), clip_denoised=False)
    assert bits.total.mean().item() == pytest.approx(math.log2(s * math.sqrt(2 * math.pi * math.e) * 255 / 2), abs=0.02)
    torch.testing.assert_close(bits.total, bits.prior + bits.vb.sum(1))
