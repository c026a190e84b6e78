from functools import partial

import numpy as np
import pytest
import torch
from helpers import fill, golden, process, small_unet, tensor

from diffusion import UNetModel
from diffusion.samplers import ddim, ddim_reverse, ddpm, guided
from diffusion.sampling import batches, sample_batch

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


# --- classifier-free guidance -----------------------------------------------------------------------------------------


def conditional_unet(num_classes=5):
    return fill(UNetModel(3, 32, 6, 1, (2,), channel_mult=(1, 2), num_classes=num_classes), 4).eval()


def test_the_label_minus_one_is_no_class():
    """The network is then the one without classes, of the same other weights: guidance adds no key."""
    conditional = conditional_unet()
    weights = {name: value for name, value in conditional.state_dict().items() if name != "label_emb.weight"}
    plain = UNetModel(3, 32, 6, 1, (2,), channel_mult=(1, 2))
    plain.load_state_dict(weights)
    x, t = torch.randn(3, 3, 8, 8), torch.tensor([0.0, 40.0, 999.0])
    y = torch.tensor([-1, 2, -1])
    out = conditional(x, t, y)
    torch.testing.assert_close(out[[0, 2]], plain(x, t)[[0, 2]])
    assert (out[1] - plain(x, t)[1]).abs().max() > 0.01


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_guidance_is_that_of_ho_and_salimans(scale):
    """eps = (1 + w) eps(x, y) - w eps(x) with w = scale - 1 (eq. 6); the variance stays that of the class."""
    model = conditional_unet()
    x, t, y = torch.randn(4, 3, 8, 8), torch.full((4,), 300.0), torch.tensor([0, 1, 2, 4])
    with torch.no_grad():
        out = guided(partial(model, y=y), partial(model, y=torch.full_like(y, -1)), scale, 3)(x, t)
        with_class, without = model(x, t, y), model(x, t, torch.full_like(y, -1))
    w = scale - 1
    torch.testing.assert_close(out[:, :3], (1 + w) * with_class[:, :3] - w * without[:, :3], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out[:, 3:], with_class[:, 3:], atol=1e-5, rtol=1e-5)


def test_a_guided_upsampler_sees_the_small_image_both_times():
    seen = []

    def model(x, t, y, low_res):
        seen.append((y.tolist(), low_res))
        return torch.zeros(len(x), 6, 8, 8)

    low_res = torch.randn(3, 3, 4, 4)
    labels = torch.tensor([1, 2, 3])
    for batch in batches(range(3), 2):
        here = slice(batch.start, batch.stop)
        sample_batch(process("cosine", 1000, "2"), model, (3, 8, 8), batch, labels=labels[here],
                     conditions={"low_res": low_res[here]}, guidance=2.0)  # fmt: skip
    assert [y for y, _ in seen] == [[1, 2], [-1, -1]] * 2 + [[3], [-1]] * 2
    assert all(torch.equal(small, low_res[:2]) for _, small in seen[:4])
    assert all(torch.equal(small, low_res[2:]) for _, small in seen[4:])
