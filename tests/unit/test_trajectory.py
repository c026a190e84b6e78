"""The published code's first 40 training steps: losses, gradients as zeroed layers wake up, and moving averages."""

import pytest
import torch
from helpers import fill, golden, process

from diffusion import UNetModel
from diffusion.ema import EMA
from diffusion.losses import training_losses
from diffusion.models.layers import zero_module
from diffusion.models.unet import AttentionBlock, ResBlock


@pytest.fixture(scope="module")
def ours():
    case = golden("trajectory.json")
    model = fill(UNetModel(**case["model"]), case["seed"])
    for module in model.modules():
        if isinstance(module, ResBlock):
            zero_module(module.out_layers[3])
        elif isinstance(module, AttentionBlock):
            zero_module(module.proj_out)
    zero_module(model.out[2])
    optimizer = torch.optim.AdamW(model.parameters(), lr=case["lr"], weight_decay=0, fused=True)
    ema = EMA(model, [case["ema_rate"]], warmup=False)
    p = process(case["schedule"], case["steps"])
    generator = torch.Generator().manual_seed(case["data_seed"])
    losses, grad_norms = [], []
    for step in range(40):
        x0 = torch.tanh(torch.randn(case["batch"], *case["shape"], generator=generator))
        t = torch.randint(0, case["steps"], (case["batch"],), generator=generator)
        noise = torch.randn(case["batch"], *case["shape"], generator=generator)
        loss = training_losses(p, model, x0, t, noise, "rescaled_mse")["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        if step < 4:
            grad_norms.append({name: q.grad.norm().item() for name, q in model.named_parameters()})
        optimizer.step()
        ema.update(step)
    ema_norms = {name: value.norm().item() for name, value in ema.averages[case["ema_rate"]].items()}
    return losses, grad_norms, ema_norms


def test_losses_follow_the_published_ones(ours):
    losses = golden("trajectory.npz")["loss"]
    assert ours[0][:20] == pytest.approx(losses[:20], rel=1e-4)
    assert ours[0] == pytest.approx(losses, rel=1e-2)


@pytest.mark.parametrize("step", range(4))
def test_zeroed_layers_wake_up_in_the_published_order(ours, step):
    expected = golden("trajectory.json")["grad_norm_first_steps"][step]
    for name, norm in ours[1][step].items():
        assert norm == pytest.approx(expected[name], rel=1e-3, abs=1e-7), name
        assert (norm == 0) == (expected[name] == 0), name


def test_averages_have_the_published_norms(ours):
    expected = golden("trajectory.json")["ema_norm"]
    # This bias comes before a normalisation of one channel a group, which takes it away again: its gradient is
    # rounding alone, and Adam makes steps of it whose sum no two machines share.
    noise = "output_blocks.3.0.out_layers.3.bias"
    assert 0 < ours[2].pop(noise) < 1e-3 > expected.pop(noise)
    assert ours[2] == pytest.approx(expected, rel=1e-3)
