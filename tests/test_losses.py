import numpy as np
import pytest
import torch
from helpers import golden, process, small_unet, tensor

from diffusion.losses import discretized_gaussian_log_likelihood, normal_kl, training_losses

FIGURES = golden("losses.npz")
MEANS = {"epsilon": "epsilon", "x0": "x_start", "previous": "previous_x"}
CASES = sorted({tuple(key.split("|")[:4]) for key in FIGURES if "|" in key and not key.startswith("p|")})


@pytest.mark.parametrize("case", CASES, ids="|".join)
def test_losses_are_the_published_ones(case):
    schedule, mean, variance, loss = case
    terms_of_case = {k.split("|")[4]: v for k, v in FIGURES.items() if k.startswith("|".join(case) + "|")}
    x0, noise, t = (tensor(FIGURES[name]) for name in ("x0", "noise", "t"))
    p = process(schedule, 100, "", MEANS[mean], variance)
    with torch.no_grad():
        terms = training_losses(p, small_unet(variance), x0, t, noise, loss)
    assert terms.keys() == terms_of_case.keys()
    for name, value in terms_of_case.items():
        np.testing.assert_allclose(terms[name], value, rtol=1e-4, atol=1e-7, err_msg=name)


def test_every_combination_is_covered():
    schedules = {case[0] for case in CASES}
    assert len(CASES) == len(schedules) * 3 * 4 * 4


def test_the_bound_of_the_hybrid_loss_trains_the_variance_alone():
    p = process("cosine", 100)
    model = small_unet()
    x0 = torch.tanh(torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    terms = training_losses(p, model, x0, torch.tensor([0, 5, 50, 99]), torch.zeros_like(x0), "mse")
    terms["vb"].sum().backward()
    gradient = model.out[2].bias.grad
    assert (gradient[:3] == 0).all()
    assert (gradient[3:] != 0).all()


def test_kl_is_that_of_torch():
    m1, v1, m2, v2 = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
    normal = [torch.distributions.Normal(m, torch.exp(0.5 * v)) for m, v in ((m1, v1), (m2, v2))]
    expected = torch.distributions.kl_divergence(*normal)
    torch.testing.assert_close(normal_kl(m1, v1, m2, v2), expected)


def test_the_probabilities_of_all_levels_sum_to_one():
    levels = torch.arange(256) / 127.5 - 1
    for mean, log_scale in ((0.0, -3.0), (0.99, -4.0), (-1.2, -1.0)):
        log_p = discretized_gaussian_log_likelihood(levels, torch.tensor(mean), torch.tensor(log_scale))
        assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-4)
