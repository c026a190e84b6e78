import numpy as np
import pytest
import torch
from helpers import golden, process, small_unet, tensor

FIGURES = golden("losses.npz")
MEANS = {"epsilon": "epsilon", "x0": "x_start", "previous": "previous_x"}
CASES = sorted({tuple(key.split("|")[1:4]) for key in FIGURES if key.startswith("p|")})


@pytest.mark.parametrize("case", CASES, ids="|".join)
def test_mean_variance_and_prediction_are_the_published_ones(case):
    mean, variance, clip = case
    p = process("cosine", 100, "", MEANS[mean], variance)
    x0, noise, t = (tensor(FIGURES[name]) for name in ("x0", "noise", "t"))
    x_t = p.q_sample(x0, t, noise)
    with torch.no_grad():
        out = p.p_mean_variance(small_unet(variance)(x_t, p.network_t(t)), x_t, t, clip == "clip=True")
    for name, value in out._asdict().items():
        expected = FIGURES[f"p|{mean}|{variance}|{clip}|{name}"]
        # 1e-4 of each image's largest value: at t = 99 x0 is the difference of two numbers 1600 times x_t, so that
        # a value that happens to lie near 0 keeps float32's absolute and not its relative precision.
        scale = abs(expected).max(axis=(1, 2, 3), keepdims=True)
        assert (abs(value.numpy() - expected) <= 1e-4 * scale).all(), name


def test_every_kind_of_mean_and_variance_is_covered():
    assert len(CASES) == 3 * 4 * 2


def test_the_three_means_agree_when_they_say_the_same():
    generator = torch.Generator().manual_seed(0)
    x0 = torch.rand(5, 1, 4, 4, generator=generator) * 2 - 1
    noise = torch.randn(5, 1, 4, 4, generator=generator)
    t = torch.tensor([0, 1, 30, 70, 99])
    for mean in ("epsilon", "x_start", "previous_x"):
        p = process("cosine", 100, "", mean, "fixed_small")
        x_t = p.q_sample(x0, t, noise)
        said = p.p_mean_variance(p.mean_target(x0, x_t, t, noise), x_t, t, clip_denoised=False)
        torch.testing.assert_close(said.mean, p.q_posterior(x0, x_t, t)[0], atol=1e-4, rtol=1e-4)
        # at t = 99 the signal is all but gone, so eps says little about x0
        torch.testing.assert_close(said.pred_xstart[:4], x0[:4], atol=1e-3, rtol=1e-3)


def test_the_posterior_is_the_gaussian_that_bayes_gives():
    """q(x_{t-1} | x_t, x_0) is proportional to q(x_t | x_{t-1}) q(x_{t-1} | x_0): precisions add up."""
    p = process("linear", 100)
    t = 40
    beta, before = p.tables["betas"][t], p.tables["alphas_cumprod"][t - 1]
    precision = (1 - beta) / beta + 1 / (1 - before)
    x0, x_t = 0.3, -0.8
    mean = (np.sqrt(1 - beta) * x_t / beta + np.sqrt(before) * x0 / (1 - before)) / precision
    ours, log_variance = p.q_posterior(torch.full((1, 1), x0), torch.full((1, 1), x_t), torch.tensor([t]))
    assert ours.item() == pytest.approx(mean, rel=1e-5)
    assert log_variance.item() == pytest.approx(-np.log(precision), rel=1e-5)


def test_the_network_is_told_the_original_steps_on_the_scale_of_1000():
    t = torch.arange(4)
    assert process("cosine", 4000, "4").network_t(t).tolist() == [0.0, 333.25, 666.5, 999.75]
    assert process("cosine", 4000, "4", rescale=False).network_t(t).tolist() == [0, 1333, 2666, 3999]


def test_a_single_step_is_enough_for_a_process():
    p = process("cosine", 1000, "1")
    x = torch.ones(1, 1, 2, 2)
    for variance in ("fixed_small", "fixed_large"):
        q = process("cosine", 1000, "1", variance=variance)
        assert q.p_mean_variance(x, x, torch.zeros(1, dtype=torch.int64)).log_variance.isfinite().all()
    assert p.num_timesteps == 1
