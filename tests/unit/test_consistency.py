"""Consistency training and sampling, on a mixture of two Gaussians whose map from noise to data is known."""

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.stats import kstest, norm

from diffusion import GaussianDiffusion, Schedule
from diffusion.errors import UsageError
from diffusion.losses import HUBER, training_losses
from diffusion.samplers import consistency
from diffusion.schedule import LOWEST_LOG_SNR, place_timesteps

MEANS, SPREADS, SHARES = np.array([-0.7, 0.4]), np.array([0.1, 0.2]), np.array([0.3, 0.7])
GRID = np.linspace(-2.5, 2.5, 20001)


def of_path(name, respacing=""):
    return GaussianDiffusion(Schedule.named(name, 1000, respacing), "x_start", "fixed_small")


def cdf(x, alpha=1.0, sigma=0.0):
    """That of alpha x_0 + sigma epsilon."""
    widths = np.sqrt((alpha * SPREADS) ** 2 + sigma**2)
    return sum(share * norm.cdf(x, alpha * mean, width)
               for share, mean, width in zip(SHARES, MEANS, widths, strict=True))  # fmt: skip


def map_of(p):
    """The end of the deterministic path through x_t: in one dimension, where paths do not cross, the same quantile."""
    quantiles = cdf(GRID)
    levels = p.tables["network_t"].astype(np.float32)

    def model(x, t):
        i = int(np.abs(levels - t[0].item()).argmin())
        at = cdf(x.double().numpy(), p.tables["alpha"][i], p.tables["sigma"][i])
        return torch.from_numpy(np.interp(at, quantiles, GRID)).float()

    return model


def denoiser_of(p):
    """The mean of x_0 given x_t."""

    def model(x, t):
        i = int(np.abs(p.tables["network_t"].astype(np.float32) - t[0].item()).argmin())
        alpha, sigma, x = p.tables["alpha"][i], p.tables["sigma"][i], x.double().numpy()[..., None]
        variance = (alpha * SPREADS) ** 2 + sigma**2
        odds = SHARES * norm.pdf(x, alpha * MEANS, np.sqrt(variance))
        means = MEANS + alpha * SPREADS**2 / variance * (x - alpha * MEANS)
        return torch.from_numpy((odds * means).sum(-1) / np.maximum(odds.sum(-1), 1e-300)).float()

    return model


def drawn(*shape, seed=0):
    """x_0 and noise, whose pixels are independent."""
    random = np.random.default_rng(seed)
    which = random.choice(2, shape, p=SHARES)
    x_start, noise = MEANS[which] + SPREADS[which] * random.standard_normal(shape), random.standard_normal(shape)
    return torch.from_numpy(x_start).float(), torch.from_numpy(noise).float()


def by_ode(x, level):
    """The map, by the probability flow ODE in y = x / alpha and the noise level: dy / dlevel = epsilon."""

    def slope(s, y):
        variance = SPREADS**2 + s**2
        odds = SHARES * norm.pdf(y[:, None], MEANS, np.sqrt(variance))
        return s * ((y[:, None] - MEANS) / variance * odds).sum(-1) / odds.sum(-1)

    return solve_ivp(slope, (level, 0.0), x, rtol=1e-8, atol=1e-10).y[:, -1]


