"""How weights begin: Fixup's rules on the tensors, and what zero, small, default and constant weights lead to."""

import math

import pytest
import torch
from helpers import small_unet
from symmetry import make_alike
from test_trainer import assert_same_bits
from torch import nn

from diffusion import UNetModel, UsageError
from diffusion.commands.command_line import parse_command_line
from diffusion.config.schema import Config
from diffusion.models.dit import DiT
from diffusion.models.initialisation import branches, initialise, layers, scalars
from diffusion.models.layers import Conv2d, Linear, SiLU, add_scalars
from diffusion.models.unet import AttentionBlock, ResBlock

KINDS = {
    "digits": {},
    "added embedding": dict(use_scale_shift_norm=False),
    "two levels of blocks": dict(num_res_blocks=2, channel_mult=(1, 2, 2)),
    "resblocks up and down": dict(resblock_updown=True),
    "no convolutions in resampling": dict(conv_resample=False),
    "one axis": dict(dims=1),
    "three axes": dict(dims=3),
    "recomputed": dict(use_checkpoint=True),
}


def unet(init="zero", seed=0, kind=UNetModel, **options):
    torch.manual_seed(seed)
    defaults = dict(num_res_blocks=1, attention_resolutions=(2,), channel_mult=(1, 2), num_heads=2,
                    use_scale_shift_norm=True, num_classes=10, use_norm=init != "fixup")  # fmt: skip
    model = kind(1, 32, 2, **(defaults | options))
    if init in ("constant", "all zero"):
        make_alike(layers(model), init)
        torch.nn.init.zeros_(model.label_emb.weight)
    else:
        initialise(model, init)
    return model


def dit(init="zero", seed=0, **options):
    torch.manual_seed(seed)
    defaults = dict(input_size=8, patch_size=2, in_channels=1, hidden_size=32, depth=3, num_heads=2, num_classes=10)
    model = DiT(**(defaults | options))
    initialise(model, init)
    return model


NETWORKS = {"unet": unet, "dit": dit}
EACH = pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)


def inputs(model, batch=4):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 1, *[8] * getattr(model, "dims", 2), generator=generator)
    return x, torch.arange(batch) * 200, torch.arange(batch) % 10


def spread(weight):
    return weight.detach().square().mean().sqrt().item()


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_fixups_rules(options):
    model = unet("fixup", **options)
    found = branches(model)
    blocks = [block for block in found if isinstance(block, ResBlock)]
    attentions = [block for block in found if isinstance(block, AttentionBlock)]
    assert not [module for module in model.modules() if isinstance(module, nn.GroupNorm)]
    # 1: zero for the last layers
    ends = [*(block.out_layers[3] for block in blocks), *(block.proj_out for block in attentions)]
    assert len(ends) == len(found) == len(blocks) + len(attentions)
    for layer in (*ends, model.out[2]):
        assert not layer.weight.any()
    # 2: He's variance elsewhere, inside branches scaled by L^(-1/2)
    inside = {}
    for block in blocks:
        inside |= {block.in_layers[2]: 2.0, block.emb_layers[1]: 2.0}
    for block in attentions:
        inside[block.qkv] = 1.0
    for layer in layers(model):
        assert not layer.bias.any()
        if layer in (*ends, model.out[2]):
            continue
        gain = inside.get(layer, 2.0 if layer is model.time_embed[2] else 1.0)
        scale = len(found) ** -0.5 if layer in inside else 1.0
        wanted = scale * math.sqrt(gain / layer.weight[0].numel())
        assert spread(layer.weight) == pytest.approx(wanted, rel=6 / math.sqrt(layer.weight.numel()))
    # 3: a multiplier for each branch, a bias before each layer and activation
    multipliers = [layer.multiplier for layer in layers(model) if layer.multiplier is not None]
    assert len(multipliers) == len(found)
    assert all(layer.multiplier is not None for layer in ends)
    activations = [module for module in model.modules() if isinstance(module, nn.SiLU)]
    biases = [module.bias_before for module in (*layers(model), *activations)]
    assert all(multiplier.tolist() == [1.0] for multiplier in multipliers)
    assert all(bias.tolist() == [0.0] for bias in biases)
    assert {id(p) for p in scalars(model)} == {id(p) for p in (*multipliers, *biases)}


@pytest.mark.parametrize("init", ["zero", "fixup"])
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_every_block_begins_as_the_identity_on_its_skip_path(init, options):
    model = unet(init, **options)
    seen = []
    for block in branches(model):
        block.register_forward_hook(lambda block, given, out: seen.append((block, given[0], out)))
    x, t, y = inputs(model)
    assert not model(x, t, y).any()
    assert len(seen) == len(branches(model))
    for block, given, out in seen:
        if isinstance(block, ResBlock):
            given = block.skip_connection(given if block.resample is None else block.resample(given))
        assert torch.equal(out, given)


