"""Flow matching: the published figures, what is the same under another name, and what a flow refuses."""

import itertools
import math

import numpy as np
import pytest
import torch
from helpers import fill, golden, tensor

from diffusion import GaussianDiffusion, Schedule, UsageError
from diffusion.config.schema import config_of
from diffusion.likelihood import bits_per_dim
from diffusion.losses import WEIGHTINGS, training_losses
from diffusion.models.dit import DiT
from diffusion.process import PREDICTIONS
from diffusion.samplers import ddim, ddpm, dpmpp, heun, ipndm, ode

FIGURES = {name: tensor(value) for name, value in golden("heirs/flow.npz").items()}
X_START, NOISE, Y = FIGURES["x1"], FIGURES["x0"], FIGURES["y"]
SCHEDULES = {"Linear": "flow", "GVP": "gvp"}
NAMES = {"velocity": "velocity", "noise": "epsilon", "score": "score"}
STEPS = (1000 * (1 - FIGURES["t"])).round().long() - 1
"""SiT's t goes from noise to data; ours are the steps s = 1/1000 to 1, the first of which is number 0."""


def flow(schedule="flow", prediction="velocity", steps=1000, respacing="", rescale=False, **options):
    made = Schedule.named(schedule, steps, respacing, **options)
    return GaussianDiffusion(made, prediction, "fixed_small", rescale)


@pytest.fixture(scope="module")
def network():
    case = golden("heirs/flow.json")
    return fill(DiT(**case["network"]), case["seed"]).eval()


def no_noise(step):
    raise AssertionError("a deterministic sampler draws no noise")


# --- the published figures --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SCHEDULES)
def test_the_path_its_velocity_and_what_follows_from_it_are_the_published_ones(path):
    p, arbitrary = flow(SCHEDULES[path]), -FIGURES["v"]
    torch.testing.assert_close(p.network_t(STEPS), FIGURES["t"])
    x_t = p.q_sample(X_START, STEPS, NOISE)
    torch.testing.assert_close(x_t, FIGURES[f"x_t|{path}"], rtol=1e-4, atol=1e-5)
    # Ours is d x / ds, and s = 1 - t.
    torch.testing.assert_close(-p.mean_target(X_START, x_t, STEPS, NOISE), FIGURES[f"u_t|{path}"], rtol=1e-4, atol=1e-5)
    eps = p.predict_eps(x_t, STEPS, p.predict_xstart(arbitrary, x_t, STEPS, clip_denoised=False))
    torch.testing.assert_close(eps, FIGURES[f"noise_of_v|{path}"], rtol=1e-4, atol=1e-4)
    sigma = p.at("sigma", STEPS, eps)
    torch.testing.assert_close(-eps / sigma, FIGURES[f"score_of_v|{path}"], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("key", [name for name in FIGURES if name.startswith("loss|")])
def test_losses_are_the_published_ones(key, network):
    _, path, prediction, weight = key.split("|")
    p = (
        flow(SCHEDULES[path], NAMES[prediction], 999, s_max=0.999)
        if prediction != "velocity"
        else flow(SCHEDULES[path])
    )
    weights = torch.from_numpy(WEIGHTINGS[{"None": "none"}.get(weight, weight)](p))[STEPS].float()
    sign = -1 if prediction == "velocity" else 1
    with torch.no_grad():
        loss = training_losses(p, lambda x, t: sign * network(x, t, Y), X_START, STEPS, NOISE, "mse", weights)["loss"]
    if prediction == "score" and weight == "None":  # there, errors of a score count as those of the noise
        loss = loss * p.at("sigma", STEPS, loss) ** 2
    np.testing.assert_allclose(loss, FIGURES[key], rtol=1e-4)


@pytest.mark.parametrize("key", [name for name in FIGURES if name.startswith("ode|")])
def test_samples_are_the_published_ones(key, network):
    """From t = 0 to 1 in even steps; of the noise, from 0.001 to 0.999: there, what the network is shown last."""
    _, path, prediction, method, count = key.split("|")
    count, seen = int(count), []
    if prediction == "velocity":
        kept = [1000 // count * (i + 1) - 1 for i in range(count)]
        p = flow(SCHEDULES[path], "velocity", 1000, kept)
    else:
        kept = [round(10 + 9980 / count * i) - 1 for i in range(count + 1)]
        p = flow(SCHEDULES[path], "epsilon", 9990, kept, s_max=0.999)

    def model(x, t):
        seen.append(x)
        return (-1 if prediction == "velocity" else 1) * network(x, t, Y)

    last = ode(p, model, NOISE, no_noise, order={"euler": 1, "heun2": 2}[method], clip_denoised=False)
    result = last if prediction == "velocity" else seen[-1]
    torch.testing.assert_close(result, FIGURES[key], rtol=1e-4, atol=1e-3)


# --- the same under another name --------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["flow", "gvp", "cosine", "linear"])
@pytest.mark.parametrize(("said", "asked"), list(itertools.permutations(PREDICTIONS, 2)))
def test_each_prediction_says_what_the_others_say(schedule, said, asked):
    """docs/flow.md: from the output of one kind, x_0, the noise, and with them the output of any other."""
    if schedule in ("flow", "gvp") and "previous_x" in (said, asked):
        return
    t = torch.tensor([0, 100, 500, 900])
    ends = {"s_max": 0.999} if schedule in ("flow", "gvp") else {}
    one, other = (
        GaussianDiffusion(Schedule.named(schedule, 1000, **ends), name, "fixed_small") for name in (said, asked)
    )
    x_t = one.q_sample(X_START, t, NOISE)
    x_start = one.predict_xstart(one.mean_target(X_START, x_t, t, NOISE), x_t, t, clip_denoised=False)
    noise = one.predict_eps(x_t, t, x_start)
    ours, wanted = other.mean_target(x_start, x_t, t, noise), other.mean_target(X_START, x_t, t, NOISE)
    scale = wanted.abs().amax((1, 2, 3), keepdim=True)
    assert ((ours - wanted).abs() < 5e-3 * scale).all()


def test_a_flow_is_a_diffusion_whose_images_are_scaled():
    """Where alpha / sigma is the same, x of one path times a number is x of the other, and a network for one is one for
    the other: DDIM ends at the same images."""
    straight = flow("flow", "v", respacing="20")
    alpha, sigma = straight.tables["alpha"], straight.tables["sigma"]
    squares = np.append(alpha**2, 1.0)  # index -1 is the data
    alphas_cumprod = alpha**2 / (alpha**2 + sigma**2)
    betas = 1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])
    preserving = GaussianDiffusion(Schedule(betas, tuple(range(20)), 20), "v", "fixed_small", rescale_timesteps=False)
    number = {round(float(value), 4): i for i, value in enumerate(straight.network_t(torch.arange(20)))}
    assert len(squares) == 21

    def image(x, t):
        """A denoiser of images on the preserving path."""
        return torch.tanh(x * (1 + t.view(-1, 1, 1, 1) / 20) + 0.3 * x.roll(1, -1))

    def v(p, x, t):
        return p.mean_target(image(x, t.float()), x, t, p.predict_eps(x, t, image(x, t.float())))

    def scaled(x, t):
        i = torch.tensor([number[round(float(value), 4)] for value in t])
        norm = torch.from_numpy(np.sqrt(alpha**2 + sigma**2)).float()[i].view(-1, 1, 1, 1)
        x_start = image(x / norm, i.float())
        return straight.mean_target(x_start, x, i, straight.predict_eps(x, i, x_start))

    ours = ddim(straight, scaled, NOISE, lambda step: 0.0)
    theirs = ddim(preserving, lambda x, t: v(preserving, x, t.long()), NOISE, lambda step: 0.0)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_on_the_straight_path_ddim_is_eulers_method():
    p = flow(respacing="13")
    model = lambda x, t: torch.tanh((1 + t.view(-1, 1, 1, 1)) * x + 0.3 * x.roll(1, -1))  # noqa: E731
    by_euler = ode(p, model, NOISE, no_noise, order=1, clip_denoised=False)
    torch.testing.assert_close(by_euler, ddim(p, model, NOISE, lambda step: 0.0, clip_denoised=False))


