import pytest
import torch
from accelerate import Accelerator

from diffusion.config.schema import Config, config_of
from diffusion.errors import UsageError
from diffusion.optimizers import muon
from diffusion.optimizers.muon import Muon, orthogonalise
from diffusion.training.build import build_step, parameter_groups


def gradients(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("shape", [(20, 180), (180, 20), (32, 32)])
def test_singular_vectors_stay_and_singular_values_become_one(shape):
    matrices = gradients(shape, (32, 20), shape)
    for matrix, found in zip(matrices, orthogonalise(matrices), strict=True):
        u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
        values = torch.diagonal(u.mT @ found @ vh.mT)
        torch.testing.assert_close(u @ torch.diag(values) @ vh, found, atol=2e-3, rtol=0)
        assert values.quantile(0.05) > 0.6
        assert values.max() < 1.25


def test_matrices_are_trained_as_by_torch():
    """torch's own takes matrices alone, and orthogonalises in bfloat16."""
    ours, theirs = ([torch.nn.Parameter(value) for value in gradients((24, 40), (40, 24))] for _ in range(2))
    mine = Muon([{"params": ours, "muon": True}], lr=0.02, weight_decay=0.1)
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    start = [p.detach().clone() for p in ours]
    for step in range(5):
        for p, q, gradient in zip(ours, theirs, gradients((24, 40), (40, 24), seed=step + 1), strict=True):
            p.grad, q.grad = gradient.clone(), gradient.clone()
        mine.step()
        reference.step()
    for p, q, before in zip(ours, theirs, start, strict=True):
        assert (p - q).norm() < 0.02 * (q - before).norm()


def test_a_convolution_is_the_matrix_of_its_filters_and_the_rest_is_adamw():
    convolution, matrix, bias = (torch.nn.Parameter(v) for v in gradients((8, 4, 3, 3), (8, 36), (8,)))
    with torch.no_grad():
        matrix.copy_(convolution.flatten(1))
    alone = torch.nn.Parameter(bias.detach().clone())
    both = Muon([{"params": [convolution], "muon": True}, {"params": [bias]}], lr=0.01, weight_decay=0.1)
    one = Muon([{"params": [matrix], "muon": True}], lr=0.01, weight_decay=0.1)
    adamw = torch.optim.AdamW([alone], lr=0.01, weight_decay=0.1)
    for step in range(3):
        g, h = gradients((8, 4, 3, 3), (8,), seed=step + 1)
        convolution.grad, matrix.grad, bias.grad, alone.grad = g, g.flatten(1), h, h.clone()
        for optimizer in (both, one, adamw):
            optimizer.step()
        assert convolution.grad is g
    torch.testing.assert_close(convolution.flatten(1), matrix)
    torch.testing.assert_close(bias, alone)


def test_a_step_with_a_non_finite_gradient_changes_nothing():
    p, q = (torch.nn.Parameter(value) for value in gradients((6, 5), (6,)))
    optimizer = Muon([{"params": [p], "muon": True}, {"params": [q]}], lr=0.1, weight_decay=0.1, fused=True)
    for value in (1.0, float("nan")):
        p.grad, q.grad = torch.full_like(p, value), torch.full_like(q, value)
        optimizer.found_inf = torch.tensor(0.0 if value == 1 else 1.0)
        before = [x.detach().clone() for x in (p, q)]
        momentum = optimizer.state[p]["momentum_buffer"].clone() if value != 1 else None
        optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(before, (p, q), strict=True)) == (value != 1)
    assert torch.equal(optimizer.state[p]["momentum_buffer"], momentum)


def test_hidden_weights_are_muons_and_the_rest_is_adamws():
    network = Config().network(10)
    groups = muon(network, parameter_groups(network), 1e-3).param_groups
    names = {id(p): name for name, p in network.named_parameters()}
    hidden, rest = ([names[id(p)] for p in group["params"]] for group in groups)
    assert sorted(hidden + rest) == sorted(names.values())
    assert "middle_block.0.in_layers.2.weight" in hidden
    assert {"out.2.weight", "label_emb.weight", "input_blocks.0.0.weight", "time_embed.0.bias"} <= set(rest)
    assert sum(p.numel() for p in groups[0]["params"]) > 0.9 * sum(p.numel() for p in network.parameters())


