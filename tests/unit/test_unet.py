import inspect

import numpy as np
import pytest
import torch
from einops import rearrange
from helpers import fill, golden, golden_unet, process, small_unet, tensor

from diffusion import UNetModel, UsageError
from diffusion.losses import training_losses
from diffusion.models.unet import AttentionBlock, ResBlock

NETWORKS = golden("unet.json")


@pytest.fixture(params=NETWORKS)
def network(request):
    case = NETWORKS[request.param]
    return case, fill(golden_unet(case), case["seed"]), golden(f"unet_{request.param}.npz")


def run(model, arrays):
    return model(
        tensor(arrays["x"]), tensor(arrays["t"]), **{k: tensor(arrays[k]) for k in ("y", "low_res") if k in arrays}
    )


def test_output_and_gradients_are_the_published_ones(network):
    case, model, arrays = network
    out = run(model, arrays)
    np.testing.assert_allclose(out.detach(), arrays["out"], atol=1e-4, rtol=0)
    out.square().mean().backward()
    for name, p in model.named_parameters():
        assert p.grad.norm().item() == pytest.approx(case["grad_norm"][name], rel=1e-3, abs=1e-7), name


def test_names_and_shapes_are_the_published_ones(network):
    case, model, _ = network
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == case["state_dict"]
    assert sum(p.numel() for p in model.parameters()) == case["parameters"]


def test_checkpointing_changes_neither_output_nor_gradients(network):
    case, model, arrays = network
    twin = fill(golden_unet(case, use_checkpoint=True), case["seed"])
    outputs = [run(m, arrays) for m in (model, twin)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=0)
    for out in outputs:
        out.square().mean().backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=name)


