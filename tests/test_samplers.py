import numpy as np
import pytest
import torch
from helpers import golden, process, small_unet, tensor

from diffusion.samplers import ddim, ddim_reverse, ddpm

FIGURES = golden("sampling.npz")
CASES = [key for key in FIGURES if key.startswith(("ddpm|", "ddim|"))]


@pytest.mark.parametrize("case", CASES)
def test_samples_are_the_published_ones(case):
    name, schedule, respacing, variance, *eta = case.split("|")
    options = {"eta": float(eta[0].removeprefix("eta="))} if eta else {}
    x_T = tensor(FIGURES["xT"])
    p, model = process(schedule, 1000, respacing, variance=variance), small_unet(variance)
    sampler = {"ddpm": ddpm, "ddim": ddim}[name]
    torch.manual_seed(5)
    images = sampler(p, model, x_T, lambda step: torch.randn_like(x_T), **options)
    np.testing.assert_allclose(images, FIGURES[case], atol=1e-3, rtol=0)


def test_both_samplers_are_covered():
    assert len(CASES) == 10


def test_encoding_is_the_published_one():
    x_T = ddim_reverse(process("cosine", 1000, "10"), small_unet(), tensor(FIGURES["x0"]))
    np.testing.assert_allclose(x_T, FIGURES["ddim_reverse|cosine|10"], atol=1e-3, rtol=0)


def test_the_ideal_denoiser_of_a_gaussian_samples_that_gaussian():
    """For data N(mu, s^2) the best eps is known in closed form; both samplers must then give N(mu, s^2)."""
    mu, s = 0.3, 0.2
    p = process("cosine", 1000, "250", variance="fixed_small")
    alpha_bar = torch.tensor(p.tables["alphas_cumprod"], dtype=torch.float32)
    step_of = {round(float(t), 3): i for i, t in enumerate(p.network_t(torch.arange(p.num_timesteps)))}

    def ideal(x, network_t):
        a = alpha_bar[step_of[round(float(network_t[0]), 3)]]
        return torch.sqrt(1 - a) * (x - torch.sqrt(a) * mu) / (a * s**2 + 1 - a)

    generator = torch.Generator().manual_seed(0)
    x_T = torch.randn(4000, 1, generator=generator)
    for sampler in (ddpm, ddim):
        x = sampler(p, ideal, x_T, lambda step: torch.randn(4000, 1, generator=generator), clip_denoised=False)
        assert x.mean().item() == pytest.approx(mu, abs=0.02)
        assert x.std().item() == pytest.approx(s, rel=0.05)


def test_nothing_keeps_gradients():
    x = ddpm(process("cosine", 1000, "2"), small_unet(), torch.zeros(1, 3, 8, 8), lambda step: torch.zeros(1, 3, 8, 8))
    assert not x.requires_grad
