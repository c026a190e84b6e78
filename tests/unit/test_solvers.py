"""Solvers of few evaluations: against diffusers at the same timesteps, and by their order where the score is known."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler, IPNDMScheduler
from helpers import process, small_unet

from diffusion import GaussianDiffusion, Schedule
from diffusion.config.schema import config_of
from diffusion.errors import UsageError
from diffusion.process import PREDICTIONS
from diffusion.samplers import SAMPLERS, check_process, ddim, dpmpp, guided, heun, ipndm
from diffusion.sampling import sample_batch

X_T = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
RESPACINGS = ["logsnr16", "karras16", "20", [0, 3, 40, 100, 210, 400, 555, 700, 850, 960, 990, 996]]


def no_noise(step):
    raise AssertionError("a deterministic sampler draws no noise")


def inputs_of(sampler, p, model, noise=no_noise, **options):
    """What the network is shown at each evaluation, and then the result."""
    seen = []

    def recording(x, t):
        seen.append(x)
        return model(x, t)

    with torch.no_grad():
        x = sampler(p, recording, X_T, noise, clip_denoised=False, **options)
    return [*seen, x]


def toy(x, t):
    """A function that depends on x, t and neighbours as a network does, and costs nothing."""
    eps = 0.5 * torch.tanh((0.5 + t.view(-1, 1, 1, 1) / 2000) * x + 0.3 * x.roll(1, -1)) + 0.5 * x
    return torch.cat([eps, torch.zeros_like(eps)], dim=1)


def eps_of(model, p, x, i):
    with torch.no_grad():
        return model(x, p.network_t(torch.full((len(x),), i)))[:, :3]


# --- against diffusers ------------------------------------------------------------------------------------------------


class ThirdOrder(DPMSolverMultistepScheduler):
    """diffusers' third order weights the second divided difference by half of the integral of its polynomial, which
    makes it a method of order 2 (`test_a_solver_has_its_order` tells them apart). The other half is added here."""

    def multistep_dpm_solver_third_order_update(self, outputs, sample=None, **kwargs):
        x = super().multistep_dpm_solver_third_order_update(outputs, sample=sample, **kwargs)
        lambdas, alphas = [], []
        for k in (1, 0, -1, -2):
            alpha, sigma = self._sigma_to_alpha_sigma_t(self.sigmas[self.step_index + k])
            lambdas.append(float(torch.log(alpha) - torch.log(sigma)))
            alphas.append(alpha)
        h, h_0, h_1 = (a - b for a, b in itertools.pairwise(lambdas))
        m0, m1, m2 = outputs[-1], outputs[-2], outputs[-3]
        second = (h * (m0 - m1) / h_0 - h * (m1 - m2) / h_1) / ((h_0 + h_1) / h)
        return x - alphas[0] * ((math.exp(-h) - 1 + h) / h**2 - 0.5) * second


@pytest.mark.parametrize("respacing", RESPACINGS)
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_dpmpp_is_that_of_diffusers(schedule, order, respacing):
    p, model = process(schedule, 1000, respacing), toy
    ours = inputs_of(dpmpp, p, model, order=order)
    scheduler = ThirdOrder(
        trained_betas=process(schedule).schedule.betas, solver_order=order, solver_type="heun", lower_order_final=False
    )
    scheduler.set_timesteps(timesteps=list(p.schedule.timestep_map[::-1]))
    x = X_T
    for step, t in enumerate(scheduler.timesteps):
        torch.testing.assert_close(ours[step], x, atol=1e-4 * x.abs().max().item(), rtol=0)
        x = scheduler.step(eps_of(model, p, x, p.num_timesteps - 1 - step), t, x).prev_sample
    torch.testing.assert_close(ours[-1], x, atol=1e-4 * x.abs().max().item(), rtol=0)


@pytest.mark.parametrize("respacing", RESPACINGS)
def test_ipndm_is_that_of_diffusers(respacing):
    """Its scheduler has a schedule of its own; given ours, all steps but the last agree, which is of order 1 here."""
    p, model = process("cosine", 1000, respacing), toy
    ours = inputs_of(ipndm, p, model)
    sigmas, alphas = p.tables["sigma"][::-1], p.tables["alpha"][::-1]
    scheduler = IPNDMScheduler(trained_betas=[*sigmas.tolist(), 0.0])
    scheduler.set_timesteps(len(sigmas))
    scheduler.set_begin_index(0)
    scheduler.alphas = torch.tensor([*alphas, 1.0], dtype=torch.float32)  # its own lose digits near pure noise
    x = X_T
    for step, t in enumerate(scheduler.timesteps):
        torch.testing.assert_close(ours[step], x, atol=1e-4 * x.abs().max().item(), rtol=0)
        v = (eps_of(model, p, x, len(sigmas) - 1 - step) - float(sigmas[step]) * x) / float(alphas[step])
        x = scheduler.step(v, t, x).prev_sample


@pytest.mark.parametrize("respacing", RESPACINGS)
def test_heun_is_that_of_diffusers(respacing):
    p, model = process("cosine", 1000, respacing), toy
    ours = inputs_of(heun, p, model)
    scheduler = HeunDiscreteScheduler(trained_betas=process("cosine").schedule.betas)
    scheduler.set_timesteps(timesteps=list(p.schedule.timestep_map[::-1]))
    y = X_T / float(p.tables["alpha"][-1])
    evaluated = [p.num_timesteps - 1, *np.repeat(np.arange(p.num_timesteps - 1)[::-1], 2)]
    for step, (i, t) in enumerate(zip(evaluated, scheduler.timesteps, strict=True)):
        scheduler._step_index = step  # its own search finds the wrong one of two equal timesteps
        x = scheduler.scale_model_input(y, t)
        torch.testing.assert_close(ours[step], x, atol=1e-4 * x.abs().max().item(), rtol=0)
        y = scheduler.step(eps_of(model, p, x, int(i)), t, y).prev_sample
    torch.testing.assert_close(ours[-1], y, atol=1e-4 * y.abs().max().item(), rtol=0)
    assert len(ours) - 1 == 2 * p.num_timesteps - 1  # evaluations


def test_sampling_from_pure_noise_is_that_of_diffusers():
    """Zero-terminal SNR with v-prediction: DDIM agrees at every step, also from the last timestep, where alpha is 0."""
    p = GaussianDiffusion(Schedule.named("linear", 1000, "12", zero_terminal_snr=True), "v", "fixed_small")
    model = small_unet("fixed_small").eval()
    theirs = DDIMScheduler(beta_start=1e-4, beta_end=0.02, prediction_type="v_prediction", clip_sample=False,
                           rescale_betas_zero_snr=True, set_alpha_to_one=True)  # fmt: skip
    np.testing.assert_allclose(
        Schedule.named("linear", 1000, zero_terminal_snr=True).betas, theirs.betas.double(), atol=2e-5
    )
    theirs.set_timesteps(12)
    theirs.num_inference_steps = 12
    x, kept = X_T, p.schedule.timestep_map
    ours = inputs_of(ddim, p, model, noise=lambda step: 0.0)
    for step, (i, t) in enumerate(zip(range(11, 0, -1), kept[:0:-1], strict=True)):
        torch.testing.assert_close(ours[step], x, atol=2e-4, rtol=0)
        with torch.no_grad():
            v = model(x, p.network_t(torch.full((2,), i)))
        theirs.config.num_train_timesteps = 12 * (t - kept[i - 1])  # its step back, from t to our next one
        x = theirs.step(v, t, x).prev_sample
    torch.testing.assert_close(ours[11], x, atol=2e-4, rtol=0)


# --- by order ---------------------------------------------------------------------------------------------------------

MEANS, STDS, SHARES = (
    torch.tensor(v, dtype=torch.float64) for v in ([-0.6, 0.1, 0.7], [0.15, 0.1, 0.2], [0.3, 0.3, 0.4])
)


class Float64(GaussianDiffusion):
    def at(self, name, t, like):
        return torch.from_numpy(self.tables[name])[t].view(-1, 1)


def last_input(sampler, steps, **options):
    """What a sampler shows the exact denoiser of a mixture of Gaussians last, at log SNR 5: before the final step,
    which is of order 1."""
    alphas_cumprod = 1 / (1 + np.exp(-2 * np.linspace(5, -5.1, steps)))
    betas = 1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])
    p = Float64(Schedule(betas, tuple(range(steps)), steps), "epsilon", "fixed_small", rescale_timesteps=False)
    seen = []

    def denoiser(x, t):
        seen.append(x)
        a = float(alphas_cumprod[int(t[0])])
        variance = a * STDS**2 + 1 - a
        distance = x - MEANS * a**0.5
        share = torch.softmax(SHARES.log() - 0.5 * distance**2 / variance - 0.5 * variance.log(), dim=1)
        return (1 - a) ** 0.5 * (share * distance / variance).sum(1, keepdim=True)

    x_T = torch.randn(200, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sampler(p, denoiser, x_T, lambda step: 0, clip_denoised=False, **options)
    return seen[-1]


@pytest.fixture(scope="module")
def exact():
    return last_input(heun, 4097)


@pytest.mark.parametrize(
    ("sampler", "options", "lowest", "highest"),
    [(ddim, {}, 0.9, 1.1), (dpmpp, {"order": 1}, 0.9, 1.1), (dpmpp, {}, 1.9, 2.3), (dpmpp, {"order": 3}, 2.8, 3.3),
     (heun, {}, 1.9, 2.3), (ipndm, {"order": 2}, 1.85, 2.3)],
)  # fmt: skip
def test_a_solver_has_its_order(exact, sampler, options, lowest, highest):
    errors = [(last_input(sampler, steps, **options) - exact).abs().mean().item() for steps in (65, 129, 257)]
    for coarse, fine in itertools.pairwise(errors):
        assert lowest <= math.log2(coarse / fine) <= highest


# --- what they must hold for ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned", "learned_range"])
def test_every_prediction_and_variance_gives_the_same_samples(sampler, prediction, variance):
    """The network of a perfect prediction of one image, told in each way: all samplers end at that image."""
    p = process("cosine", 1000, "logsnr10", prediction, variance, rescale=False)
    image = torch.linspace(-0.9, 0.9, 192).view(1, 3, 8, 8)
    step_of = {t: i for i, t in enumerate(p.schedule.timestep_map)}

    def model(x, t):
        i = torch.tensor([step_of[int(t[0])]] * len(x))
        mean = p.mean_target(image.expand_as(x), x, i, p.predict_eps(x, i, image.expand_as(x)))
        return torch.cat([mean, torch.zeros_like(mean)], dim=1) if p.learns_variance else mean

    samples = sample_batch(p, model, (3, 8, 8), range(2), sampler=sampler)
    # Of ddpm noise is left; of ode the last step is a straight line, which the path of a diffusion is not.
    atol = {"ddpm": 0.05, "ode": 5e-3}.get(sampler, 2e-3)
    torch.testing.assert_close(samples, image.expand_as(samples), atol=atol, rtol=0)


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp", "ipndm", "heun"])
@pytest.mark.parametrize("prediction", ["v", "x_start"])
def test_a_schedule_that_ends_in_pure_noise_is_sampled_from_it(sampler, prediction):
    p = GaussianDiffusion(Schedule.named("cosine", 1000, "logsnr8", True), prediction, "fixed_small")
    assert p.schedule.timestep_map[-1] == 999
    samples = sample_batch(p, small_unet("fixed_small").eval(), (3, 8, 8), range(2), sampler=sampler)
    assert samples.isfinite().all()
    assert samples.std() > 0.1


def test_guidance_reaches_the_solvers():
    """The mean of two networks' outputs is extrapolated before the solver sees it."""
    p, model = process("linear", 1000, "logsnr6"), small_unet(num_classes=5).eval()
    y = torch.tensor([1, 4])
    with torch.no_grad():
        without_class = partial(model, y=torch.full_like(y, -1))
        by_guidance = dpmpp(p, guided(partial(model, y=y), without_class, 2.0, 3), X_T, no_noise)

        def by_hand(x, t):
            with_class, without = model(x, t, y), model(x, t, torch.full_like(y, -1))
            return torch.cat([2 * with_class[:, :3] - without[:, :3], with_class[:, 3:]], dim=1)

        torch.testing.assert_close(
            by_guidance, dpmpp(p, by_hand, X_T, no_noise), atol=1e-3, rtol=0
        )  # in another order of sums


