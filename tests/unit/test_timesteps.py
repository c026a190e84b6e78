import numpy as np
import pytest
import torch
from helpers import golden
from scipy.stats import norm

from diffusion.timesteps import LogitNormal, LossSecondMoment

FIGURES = golden("loss_second_moment.npz")


def test_probabilities_follow_the_published_ones():
    sampler = LossSecondMoment(8, history=3)
    for t, losses, weights in zip(FIGURES["t"], FIGURES["loss"], FIGURES["weights"], strict=True):
        sampler.update(torch.from_numpy(t), torch.from_numpy(losses))
        p = sampler.probabilities()
        np.testing.assert_allclose(p / p.sum(), weights / weights.sum(), atol=1e-9, rtol=0)


def test_what_is_saved_goes_on_as_if_it_had_not_been():
    samplers = [LossSecondMoment(8, history=3) for _ in range(2)]
    updates = [
        (torch.from_numpy(t), torch.from_numpy(loss)) for t, loss in zip(FIGURES["t"], FIGURES["loss"], strict=True)
    ]
    for update in updates[:10]:
        samplers[0].update(*update)
    samplers[1].load_state_dict(samplers[0].state_dict())
    for sampler in samplers:
        for update in updates[10:]:
            sampler.update(*update)
    assert (samplers[0].probabilities() == samplers[1].probabilities()).all()


def test_weighted_losses_keep_the_mean_of_uniform_ones():
    """Whatever is drawn more often counts less: the estimate of the mean loss over t stays what it is."""
    sampler = LossSecondMoment(10, history=2)
    loss_of = torch.logspace(-2, 2, 10)
    for _ in range(2):
        sampler.update(torch.arange(10), loss_of)
    assert sampler.probabilities().max() > 0.5
    t, weights = sampler.draw(20000, torch.Generator().manual_seed(0))
    assert (loss_of[t] * weights).mean().item() == pytest.approx(loss_of.mean().item(), rel=0.02)
    drawn = np.bincount(t.numpy(), minlength=10) / 20000
    np.testing.assert_allclose(drawn, sampler.probabilities(), atol=0.02)


def test_a_loss_that_is_not_finite_is_not_remembered():
    sampler = LossSecondMoment(2, history=1)
    sampler.update(torch.tensor([0, 1, 1]), torch.tensor([1.0, 3.0, float("nan")]))
    assert sampler.probabilities() == pytest.approx([0.25, 0.75], abs=1e-3)


@pytest.mark.parametrize(("location", "scale"), [(0.0, 1.0), (-1.2, 0.5)])
def test_logits_of_s_are_normal(location, scale):
    """The share of timesteps up to each s, (t + 1) / T, is the normal distribution of its logit."""
    sampler = LogitNormal(100, location=location, scale=scale)
    t, weights = sampler.draw(50_000, torch.Generator().manual_seed(0))
    assert (weights == 1).all()
    s = np.arange(1, 100) / 100
    wanted = norm.cdf((np.log(s / (1 - s)) - location) / scale)
    np.testing.assert_allclose([(t + 1 <= 100 * value + 0.5).float().mean().item() for value in s], wanted, atol=0.01)


def test_few_steps_are_drawn_too():
    assert (LogitNormal(1).draw(5, torch.Generator())[0] == 0).all()
    assert set(LogitNormal(2).draw(99, torch.Generator())[0].tolist()) == {0, 1}