@pytest.mark.parametrize("options", [{}, {"input_size": (8, 16)}, {"class_dropout_prob": 0.0}, {"learn_sigma": False}])
def test_every_block_of_a_transformer_begins_as_the_identity(options):
    model, seen = dit(**options), []
    for block in model.blocks:
        block.register_forward_hook(lambda block, given, out: seen.append(torch.equal(given[0], out)))
    out = model(*inputs(model))
    assert out.shape == (4, model.out_channels, 8, 8)
    assert not out.any()
    assert seen == [True] * 3


def test_scalars_do_what_they_are_for():
    """Against the formula written out: a bias on everything that a layer sees, a multiplier on what it gives."""
    torch.manual_seed(0)
    net = nn.Sequential(Conv2d(2, 3, 3, padding=1), SiLU(), Conv2d(3, 4, 3, stride=2, padding=1), nn.Flatten(),
                        Linear(16, 2))  # fmt: skip
    convolution, _, strided, _, linear = net
    x = torch.randn(5, 2, 4, 4)
    plain = net(x)
    add_scalars(net, [strided])
    torch.testing.assert_close(net(x), plain)
    with torch.no_grad():
        for i, p in enumerate(scalars(net)):
            p.fill_(0.3 + 0.2 * i)

    def conv(layer, x, **options):
        padded = nn.functional.pad(x, (1, 1, 1, 1)) + layer.bias_before
        return nn.functional.conv2d(padded, layer.weight, layer.bias, **options)

    h = nn.functional.silu(conv(convolution, x) + net[1].bias_before)
    h = (conv(strided, h, stride=2) * strided.multiplier).flatten(1)
    torch.testing.assert_close(net(x), nn.functional.linear(h + linear.bias_before, linear.weight, linear.bias))


def test_the_attention_block_uses_its_scalars():
    model = unet("fixup")
    block = next(block for block in branches(model) if isinstance(block, AttentionBlock))
    nn.init.normal_(block.proj_out.weight)
    x = torch.randn(2, block.proj_out.weight.shape[0], 4, 4)
    with torch.no_grad():
        once = block(x) - x
        block.proj_out.multiplier.fill_(2.0)
        torch.testing.assert_close(block(x) - x, 2 * once)
        block.proj_out.multiplier.fill_(1.0)
        block.qkv.bias_before.fill_(0.5)
        shifted = block(x) - x
        block.qkv.bias_before.fill_(0.0)
        torch.testing.assert_close(block(x + 0.5) - x - 0.5, shifted)


def test_initialise_refuses_what_it_cannot_do_before_it_touches_a_weight():
    for model, init, says in (
        (dit("zero"), "fixup", "set model.use_norm to false"),
        (unet("zero"), "Fixup", "init is 'Fixup'; it must be one of zero, default, small, fixup"),
        (unet("zero"), "fixup", "set model.use_norm to false"),
        (unet("fixup"), "fixup", "this one has Fixup's scalars"),
        (unet("fixup"), "zero", "this one has Fixup's scalars"),
    ):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(UsageError, match=says):
            initialise(model, init)
        assert_same_bits(dict(model.state_dict()), before)


def test_scalars_are_where_the_weights_are():
    torch.manual_seed(0)
    model = UNetModel(1, 32, 1, 1, (), channel_mult=(1,), use_norm=False).to("meta", torch.float64)
    initialise(model, "fixup")
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.float64, "meta")}


@EACH
def test_the_other_choices(network):
    zero, default, little = (network(name, seed=3) for name in ("zero", "default", "small"))
    ends = {f"{name}.{leaf}" for name, module in zero.named_modules() for leaf in ("weight", "bias")
            if any(module is layer for layer in zero.last_layers())}  # fmt: skip
    assert ends
    for (name, a), b, c in zip(zero.named_parameters(), default.parameters(), little.parameters(), strict=True):
        if name not in ends:
            assert torch.equal(a, b)
            assert torch.equal(a, c)
        elif name.endswith("weight"):
            assert not a.any()
            assert b.std() > 0.01
            torch.testing.assert_close(c, 1e-5 * b)
        else:
            assert not a.any()
            assert not c.any()
    for model in (zero, default, little):
        assert not scalars(model)


# --- why zero works ---------------------------------------------------------------------------------------------------