FALL = {
    "unet": ["input_blocks.1.0.in_layers.2.weight", "input_blocks.1.0.emb_layers.1.weight", "out.2.weight"],
    "dit": ["blocks.0.attn.qkv.weight", "blocks.0.mlp.fc2.weight", "final_layer.linear.weight"],
}
STAY = {
    "unet": ["input_blocks.0.0.weight", "label_emb.weight", "vector_emb.weight", "out.2.bias"],
    "dit": [
        "x_embedder.proj.weight",
        "y_embedder.embedding_table.weight",
        "vector_emb.weight",
        "t_embedder.mlp.0.weight",
    ],
}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(("network", "field"), [("unet", "model_channels"), ("dit", "hidden_size")])
def test_the_rate_of_a_weight_falls_with_its_inputs_from_the_base_width_on(network, field, optimizer):
    """muP for Adam (2203.03466, table 3): hidden and output weights by 1 / fan_in, those with fixed inputs not."""
    model = {"network": network, field: 96, "num_heads": 4}
    config = config_of({"model": model, "train": {"lr_base_width": 32, "optimizer": optimizer}})
    built = config.network(10, 3)
    step = build_step(config, built, config.diffusion.process(), Accelerator(cpu=True), 10, 3)
    factors = {id(p): group["factor"] for group in step.optimizer.param_groups for p in group["params"]}
    found = {name: factors[id(p)] for name, p in built.named_parameters() if p.requires_grad}
    assert {name: found[name] for name in FALL[network]} == dict.fromkeys(FALL[network], pytest.approx(1 / 3))
    assert {name: found[name] for name in STAY[network]} == dict.fromkeys(STAY[network], 1.0)
    assert len(set(found.values())) == 2


@pytest.mark.parametrize(
    ("model", "width", "says"),
    [({}, 48, "model.model_channels is 48; it must be a multiple of 32, such as 64"),
     ({"network": "dit"}, 32, "model.num_heads is 3, which does not divide hidden_size 32")],
)  # fmt: skip
def test_a_base_width_that_the_network_cannot_have_is_refused(model, width, says):
    with pytest.raises(UsageError, match=f"train.lr_base_width {width} is of no such network: {says}"):
        config_of({"model": model, "train": {"lr_base_width": width}})


def test_at_its_own_width_a_network_learns_as_without_a_base_width():
    networks = []
    for width in (None, 32):
        config = config_of({"train": {"lr_base_width": width}})
        torch.manual_seed(0)
        networks.append(config.network(10))
        step = build_step(config, networks[-1], config.diffusion.process(), Accelerator(cpu=True), 10)
        for _ in range(3):
            step(torch.ones(4, 1, 8, 8), torch.arange(4))
    assert all(map(torch.equal, *(network.parameters() for network in networks)))


def test_muon_gets_further_in_a_few_steps_than_adamw():
    losses = {}
    for name, lr in (("adamw", 3e-3), ("muon", 5e-3)):
        config = config_of({"train": {"optimizer": name, "lr": lr, "batch_size": 16}, "diffusion": {"prediction": "v"}})
        torch.manual_seed(0)
        network = config.network(10)
        step = build_step(config, network, config.diffusion.process(), Accelerator())
        x, y = torch.from_numpy(config.data.open().images.numpy()[:16] / 127.5 - 1).float(), torch.zeros(16).long()
        losses[name] = [step(x, y).losses.mean().item() for _ in range(15)][-3:]
    assert sum(losses["muon"]) < sum(losses["adamw"])


def test_muon_refuses_sharded_weights(monkeypatch):
    from accelerate.utils import DistributedType

    accelerator = Accelerator()
    monkeypatch.setattr(type(accelerator), "distributed_type", property(lambda self: DistributedType.FSDP))
    config = config_of({"train": {"optimizer": "muon"}})
    with pytest.raises(UsageError, match=r"train\.optimizer is muon, which needs whole matrices, and FSDP shards them"):
        build_step(config, config.network(10), config.diffusion.process(), accelerator)
