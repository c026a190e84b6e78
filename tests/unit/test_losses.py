import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from helpers import golden, process, small_unet, tensor

from diffusion.config.schema import config_of
from diffusion.errors import UsageError
from diffusion.losses import discretized_gaussian_log_likelihood, min_snr, normal_kl, training_losses

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


def test_a_loss_is_the_sum_of_its_parts():
    parts = {"loss": torch.ones(5), "other": 2 * torch.ones(5)}
    terms = training_losses(process("cosine", 100), small_unet(), X0, T, NOISE, lambda case: dict(parts))
    assert terms["loss"].tolist() == [3] * 5
    assert terms["other"].tolist() == [2] * 5


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


# --- v-prediction and min-SNR -----------------------------------------------------------------------------------------

T = torch.tensor([0, 3, 40, 70, 99])
X0, NOISE = (torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in (1, 2))


def scheduler_of(p, **options):
    return DDPMScheduler(num_train_timesteps=100, trained_betas=p.schedule.betas, **options)


def test_v_is_that_of_diffusers():
    p = process("cosine", 100, mean="v")
    x_t = p.q_sample(X0, T, NOISE)
    v = scheduler_of(p).get_velocity(X0, NOISE, T)
    torch.testing.assert_close(p.mean_target(X0, x_t, T, NOISE), v, atol=1e-5, rtol=1e-5)
    output = torch.cat([v, torch.zeros_like(v)], dim=1)
    torch.testing.assert_close(p.p_mean_variance(output, x_t, T, False).pred_xstart, X0, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "x_start", "previous_x", "v"])
def test_min_snr_weights_an_error_of_x_0_by_the_clipped_snr(prediction):
    """Networks that predict x_0 with the same error have the same loss, whatever they predict it by."""
    p = process("cosine", 100, mean=prediction, variance="fixed_small", rescale=False)
    snr = compute_snr(scheduler_of(p), T)
    error = 0.1 * torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(3))

    def model(x_t, t):
        wrong = X0 + error
        return p.mean_target(wrong, x_t, T, p.predict_eps(x_t, T, wrong))

    terms = training_losses(p, model, X0, T, NOISE, "mse", torch.from_numpy(min_snr(p))[T].float())
    expected = snr.clamp(max=5) * (error**2).flatten(1).mean(1)
    torch.testing.assert_close(terms["mse"], expected, atol=1e-6, rtol=2e-3)


def test_min_snr_leaves_the_bound_as_it_is():
    p = process("cosine", 100)
    with torch.no_grad():
        weights = torch.from_numpy(min_snr(p))[T].float()
        plain, weighted = (training_losses(p, small_unet(), X0, T, NOISE, "mse", w) for w in (None, weights))
    assert torch.equal(plain["vb"], weighted["vb"])
    assert not torch.equal(plain["mse"], weighted["mse"])


def test_a_weighting_without_mse_is_refused():
    with pytest.raises(UsageError, match=r"diffusion\.weighting is min_snr, which is for mse losses, not for kl"):
        config_of({"diffusion": {"weighting": "min_snr", "loss": "kl"}})