FIRST = dict(model_channels=128, num_heads=4, use_scale_shift_norm=True)
SEQUEL = dict(model_channels=256, num_head_channels=64, resblock_updown=True, use_scale_shift_norm=True)
PUBLISHED = {
    "cifar10_uncond": FIRST | dict(num_res_blocks=3, channel_mult=(1, 2, 2, 2), attention_resolutions=(2, 4)),
    "imagenet64_uncond": FIRST | dict(num_res_blocks=3, channel_mult=(1, 2, 3, 4), attention_resolutions=(4, 8)),
    "imagenet64_cond": FIRST | dict(
        model_channels=192, num_res_blocks=3, channel_mult=(1, 2, 3, 4), attention_resolutions=(4, 8), num_classes=1000
    ),
    "upsample_cond_256": FIRST | dict(
        model_channels=192, num_res_blocks=2, channel_mult=(1, 1, 2, 2, 4, 4), attention_resolutions=(16, 32),
        num_classes=1000, upsampler=True,
    ),
    "lsun_bedroom_256": dict(
        model_channels=128, num_res_blocks=2, channel_mult=(1, 1, 2, 2, 4, 4), attention_resolutions=(16,),
    ),
    "adm_imagenet64_cond": SEQUEL | dict(
        model_channels=192, num_res_blocks=3, channel_mult=(1, 2, 3, 4), attention_resolutions=(2, 4, 8),
        num_classes=1000, use_new_attention_order=True,
    ),
    "adm_imagenet256_uncond": SEQUEL | dict(
        num_res_blocks=2, channel_mult=(1, 1, 2, 2, 4, 4), attention_resolutions=(8, 16, 32)
    ),
    "adm_lsun_256": SEQUEL | dict(num_res_blocks=2, channel_mult=(1, 1, 2, 2, 4, 4), attention_resolutions=(8, 16, 32)),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks_have_their_number_of_parameters(name):
    arguments = dict(PUBLISHED[name])
    small = {"image_channels": 3} if arguments.pop("upsampler", False) else {}
    with torch.device("meta"):
        model = UNetModel(in_channels=3, out_channels=6, **arguments, **small)
    assert sum(p.numel() for p in model.parameters()) == golden("published_parameters.json")[name]


def test_the_order_of_heads_is_a_permutation_of_the_weights():
    """The sequel's order holds q of all heads, then k, then v: with its rows regrouped it is the first paper's."""
    torch.manual_seed(0)
    ours, sequels = AttentionBlock(64, 4), AttentionBlock(64, 4, new_order=True)
    torch.nn.init.normal_(ours.proj_out.weight)
    sequels.load_state_dict(ours.state_dict())
    for name in ("weight", "bias"):
        rows = getattr(ours.qkv, name).detach()
        getattr(sequels.qkv, name).data = rearrange(
            rows, "(heads three c) ... -> (three heads c) ...", heads=4, three=3
        )
    x = torch.randn(2, 64, 4, 4)
    torch.testing.assert_close(sequels(x), ours(x))


def test_keywords_are_the_published_ones():
    ours = list(inspect.signature(UNetModel).parameters)
    assert ours[-3:] == ["use_norm", "vector_size", "image_channels"]
    assert ours[:-3] == [
        "in_channels", "model_channels", "out_channels", "num_res_blocks", "attention_resolutions", "dropout",
        "channel_mult", "conv_resample", "dims", "num_classes", "use_checkpoint", "num_heads", "num_heads_upsample",
        "use_scale_shift_norm", "num_head_channels", "resblock_updown", "use_new_attention_order", "image_size",
    ]  # fmt: skip


# --- zero initialisation: every block starts as the identity -----------------------------------------------------

BLOCKS = {
    "plain": dict(channels=32, out_channels=32),
    "scale and shift": dict(channels=32, out_channels=32, use_scale_shift_norm=True),
    "wider": dict(channels=32, out_channels=64, use_scale_shift_norm=True),
    "dropout": dict(channels=64, out_channels=32, dropout=0.5),
    "1d": dict(channels=32, out_channels=64, dims=1),
    "3d, recomputed": dict(channels=32, out_channels=32, dims=3, use_checkpoint=True),
}


@pytest.mark.parametrize("options", BLOCKS.values(), ids=BLOCKS)
def test_a_residual_block_starts_as_its_skip_path(options):
    torch.manual_seed(0)
    block = ResBlock(emb_channels=16, **({"dropout": 0.0} | options))
    for scale in (1.0, 1e-3, 1e3):
        x = scale * torch.randn(2, block.in_layers[0].num_channels, *[4] * options.get("dims", 2))
        emb = scale * torch.randn(2, 16)
        assert torch.equal(block(x, emb), block.skip_connection(x))
    if options["channels"] == options["out_channels"]:
        assert torch.equal(block(x, emb), x)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_an_attention_block_starts_as_the_identity(dims, heads):
    torch.manual_seed(0)
    x = 100 * torch.randn(2, 64, *[4] * dims)
    assert torch.equal(AttentionBlock(64, heads)(x), x)


@pytest.mark.parametrize("case", NETWORKS.values(), ids=NETWORKS)
def test_the_network_starts_at_exactly_zero(case):
    torch.manual_seed(0)
    kwargs = case["kwargs"]
    model = golden_unet(case)
    shape = [16] * kwargs.get("dims", 2)
    y = torch.tensor([0, 1]) if "num_classes" in kwargs else None
    x = torch.randn(2, kwargs["in_channels"], *shape)
    low_res = {"low_res": x[..., ::2, ::2]} if case["model"] == "SuperResModel" else {}
    out = model(x, torch.tensor([0.0, 999.0]), y, **low_res)
    assert out.shape == (2, kwargs["out_channels"], *shape)
    assert (out == 0).all()


def test_only_what_must_be_zero_is_zero():
    model = UNetModel(3, 32, 6, 1, (2,), channel_mult=(1, 2), use_scale_shift_norm=True)
    zero = {name for name, p in model.named_parameters() if (p == 0).all()}
    branch_ends = {
        f"{name}.{end}.{kind}"
        for name, module in model.named_modules()
        for block, end in ((ResBlock, "out_layers.3"), (AttentionBlock, "proj_out"))
        for kind in ("weight", "bias")
        if isinstance(module, block)
    }
    norm_biases = {name for name in zero if name.endswith(("norm.bias", "layers.0.bias", "out.0.bias"))}
    assert zero - norm_biases == branch_ends | {"out.2.weight", "out.2.bias"}


def test_after_a_few_steps_no_block_is_the_identity_any_more():
    torch.manual_seed(0)
    model = UNetModel(3, 32, 6, 1, (2,), channel_mult=(1, 2), use_scale_shift_norm=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(4):
        x0, noise = torch.tanh(torch.randn(8, 3, 8, 8)), torch.randn(8, 3, 8, 8)
        loss = training_losses(process(), model, x0, torch.randint(0, 1000, (8,)), noise, "rescaled_mse")["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    emb = torch.randn(2, 128)
    seen = 0
    for name, module in model.named_modules():
        if isinstance(module, ResBlock):
            x = torch.randn(2, module.in_layers[0].num_channels, 8, 8)
            assert not torch.equal(module(x, emb), module.skip_connection(x)), name
            seen += 1
        elif isinstance(module, AttentionBlock):
            x = torch.randn(2, module.norm.num_channels, 8, 8)
            assert not torch.equal(module(x), x), name
            seen += 1
    assert seen == 12  # 8 residual blocks, 4 with attention
    assert (model(torch.randn(2, 3, 8, 8), torch.tensor([1.0, 500.0])) != 0).any()


# --- shapes, types, bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("resample", [True, False])
@pytest.mark.parametrize(("dims", "size"), [(1, (12,)), (2, (8, 20)), (3, (5, 4, 8))])
def test_any_size_that_the_levels_divide_works(dims, size, resample):
    model = fill(UNetModel(2, 32, 4, 1, (2,), channel_mult=(1, 2, 2), dims=dims, conv_resample=resample), 0)
    out = model(torch.randn(3, 2, *size), torch.zeros(3))
    assert out.shape == (3, 4, *size)
    assert out.isfinite().all()


def test_normalisation_stays_in_float32_under_autocast():
    model = small_unet()
    seen = []
    norm = model.input_blocks[1][0].in_layers[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = (1000 + torch.randn(2, 32, 8, 8)).bfloat16()
        out = norm(x)
        seen.append(out.dtype)
        full = model(torch.randn(2, 3, 8, 8), torch.tensor([3.0, 900.0]))
    expected = torch.nn.functional.group_norm(x.float(), 32, norm.weight, norm.bias, norm.eps)
    assert seen == [torch.bfloat16]
    # only the last rounding is left: statistics taken in bfloat16 around a mean of 1000 would be far off
    torch.testing.assert_close(out, expected.bfloat16(), rtol=0, atol=0)
    assert full.isfinite().all()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: small_unet()(torch.zeros(1, 3, 7, 8), torch.zeros(1)), "input's size is 7x8, which 2 levels .* 8x8"),
        (lambda: small_unet()(torch.zeros(1, 3, 8, 8), torch.zeros(1), torch.zeros(1).long()), "no classes"),
        (lambda: small_unet(num_classes=3)(torch.zeros(1, 3, 8, 8), torch.zeros(1)), "3 classes"),
        (lambda: small_unet(model_channels=40), "40.*multiple of 32"),
        (lambda: small_unet(num_heads=5), "num_heads is 5, which does not divide 64"),
    ],
)
def test_what_does_not_fit_says_so(call, says):
    with pytest.raises(UsageError, match=says):
        call()