def test_gvp_is_the_cosine_schedule_and_its_velocity_v():
    gvp = flow("gvp")
    np.testing.assert_allclose(gvp.tables["alpha"] ** 2 + gvp.tables["sigma"] ** 2, 1)
    cosine = np.sqrt(np.cumprod(1 - Schedule.named("cosine", 1000).betas))
    assert abs(gvp.tables["alpha"] - cosine).max() < 0.01
    of_v = PREDICTIONS["v"](gvp)
    for ours, v in zip(PREDICTIONS["velocity"](gvp), of_v, strict=True):
        np.testing.assert_allclose(ours, math.pi / 2 * v, rtol=1e-12)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_velocity_of_a_diffusion_is_the_slope_of_its_path(schedule):
    """In closed form. (The cosine's last beta is capped.)"""
    path = Schedule.named(schedule, 1000).path
    if schedule == "cosine":
        angle = (path.s + 0.008) / 1.008 * math.pi / 2
        slopes = -np.sin(angle) * math.pi / 2 / 1.008 / math.cos(0.008 / 1.008 * math.pi / 2)
    else:
        betas = Schedule.named(schedule, 1000).betas
        slopes = -500 * (betas + np.append(betas[1:], 0)) / 2 * path.alphas
    np.testing.assert_allclose(path.alpha_slopes[5:-2], slopes[5:-2], rtol=0.02)
    of_sigma = -path.alphas * path.alpha_slopes / path.sigmas  # since alpha^2 + sigma^2 is 1
    np.testing.assert_allclose(path.sigma_slopes[20:-2], of_sigma[20:-2], rtol=0.01)


# --- the order of the solvers -----------------------------------------------------------------------------------------

