"""The contract of every network in `NETWORKS`."""

import copy

import pytest
import torch
from accelerate import Accelerator
from helpers import moved

from diffusion import UsageError
from diffusion.config.schema import config_of
from diffusion.models.networks import NETWORKS
from diffusion.parallel.cores import CORES
from diffusion.run import checkpoint
from diffusion.run.checkpoint import Checkpoint, newest
from diffusion.training.build import build_step

EACH = pytest.mark.parametrize("name", NETWORKS)
SHAPES = [(1, 8, 8), (3, 8, 16), (2, 16), (1, 4, 8, 8)]


def config(name, shape=(1, 8, 8), **train):
    """A run of the network with its default settings on images of a shape."""
    data = {"source": "memory", "image_size": list(shape[1:]), "channels": shape[0]}
    return config_of({"data": data, "model": {"network": name}, "train": train})


def built(name, shape=(1, 8, 8), classes=3, seed=0):
    torch.manual_seed(seed)
    return config(name, shape).network(classes)


def accepted(name):
    """Those of `SHAPES` that the network accepts."""
    for shape in SHAPES:
        try:
            config(name, shape)
        except UsageError:
            continue
        yield shape


@EACH
def test_it_takes_every_shape_that_it_accepts_and_gives_mean_and_variance(name):
    shapes = list(accepted(name))
    assert SHAPES[0] in shapes
    for shape in shapes:
        network = built(name, shape)
        out = network(torch.randn(2, *shape), torch.tensor([0.0, 500.0]), y=torch.tensor([0, -1]))
        assert out.shape == (2, 2 * shape[0], *shape[1:])
        assert out.isfinite().all()


@EACH
def test_it_begins_as_the_identity_if_it_claims_to(name):
    if not NETWORKS[name].identity_at_start:
        pytest.skip("it does not claim to")
    out = built(name)(torch.randn(2, 1, 8, 8), torch.tensor([3.0, 9.0]), y=torch.tensor([0, 1]))
    assert (out == 0).all()


@EACH
def test_an_image_does_not_depend_on_its_batch(name):
    network, x = moved(built(name)).eval(), torch.randn(4, 1, 8, 8)
    t, y = torch.tensor([0.0, 10.0, 500.0, 999.0]), torch.tensor([0, 1, 2, -1])
    with torch.no_grad():
        together = network(x, t, y=y)
        alone = torch.cat([network(x[i : i + 1], t[i : i + 1], y=y[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5 * together.abs().max().item())


@EACH
def test_time_and_class_matter_once_it_is_trained(name):
    network, x = moved(built(name)).eval(), torch.randn(1, 1, 8, 8)
    with torch.no_grad():
        outs = [network(x, torch.tensor([t]), y=torch.tensor([y])) for t, y in ((1.0, 0), (900.0, 0), (1.0, 1))]
    assert not torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


@EACH
def test_it_is_built_the_same_from_a_seed_and_without_memory(name):
    first, second = built(name), built(name)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    with torch.device("meta"):
        empty = config(name).network(3)
    assert {key: p.shape for key, p in empty.state_dict().items()} == {
        key: p.shape for key, p in first.state_dict().items()
    }


@EACH
def test_it_compiles_without_a_break(name):
    network = moved(built(name))
    inputs = torch.randn(2, 1, 8, 8), torch.tensor([1.0, 2.0])
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    y = torch.tensor([0, 1])
    torch.testing.assert_close(compiled(*inputs, y=y), network(*inputs, y=y))


@EACH
def test_it_has_the_same_bits_on_fewer_threads_if_it_claims_to(name, monkeypatch):
    network, x = moved(built(name, (1, 16, 16))), torch.randn(24, 1, 16, 16)
    if not getattr(network, "any_threads", False):
        pytest.skip("it does not claim to")
    before, found = torch.get_num_threads(), []
    torch.set_num_threads(4)
    for free in (4, 2, 1):
        monkeypatch.setattr(CORES, "free", lambda free=free: free)
        network.zero_grad()
        with CORES.spared(network, x):
            assert torch.get_num_threads() == free
            out = network(x, torch.arange(24.0), y=torch.arange(24) % 3)
            out.square().mean().backward()
        found.append([out.detach(), *(p.grad.clone() for p in network.parameters() if p.requires_grad)])
    torch.set_num_threads(before)
    for fewer in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], fewer, strict=True))


@EACH
def test_it_resumes_to_the_bit(name, tmp_path):
    settings, x, y = config(name, steps=4, batch_size=4, warmup_steps=0), torch.rand(4, 1, 8, 8), torch.arange(4) % 3
    process = settings.diffusion.process()
    steps = [build_step(settings, built(name), process, Accelerator()) for _ in range(2)]
    for _ in range(2):
        steps[0](x, y)
    weights, averages = steps[0].network.state_dict(), {0.999: steps[0].ema.averages[0.999]}
    folder = checkpoint.checkpoint_folder(tmp_path, 2)
    checkpoint.save(folder, 2, settings, ("a", "b", "c"), weights, averages, {"step": steps[0].state_dict()})
    saved, files = newest(tmp_path, Checkpoint.files)
    steps[1].network.load_state_dict(files["model.safetensors"])
    state = checkpoint.unflatten({**files["training.safetensors"], **saved.numbers})
    steps[1].load_state_dict(state["step"])
    for key, average in steps[1].ema.averages.items():
        for parameter, value in average.items():
            value.copy_(files[f"ema_{key}.safetensors"][parameter])
    steps[1].step = 2
    for _ in range(2):
        results = [step(x, y).losses for step in steps]
        assert torch.equal(*results)
    for a, b in zip(*(copy.deepcopy(step.network).parameters() for step in steps), strict=True):
        assert torch.equal(a, b)
