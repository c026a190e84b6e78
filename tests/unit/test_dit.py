"""The diffusion transformer: the published figures, other sizes, and what it refuses."""

import math

import numpy as np
import pytest
import torch
from helpers import fill, golden, tensor

from diffusion import UsageError
from diffusion.config.schema import config_of
from diffusion.models.dit import DiT, positions
from diffusion.training.step import TrainingStep

CASES = golden("heirs/dit.json")
PUBLISHED = CASES.pop("published")
SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}


@pytest.fixture(params=CASES)
def network(request):
    case = CASES[request.param]
    return case, DiT(**case["kwargs"]), golden(f"heirs/{request.param}.npz")


def test_output_and_gradients_are_the_published_ones(network):
    case, model, arrays = network
    fill(model, case["seed"])
    out = model(*(tensor(arrays[name]) for name in ("x", "t", "y")))
    np.testing.assert_allclose(out.detach(), arrays["out"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(model.pos_embed, arrays["pos_embed"], atol=1e-6)
    out.square().mean().backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad.norm().item() == pytest.approx(case["grad_norm"][name], rel=1e-3, abs=1e-7), name


def test_names_shapes_and_the_start_are_the_published_ones(network):
    case, model, _ = network
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == case["state_dict"]
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == case["parameters"]
    assert {name for name, p in trained.items() if not p.any()} == set(case["zero_at_start"])
    for name, std in case["std_at_start"].items():
        if std:
            weight = model.state_dict()[name]
            assert weight.std().item() == pytest.approx(std, rel=6 / math.sqrt(2 * weight.numel())), name


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_the_published_ones(name):
    size, patch = name.removeprefix("DiT-").split("/")
    with torch.device("meta"):
        model = DiT(32, int(patch), 4, *SIZES[size])
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == PUBLISHED[name]


def test_other_sizes_have_their_own_positions():
    """A network runs on a rectangle as one that was built for it does: the positions follow from the size."""
    square, built = (fill(DiT(size, 2, 3, 64, 2, 4, num_classes=None), 1) for size in (8, (4, 12)))
    x, t = torch.randn(2, 3, 4, 12), torch.tensor([3.0, 700.0])
    with torch.no_grad():
        torch.testing.assert_close(square(x, t), built(x, t))
        assert not torch.equal(square(x, t), square(x.transpose(2, 3), t).transpose(2, 3))
    table = positions((2, 3), 8)
    assert table.shape == (6, 8)
    assert (table[0, :4] == table[3, :4]).all()  # the first half is the column's
    assert (table[0, 4:] == table[2, 4:]).all()


@pytest.mark.parametrize("dropped", [0.0, 0.1])
def test_a_label_of_minus_one_is_no_class(dropped):
    model = fill(DiT(8, 2, 3, 64, 2, 4, num_classes=5, class_dropout_prob=dropped), 1)
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 700.0]), torch.tensor([-1, -1])
    with torch.no_grad():
        none = model(x, t, y)
        table = model.y_embedder["embedding_table"].weight
        assert len(table) == 5 + (dropped > 0)
        if dropped:
            torch.testing.assert_close(none, model(x, t, torch.tensor([5, 5])))
        table[-1 if dropped else slice(None)] += 1
        assert torch.equal(none, model(x, t, y)) == (not dropped)


def test_patches_are_made_and_put_back_in_the_same_order():
    """A network whose output layer gives each patch back what came in is the identity."""
    model = DiT(8, 2, 3, 12, 0, 1, num_classes=None, learn_sigma=False)
    for p in model.parameters():
        p.detach().zero_()
    model.x_embedder["proj"].weight.data = torch.eye(12).view(12, 3, 2, 2)  # rows (channel, row, column)
    order = torch.arange(12).view(3, 2, 2).permute(1, 2, 0).flatten()  # (row, column, channel)
    model.final_layer.linear.weight.data = torch.eye(12)[order]
    model.final_layer.norm = torch.nn.Identity()
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(model(x, torch.zeros(2)), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_runs_in_mixed_precision(dtype):
    model = fill(DiT(8, 2, 3, 64, 2, 4, num_classes=5), 1)
    inputs = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 700.0]), torch.tensor([1, 4])
    with torch.no_grad(), torch.autocast("cpu", dtype):
        mixed = model(*inputs)
    with torch.no_grad():
        torch.testing.assert_close(mixed.float(), model(*inputs), atol=0.2, rtol=0.2)


@pytest.mark.parametrize(
    ("model", "data", "says"),
    [
        ({"patch_size": 3}, {}, "data.image_size is 8x8, which patch_size 3 does not divide"),
        ({}, {"image_size": [8, 9]}, "data.image_size is 8x9, which patch_size 2 does not divide"),
        ({}, {"image_size": [8]}, "data.image_size is 8; a transformer needs images of two sizes"),
        ({"hidden_size": 30}, {}, "model.hidden_size is 30; it must be a multiple of 4, such as 32"),
        ({"mlp_ratio": 0.001}, {}, "model.mlp_ratio is 0.001; it must be at least 0.01"),
        ({"num_heads": 5}, {}, "model.num_heads is 5, which does not divide hidden_size 96"),
        ({"channel_mult": [1, 2]}, {}, "model.channel_mult belongs to network unet, and model.network is dit"),
        ({"init": "fixup"}, {}, "model.init is fixup; it must be one of zero, default, small"),
        ({"network": "dti"}, {}, "model.network is dti; it must be one of unet, dit"),
    ],
)
def test_what_it_cannot_be_is_refused(model, data, says):
    data = {"source": "memory", "image_size": 8} | data
    with pytest.raises(UsageError, match=says):
        config_of({"model": {"network": "dit"} | model, "data": data})


@pytest.mark.parametrize(
    ("x", "y", "says"),
    [((2, 3, 8, 7), [0, 1], "the input's size is 8x7"), ((2, 1, 8, 8), [0, 1], "the input has 1 channels"),
     ((2, 3, 8, 8), None, "the model has 5 classes, and the call gives no labels"),
     ((2, 3, 8, 8), [0], "labels y are")],
)  # fmt: skip
def test_what_it_cannot_be_called_with_is_said(x, y, says):
    model = DiT(8, 2, 3, 64, 1, 4, num_classes=5)
    with pytest.raises(UsageError, match=says):
        model(torch.zeros(x), torch.zeros(2), None if y is None else torch.tensor(y))


def test_the_positions_are_not_trained():
    config = config_of({"model": {"network": "dit"}, "data": {"source": "memory", "image_size": 8}})
    network = config.network(3)
    before = network.pos_embed.clone()
    optimizer = torch.optim.AdamW(network.parameters(), 1e-2, weight_decay=0.1)
    step = TrainingStep(network, config.diffusion.process(), optimizer, ema_rates=[0.5])
    for _ in range(3):
        step(torch.rand(4, 1, 8, 8), torch.arange(4) % 3)
    assert torch.equal(network.pos_embed, before)
    assert torch.equal(step.ema.averages[0.5]["pos_embed"], before)
