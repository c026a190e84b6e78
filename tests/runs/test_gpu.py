"""What can only be seen on a GPU. Skipped without one."""

import pytest
import torch
from accelerate import Accelerator

from diffusion.config.schema import config_of
from diffusion.training.build import build_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def step_of(**train):
    config = config_of({"train": train})
    accelerator = Accelerator(mixed_precision=train.get("precision", "no"))
    torch.manual_seed(0)
    step = build_step(config, config.network(10), config.diffusion.process(), accelerator)
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.rand(32, 1, 8, 8, device="cuda", generator=generator) * 2 - 1
    return step, x, torch.arange(32, device="cuda") % 10


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_step_never_waits_for_the_device(optimizer, precision):
    step, x, y = step_of(optimizer=optimizer, precision=precision, grad_clip=1.0)
    step(x, y)  # the first one creates tables and states
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            step(x, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_compiled_step_has_the_losses_of_a_plain_one():
    losses = {}
    for compiled in (False, True):
        step, x, y = step_of(optimizer="adamw", lr=1e-3)
        if compiled:
            step.network.compile()
        losses[compiled] = [step(x, y).losses.mean().item() for _ in range(5)]
    assert losses[True] == pytest.approx(losses[False], rel=1e-3)