@pytest.mark.parametrize("path", ["cosine", "flow"])
@pytest.mark.parametrize("t", [0, 30, 400, 800])
@pytest.mark.parametrize(("done", "gap"), [(0.0, 0.7), (1.0, 0.05)])
def test_the_loss_is_exact_where_the_map_is_known(path, t, done, gap):
    p, (x_start, noise) = of_path(path), drawn(20, 1, 1, 1)
    loss = training_losses(p, map_of(p), x_start, torch.full((20,), t), noise, "consistency", done=done)["loss"]
    levels = p.tables["sigma"] / p.tables["alpha"]
    r = max([i for i in range(t) if levels[i] <= levels[t] * (1 - gap)], default=-1)
    lower = levels[r] if r >= 0 else 0.0
    ends = [by_ode((x_start + level * noise).double().flatten().numpy(), level) if level else x_start.flatten().numpy()
            for level in (levels[t], lower)]  # fmt: skip
    expected = (np.sqrt((ends[0] - ends[1]) ** 2 + HUBER**2) - HUBER) / (1 - lower / levels[t]) / np.sqrt(levels[t])
    np.testing.assert_allclose(loss, expected, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("path", ["cosine", "flow"])
@pytest.mark.parametrize("t", [300, 500])
def test_the_map_is_where_training_rests(path, t):
    """The target is noisy, but not on average. That of the denoiser, where training begins, leads away from it."""
    p, (x_start, noise) = of_path(path), drawn(1000, 1, 16, 16)

    def gradient(model):
        found = []
        for direction in (torch.ones_like, torch.sign, torch.cos):
            a = torch.zeros((), requires_grad=True)
            moved = lambda x, t: model(x, t) + a * direction(x)  # noqa: E731, B023
            loss = training_losses(p, moved, x_start, torch.full((1000,), t), noise, "consistency")["loss"].mean()
            found.append(torch.autograd.grad(loss, a)[0].item())
        return np.linalg.norm(found)

    assert gradient(map_of(p)) < 0.1 * gradient(denoiser_of(p))


def test_samples_of_the_map_are_the_data():
    for path, respacing in (("cosine", "jumps1"), ("cosine", "jumps2"), ("cosine", "jumps4"), ("flow", "jumps3")):
        p, generator = of_path(path, respacing), torch.Generator().manual_seed(1)
        x_T = torch.randn(20_000, 1, 1, 1, generator=generator)
        x = consistency(p, map_of(p), x_T, lambda step: torch.randn(x_T.shape, generator=generator))  # noqa: B023
        assert kstest(x.flatten().numpy(), cdf).statistic < 0.015, (path, respacing)


@pytest.mark.parametrize("name", ["linear", "cosine", "flow", "gvp"])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_jumps_are_evenly_spaced_from_the_noise(name, n):
    path = Schedule.named(name, 1000).path
    with np.errstate(divide="ignore"):
        log_snr = np.log(path.alphas / path.sigmas)
    found = log_snr[place_timesteps(log_snr, f"jumps{n}")]
    expected = np.linspace(-LOWEST_LOG_SNR, LOWEST_LOG_SNR, n + 1)[1:]
    np.testing.assert_allclose(found[:-1], expected[:-1], atol=0.05)
    assert found[-1] == pytest.approx(LOWEST_LOG_SNR, abs=0.05) or (np.isneginf(log_snr[-1]) and np.isneginf(found[-1]))


def test_a_short_process_is_jumped_from_at_any_of_its_steps():
    kept = [Schedule.named(name, steps, f"jumps{steps}").timestep_map
            for name in ("cosine", "flow") for steps in (1, 2)]  # fmt: skip
    assert kept == [(0,), (0, 1), (0,), (0, 1)]


def test_jumps_that_cannot_be_placed_say_so():
    for wrong, says in (("jumps0", "not understood"), ("jumps", "not understood"), ("jumps2,3", "must be one number"),
                        ("jumps5000", "must be one number, from 1 to 997 of 1000 steps")):  # fmt: skip
        with pytest.raises(UsageError, match=says):
            Schedule.named("cosine", 1000, wrong)


def test_both_predictions_have_the_same_dropout():
    """A network that is nothing but a random output agrees with itself, but at the data."""
    p, (x_start, noise) = of_path("cosine"), drawn(4, 1, 8, 8)
    with torch.random.fork_rng():
        loss = training_losses(p, lambda x, t: torch.rand_like(x), x_start, torch.tensor([0, 9, 99, 999]), noise,
                               "consistency")["loss"]  # fmt: skip
    assert loss[0] > 0
    assert (loss[1:] == 0).all()


def test_only_the_last_prediction_is_clipped():
    p, seen = of_path("cosine", "jumps2"), []
    x = consistency(p, lambda x, t: seen.append(x) or torch.full_like(x, 2.0), torch.zeros(1, 1, 1, 1),
                    lambda step: torch.zeros(1, 1, 1, 1))  # fmt: skip
    assert seen[1].item() == pytest.approx(2 * p.path(0)[0])
    assert x.item() == 1
