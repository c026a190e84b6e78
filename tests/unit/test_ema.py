import numpy as np
import pytest
import torch

from diffusion.ema import EMA, exponent, reconstruct
from diffusion.errors import UsageError


def scalar(value):
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, value)
    return model


def test_averages_follow_their_closed_form():
    """Weights that jump from 0 to 1 and stay: after n updates the average is 1 - rate^n."""
    model = scalar(0.0)
    ema = EMA(model, [0.5, 0.9, 0.0], warmup=False)
    torch.nn.init.constant_(model.weight, 1.0)
    for step in range(5):
        ema.update(step)
    for rate in (0.5, 0.9, 0.0):
        assert ema.averages[rate]["weight"].item() == pytest.approx(1 - rate**5)


def test_warm_up_forgets_the_start():
    model = scalar(0.0)
    ema = EMA(model, [0.999], warmup=True)
    torch.nn.init.constant_(model.weight, 1.0)
    left = 1.0
    for step in range(20):
        ema.update(step)
        left *= (1 + step) / (10 + step)
    assert ema.averages[0.999]["weight"].item() == pytest.approx(1 - left)


def test_warm_up_ends_at_the_rate():
    model = scalar(0.0)
    ema = EMA(model, [0.9], warmup=True)
    torch.nn.init.constant_(model.weight, 1.0)
    ema.update(10**6)
    assert ema.averages[0.9]["weight"].item() == pytest.approx(0.1)


def test_averaging_does_not_touch_the_weights():
    model = torch.nn.Linear(3, 3)
    before = [p.clone() for p in model.parameters()]
    ema = EMA(model, [0.5], warmup=False)
    ema.update(0)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert not any(p.requires_grad for p in ema.averages[0.5].values())


# --- power-function averages ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_the_exponent_of_a_length_is_the_published_one(length, gamma):
    assert exponent(length) == pytest.approx(gamma, abs=0.005)  # EDM2, section 3.1


def test_a_power_function_average_has_its_profile():
    """Weights that are zero but after one update: the average is that update's share, (gamma + 1) t^gamma
    / T^(gamma + 1), and the standard deviation of the shares over the training time is the length."""
    steps, gamma, shares, hits = 400, exponent(0.1), [], range(9, 400, 39)
    for hit in hits:
        model = scalar(0.0)
        ema = EMA(model, [], lengths=[0.1])
        for step in range(steps):
            torch.nn.init.constant_(model.weight, float(step == hit))
            ema.update(step)
        shares.append(ema.averages["length0.1"]["weight"].item())
    at = (np.arange(steps) + 0.5) / steps
    profile = (gamma + 1) * at**gamma / steps
    np.testing.assert_allclose(shares, profile[hits], atol=2e-4)
    spread = np.average(at**2, weights=profile) - np.average(at, weights=profile) ** 2
    assert np.sqrt(spread) == pytest.approx(0.1, abs=1e-3)


@pytest.mark.parametrize("length", [0.04, 0.05, 0.07, 0.15])
def test_a_reconstructed_average_is_the_one_that_was_tracked(length):
    """Weights on a random walk with a drift; two averages are stored at sixteen times."""
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Linear(50, 1, bias=False)
    ema = EMA(model, [], lengths=[0.05, 0.1])
    direct = EMA(model, [], lengths=[length])
    stored, kept = [], []
    for step in range(1600):
        with torch.no_grad():
            model.weight += 0.01 + 0.03 * torch.randn(1, 50, generator=generator)
        ema.update(step)
        direct.update(step)
        if (step + 1) % 100 == 0:
            for of in (0.05, 0.1):
                stored.append(ema.averages[f"length{of}"]["weight"].clone())
                kept.append((of, step + 1))
    coefficients, error = reconstruct(kept, length, 1600)
    found = sum(c * value for c, value in zip(coefficients.tolist(), stored, strict=True))
    wanted = direct.averages[f"length{length}"]["weight"]
    assert error < 0.1
    assert (found - wanted).norm() / (wanted - model.weight).norm() < 0.02


def test_what_cannot_be_reconstructed_has_a_large_error():
    kept = [(length, step) for length in (0.05, 0.1) for step in (500, 1000)]
    assert reconstruct(kept, 0.1, 1000)[1] < 1e-6
    assert reconstruct(kept, 0.01, 1000)[1] > 0.3
    assert reconstruct(kept, 0.07, 900)[1] > 0.3  # nothing was stored between 500 and 900


@pytest.mark.parametrize("lengths", [[0.0], [0.3], [0.1, 0.1]])
def test_impossible_lengths_are_refused(lengths):
    with pytest.raises(UsageError, match="lengths are"):
        EMA(scalar(0.0), [], lengths=lengths)