def gradients(model, steps, optimizer):
    """The names of the parameters that have a gradient at each of a run's first steps."""
    x, t, y = inputs(model, 16)
    target = torch.randn(16, 2, *x.shape[2:], generator=torch.Generator().manual_seed(2))
    moved = []
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x, t, y) - target).square().mean().backward()
        moved.append({name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()})
        optimizer.step()
    return moved


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("init", ["zero", "fixup"])
def test_branches_wake_up_from_the_output_inwards(init, optimizer):
    """Step 0 moves the output's convolution alone, step 1 the main path and the last layer of every branch, step 2
    all that is left."""
    model = unet(init)
    names = {id(module): name for name, module in model.named_modules()}
    ends = {f"{names[id(layer)]}.weight" for layer in model.last_layers()}
    inside = {f"{names[id(block)]}.{name}" for block in branches(model) for name, _ in block.named_parameters()
              if not name.startswith(("skip_connection", "out_layers.3", "proj_out"))}  # fmt: skip
    everything = {name for name, _ in model.named_parameters()}
    main = {
        name for name in everything if not any(name.startswith(f"{names[id(block)]}.") for block in branches(model))
    }
    main |= {name for name in everything if "skip_connection" in name}
    main -= {name for name in everything if name.startswith(("time_embed", "label_emb"))}
    first, second, third = gradients(model, 3, optimizer(model.parameters(), 1e-3))
    assert first == {"out.2.weight", "out.2.bias"}
    assert ends | main <= second
    assert not inside & second
    assert not {name for name in second if name.startswith(("time_embed", "label_emb"))}
    assert third == everything