MEANS, STDS, SHARES = (
    torch.tensor(v, dtype=torch.float64) for v in ([-0.6, 0.1, 0.7], [0.15, 0.1, 0.2], [0.3, 0.3, 0.4])
)
X_T = torch.randn(200, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Float64(GaussianDiffusion):
    def at(self, name, t, like):
        return torch.from_numpy(self.tables[name])[t].view(-1, 1)


def velocity_of_the_mixture(x, s):
    """The velocity of flow matching in closed form: E[epsilon - x_0 | x_s] for a mixture of Gaussians."""
    alpha, sigma = 1 - s, s
    variance = alpha**2 * STDS**2 + sigma**2
    distance = x - alpha * MEANS
    share = torch.softmax(SHARES.log() - 0.5 * distance**2 / variance - 0.5 * variance.log(), dim=1)
    x_start = (share * (MEANS + alpha * STDS**2 / variance * distance)).sum(1, keepdim=True)
    eps = (share * sigma / variance * distance).sum(1, keepdim=True)
    return eps - x_start


def samples_of_the_mixture(sampler, steps, **options):
    """At s = 1/64, which all numbers of steps share, so that the last step, of another order, is left out."""
    kept = np.linspace(1024 / 64, 1024, steps).round().astype(int) - 1
    p = Float64(Schedule.named("flow", 1024, kept.tolist()), "velocity", "fixed_small", rescale_timesteps=False)
    seen = []

    def model(x, t):
        seen.append((float(t[0]), x))
        return velocity_of_the_mixture(x, 1 - float(t[0]))

    sampler(p, model, X_T, lambda step: 0.0, clip_denoised=False, **options)
    return next(x for t, x in reversed(seen) if t < 1 and abs(t - (1 - 1 / 64)) < 1e-6)


@pytest.mark.parametrize(
    ("sampler", "options", "order"),
    [(ddim, {}, 1), (ode, {"order": 1}, 1), (ode, {}, 2), (heun, {}, 2), (dpmpp, {}, 2), (ipndm, {"order": 2}, 2)],
)
def test_a_solver_keeps_its_order_on_a_flow(sampler, options, order):
    exact = samples_of_the_mixture(ode, 1009)
    errors = [(samples_of_the_mixture(sampler, steps, **options) - exact).abs().mean().item() for steps in (64, 127)]
    assert errors[1] < 0.01
    assert order - 0.35 <= math.log2(errors[0] / errors[1]) <= order + 0.6


# --- how timesteps are drawn, and what is refused ---------------------------------------------------------------------


def settings(**diffusion):
    return config_of(
        {"diffusion": {"schedule": "flow", "prediction": "velocity", "variance": "fixed_small"} | diffusion}
    )


@pytest.mark.parametrize(
    ("diffusion", "says"),
    [
        ({"variance": "learned_range"}, "variance is learned_range, and a flow has none to learn"),
        ({"loss": "kl"}, "loss kl needs a diffusion's betas"),
        ({"prediction": "previous_x"}, "prediction previous_x needs a diffusion's betas"),
        ({"prediction": "epsilon"}, "does not determine x_0 in pure noise: .* s_max be below 1"),
        ({"zero_terminal_snr": True}, "zero_terminal_snr rescales betas, and schedule flow has none"),
        ({"s_max": 2.0}, "diffusion.s_max is 2.0; it must be from 0.9 to 1"),
        ({"schedule": "cosine", "s_max": 0.9}, "s_max belongs to schedule flow"),
    ],
)
def test_what_is_no_flow_is_refused(diffusion, says):
    with pytest.raises(UsageError, match=says):
        settings(**diffusion)


def test_a_flow_has_neither_ancestral_samples_nor_a_likelihood():
    with pytest.raises(UsageError, match="sampler ddpm needs a diffusion's betas"):
        config_of(
            {
                "diffusion": {"schedule": "flow", "prediction": "v", "variance": "fixed_small"},
                "sample": {"sampler": "ddpm"},
            }
        )
    p, model = flow(respacing="4"), lambda x, t: x
    for call in (
        lambda: ddpm(p, model, NOISE, lambda i: NOISE),
        lambda: bits_per_dim(p, model, NOISE, lambda i: NOISE),
    ):
        with pytest.raises(UsageError, match="needs a diffusion's betas"):
            call()


def test_noise_is_added_by_ddim_on_a_flow():
    """With eta 1 and the exact denoiser of normal data, samples stay normal: what DDIM adds is what it takes away."""
    p = flow("flow", "v", respacing="200")
    scale = torch.from_numpy(p.tables["alpha"] ** 2 + p.tables["sigma"] ** 2).float()
    number = {round(float(value), 4): i for i, value in enumerate(p.network_t(torch.arange(200)))}

    def model(x, t):
        i = torch.full((len(x),), number[round(float(t[0]), 4)])
        x_start = p.at("alpha", i, x) * x / scale[i].view(-1, 1)
        return p.mean_target(x_start, x, i, p.predict_eps(x, i, x_start))

    generator = torch.Generator().manual_seed(0)
    x_T = torch.randn(20_000, 1, generator=generator)
    samples = ddim(p, model, x_T, lambda i: torch.randn(x_T.shape, generator=generator), eta=1.0, clip_denoised=False)
    assert samples.std().item() == pytest.approx(1, abs=0.03)
    assert torch.corrcoef(torch.cat([samples, x_T], dim=1).T)[0, 1].abs() < 0.1
