import pytest
import torch

from diffusion.ema import EMA


def scalar(value):
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, value)
    return model


def test_averages_follow_their_closed_form():
    """Weights that jump from 0 to 1 and stay: after n updates the average is 1 - rate^n."""
    model = scalar(0.0)
    ema = EMA(model, [0.5, 0.9, 0.0])
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
    ema = EMA(model, [0.5])
    ema.update(0)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert not any(p.requires_grad for p in ema.averages[0.5].values())