def after_a_step(model):
    """Take the first step of gradient descent. Returns the loss, a function."""
    x, t, y = inputs(model, 16)
    target = torch.randn(16, 2, 8, 8, generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    (model(x, t, y) - target).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return lambda: (model(x, t, y) - target).square().mean()


def test_the_gradient_of_a_zeroed_layer_is_a_product_of_two_that_differ():
    """At step 1, for every residual block: what reaches the layer, made different channel by channel by the random
    layers before, times the errors that come back; of a 3x3 convolution each tap is such a product, here the middle."""
    model = unet("zero")
    loss = after_a_step(model)
    ends = [block.out_layers[3] for block in branches(model) if isinstance(block, ResBlock)]
    given, errors = {}, {}
    for layer in ends:
        layer.register_forward_hook(lambda layer, args, out: given.update({layer: args[0].detach()}))
        layer.register_full_backward_hook(lambda layer, to_input, of_output: errors.update({layer: of_output[0]}))
    loss().backward()
    for layer in ends:
        assert not layer.weight.any()
        middle = layer.weight.grad[..., 1, 1]
        torch.testing.assert_close(middle, torch.einsum("bohw,bihw->oi", errors[layer], given[layer]))
        assert len(middle.unique(dim=0)) == len(middle)
        assert len(middle.T.unique(dim=0)) == len(middle.T)
        assert torch.linalg.matrix_rank(layer.weight.grad.flatten(1)) > 8


def test_a_transformer_wakes_up_from_the_output_inwards():
    """Step 0 moves the output's layer alone; step 1 the path through the blocks, the output's scale and shift, and the
    gates of every block; step 2 all that is left: what is inside the branches, their scales and shifts, embeddings."""
    model = dit()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    rows = {"shift_attn": 0, "scale_attn": 1, "gate_attn": 2, "shift_mlp": 3, "scale_mlp": 4, "gate_mlp": 5}
    x, t, y = inputs(model, 16)
    target = torch.randn(16, 2, 8, 8, generator=torch.Generator().manual_seed(2))
    moved = []
    for _ in range(3):
        optimizer.zero_grad()
        (model(x, t, y) - target).square().mean().backward()
        names = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        for i, block in enumerate(model.blocks):
            parts = block.adaLN_modulation[1].weight.grad.chunk(6)
            names |= {f"{i} {name}" for name, row in rows.items() if parts[row].any()}
        moved.append(names)
        optimizer.step()
    first, second, third = moved
    assert first == {"final_layer.linear.weight", "final_layer.linear.bias"}
    gates = {f"{i} {name}" for i in range(3) for name in rows if "gate" in name}
    modulations = {f"blocks.{i}.adaLN_modulation.1.{leaf}" for i in range(3) for leaf in ("weight", "bias")}
    path = {"x_embedder.proj.weight", "x_embedder.proj.bias"}
    of_output = {"final_layer.adaLN_modulation.1.weight", "final_layer.adaLN_modulation.1.bias"}
    assert second == first | path | of_output | modulations | gates
    everything = {name for name, p in model.named_parameters() if p.requires_grad}
    assert third == everything | {f"{i} {name}" for i in range(3) for name in rows}


def test_the_gradient_of_a_gate_is_a_product_of_two_that_differ():
    """At step 1, for both gates of every block: what the branch gives times the error that comes back, summed over
    positions, times the embedding. It differs from channel to channel, although all gates begin alike."""
    model = dit()
    loss = after_a_step(model)
    given, errors, embeddings = {}, {}, []
    for block in model.blocks:
        block.register_forward_hook(lambda block, args, out: embeddings.append(args[1].detach()))
        block.register_full_backward_hook(lambda block, to_input, of_output: errors.update({block: of_output[0]}))
        for name in ("attn", "mlp"):
            branch = getattr(block, name)
            branch.register_forward_hook(lambda branch, args, out: given.update({branch: out.detach()}))
    loss().backward()
    embedding = torch.nn.functional.silu(embeddings[0])
    for block in model.blocks:
        weight = block.adaLN_modulation[1].weight
        assert not weight.any()
        for gate, branch in ((2, block.attn), (5, block.mlp)):
            gradient = weight.grad.chunk(6)[gate]
            product = torch.einsum("bhwc,bhwc,be->ce", errors[block], given[branch], embedding)
            torch.testing.assert_close(gradient, product, rtol=1e-3, atol=1e-7)
            assert len(gradient.unique(dim=0)) == len(gradient)
            assert torch.linalg.matrix_rank(gradient) > 8


def distinct_rows(weight):
    """How many channels of a layer compute something of their own."""
    rows = weight.detach().flatten(1)
    return len({tuple(row) for row in (rows / rows.abs().max().clamp(min=1e-30)).mul(1e4).round().tolist()})


@pytest.mark.parametrize(
    ("init", "use_norm"), [("zero", True), ("zero", False), ("constant", True), ("constant", False), ("all zero", True)]
)
def test_channels_that_begin_alike_stay_alike(init, use_norm):
    """On the network itself, over 10 steps: one channel each for constant and all zero, all for the paper's. (Not by
    Adam, which makes full steps of gradients that are rounding alone.)"""
    model = unet(init, use_norm=use_norm)
    x, t, y = inputs(model, 8)
    target = torch.randn(8, 2, 8, 8, generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for _ in range(10):
        optimizer.zero_grad()
        (model(x, t, y) - target).square().mean().backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    inner = [layer for layer in layers(model) if layer is not model.out[2]]
    counts = [distinct_rows(layer.weight) for layer in inner]
    # Rows that have another task are not alike: scale and shift; queries, keys and values.
    tasks = {id(block.emb_layers[1]): 2 for block in branches(model) if isinstance(block, ResBlock)}
    tasks |= {id(block.qkv): 3 for block in branches(model) if isinstance(block, AttentionBlock)}
    most = [tasks.get(id(layer), 1) for layer in inner]
    if init == "zero":
        assert counts == [len(layer.weight) for layer in inner]
    elif init == "constant" and use_norm:
        # Groups of three channels lie across the seam of a long skip: those beside it are normalised otherwise.
        assert max(counts) <= 6
    else:
        assert all(count <= limit for count, limit in zip(counts, most, strict=True))


def test_dropout_tells_equal_channels_apart_but_not_zeros():
    for name, alike in (("constant", False), ("all zero", True)):
        model = unet(name, use_norm=False, dropout=0.1).train()
        gradients(model, 10, torch.optim.SGD(model.parameters(), 1e-3))
        layer = model.middle_block[0].in_layers[2]
        assert (distinct_rows(layer.weight) == 1) == alike


# --- as a choice of a run ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (
            ["--model.init", "fixup"],
            "model.init is fixup, which is for networks without normalisation: set model.use_norm to false",
        ),
        (["--model.init", "zeros"], "model.init is zeros; it must be one of .*did you mean zero"),
        (["--train.scalar_lr_factor", "0.1"], "only model.init fixup has scalars"),
        (
            ["--model.init", "fixup", "--model.use_norm", "false", "--train.scalar_lr_factor", "-1"],
            "it must be greater than or equal to 0",
        ),
    ],
)
def test_what_cannot_go_together_is_refused(argv, says):
    with pytest.raises(UsageError, match=says):
        parse_command_line(argv)


def test_the_published_weights_are_untouched_by_all_this():
    """The default network has the published names, and no others."""
    assert Config().model.init == "zero"
    assert not [name for name in small_unet().state_dict() if "bias_before" in name or "multiplier" in name]