def test_clipping_keeps_the_samples_in_range():
    p, model = process("cosine", 1000, "logsnr6"), small_unet().eval()
    for sampler in (dpmpp, ipndm, heun):
        assert sampler(p, model, X_T, no_noise, clip_denoised=False).abs().max() > 1
        assert sampler(p, model, X_T, no_noise).abs().max() <= 1


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampler", "options", "respacing", "message"),
    [("dpmpp", {"order": 3}, "2", "dpmpp of order 3 needs at least 3 steps, and is given 2"),
     ("ipndm", {}, "3", "ipndm of order 4 needs at least 4 steps, and is given 3"),
     ("dpmpp", {}, [0, 100, 500], "begins with pure noise, and the noisiest step, 500 of 1000, still holds 70% of"),
     ("heun", {}, "1", "still holds 100% of the image")],
)  # fmt: skip
def test_what_a_solver_cannot_do_is_said(sampler, options, respacing, message):
    p = process("cosine", 1000, respacing)
    with pytest.raises(UsageError, match=message.replace("(", r"\(")):
        check_process(sampler, options, p)
    with pytest.raises(UsageError):
        sample_batch(p, small_unet(), (3, 8, 8), range(1), sampler=sampler, options=options)
    with pytest.raises(UsageError, match=r"^sample\.steps: "):  # before the first step of a training run
        config_of({"sample": {"sampler": sampler, **options, "steps": respacing}})


def test_published_samplers_begin_where_they_are_told():
    check_process("ddim", {}, process("cosine", 1000, [0, 100, 500]))
    check_process("ddpm", {}, process("cosine", 1000, "1"))


def test_epsilon_cannot_be_predicted_in_pure_noise():
    for prediction in ("epsilon", "score"):
        with pytest.raises(UsageError, match=f"prediction is {prediction}, which does not determine x_0"):
            config_of({"diffusion": {"zero_terminal_snr": True, "prediction": prediction}})
    config_of({"diffusion": {"zero_terminal_snr": True, "prediction": "v"}})
