"""The training step as a thing of its own: no folder, no configuration, any number of axes."""

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from diffusion import GaussianDiffusion, Schedule, UNetModel, UsageError
from diffusion.config.schema import Config
from diffusion.data.values import shrink
from diffusion.losses import training_losses
from diffusion.models.layers import zero_module
from diffusion.randomness import generator_for
from diffusion.run.checkpoint import Checkpoint, checkpoint_folder, flatten, newest, save, unflatten
from diffusion.sampling import sample_batch
from diffusion.timesteps import LossSecondMoment
from diffusion.training.step import TrainingStep

PROCESS = GaussianDiffusion(Schedule.named("cosine", 100))


def unet(dims=2, num_classes=None, dropout=0.0):
    torch.manual_seed(0)
    return UNetModel(1, 32, 2, 1, (2,), channel_mult=(1, 2), dims=dims, num_classes=num_classes, dropout=dropout)


def step_of(network, optimizer=torch.optim.AdamW, lr=1e-3, **options):
    fused = {"fused": True} if optimizer is torch.optim.AdamW else {}
    return TrainingStep(network, PROCESS, optimizer(network.parameters(), lr=lr, **fused),
                        accelerator=Accelerator(cpu=True), **options)  # fmt: skip


def images(n=16, sizes=(8, 8)):
    return torch.rand(n, 1, *sizes, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("sizes", [(16,), (8, 8), (6, 8), (2, 8, 4)], ids=str)
def test_signals_images_and_volumes_are_trained_on_and_sampled(sizes):
    network = unet(dims=len(sizes))
    step = step_of(network, ema_rates=[0.5], random_flip=True)
    before = network.out[2].weight.detach().clone()
    for _ in range(2):
        result = step(images(sizes=sizes))
    assert result.losses.shape == (16,)
    assert result.losses.isfinite().all()
    assert not torch.equal(network.out[2].weight, before)
    fast = GaussianDiffusion(Schedule.named("cosine", 100, "3"))
    samples = sample_batch(fast, network.eval(), (1, *sizes), range(3), sampler="ddim")
    assert samples.shape == (3, 1, *sizes)
    again = sample_batch(fast, network, (1, *sizes), range(2, 3), sampler="ddim")
    torch.testing.assert_close(again, samples[2:], rtol=1e-4, atol=1e-5)


def test_a_step_is_the_loop_that_people_write():
    """Against a plain loop with the same random numbers."""
    network, plain = unet(), unet()
    step, x = step_of(network, seed=3), images()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, fused=True)
    for i in range(3):
        step(x)
        generator = generator_for("cpu", 3, "step", i)
        t = torch.randint(100, (16,), generator=generator)
        noise = torch.randn(x.shape, generator=generator)
        training_losses(PROCESS, plain, x, t, noise, "rescaled_mse")["loss"].mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for a, b in zip(network.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


def test_accumulation_gives_the_same_losses():
    x, y = images(), torch.arange(16) % 3
    whole = step_of(unet(num_classes=3), label_dropout=0.5)(x, y)
    parts = step_of(unet(num_classes=3), label_dropout=0.5, gradient_accumulation=4)(x, y)
    torch.testing.assert_close(parts.losses, whole.losses)
    torch.testing.assert_close(parts.grad_norm, whole.grad_norm)
    assert torch.equal(parts.t, whole.t)


class Counting(torch.optim.SGD):
    """Counts its steps in its group, as schedule-free optimizers do, and moves less and less."""

    def step(self, closure=None):
        [group] = self.param_groups
        group["k"] = group.get("k", 0) + 1
        lr, group["lr"] = group["lr"], group["lr"] / group["k"]
        super().step(closure)
        group["lr"] = lr


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (Counting, {}),
        (torch.optim.AdamW, {"fused": True}),
        (torch.optim.Adam, {"amsgrad": True}),
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.SGD, {}),
        (torch.optim.NAdam, {}),
    ],
    ids=["counting", "AdamW", "Adam, amsgrad", "SGD, momentum", "SGD", "NAdam"],
)
def test_a_saved_state_continues_to_the_bit_with_any_optimizer(optimizer, options, tmp_path):
    """With dropout and importance sampling, through the files of a checkpoint."""

    process = GaussianDiffusion(Schedule.named("cosine", 2))

    def fresh():
        network = unet(dropout=0.3)
        made = optimizer(network.parameters(), lr=1e-3, **options)
        return TrainingStep(network, process, made, timesteps=LossSecondMoment(2, history=2), ema_rates=[0.9])

    x, whole, resumed = images(8), fresh(), fresh()
    for _ in range(2):
        whole(x)
    assert whole.timesteps.probabilities()[0] != 0.5
    folder, weights = checkpoint_folder(tmp_path, whole.step), whole.network.state_dict()
    save(folder, whole.step, Config(), (), weights, whole.ema.averages, {"step": whole.state_dict()})
    saved, files = newest(tmp_path, Checkpoint.files)
    resumed.network.load_state_dict(files["model.safetensors"])
    resumed.load_state_dict(unflatten({**files["training.safetensors"], **saved.numbers})["step"])
    resumed.step = saved.step
    for _ in range(2):
        assert torch.equal(whole(x).losses, resumed(x).losses)
    for a, b in zip(whole.network.parameters(), resumed.network.parameters(), strict=True):
        assert torch.equal(a, b)
    states = [dict(flatten(step.state_dict())) for step in (whole, resumed)]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(states[1][name]))


def test_what_a_network_draws_by_itself_is_determined_by_seed_and_step():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 1)

        def forward(self, x, t):
            return self.conv(F.dropout(x)) + torch.rand(())

    ends = []
    for seed in (1, 2):
        torch.manual_seed(0)
        step = step_of(Noisy())
        torch.manual_seed(seed)
        ends.append(torch.stack([step(images(8)).losses for _ in range(2)]))
    assert torch.equal(*ends)
    assert not torch.equal(*ends[0])  # and not the same at each step


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("where", ["images", "loss", "gradient"])
def test_a_batch_that_is_not_finite_changes_nothing(optimizer, where, monkeypatch):
    """With a fused optimizer, and with one that cannot skip by itself."""
    network, works = unet(), training_losses
    step = step_of(network, optimizer, ema_rates=[0.9])
    step(images())
    before = [p.detach().clone() for p in (*network.parameters(), *step.ema.averages[0.9].values())]
    with monkeypatch.context() as patched:
        x = images()
        if where == "images":
            x.fill_(float("nan"))
        elif where == "loss":  # whose gradient is finite
            infinite = lambda *args: {"loss": works(*args)["loss"] + float("inf")}  # noqa: E731
            patched.setattr("diffusion.training.step.training_losses", infinite)
        else:  # of a finite loss
            handle = network.out[2].bias.register_hook(lambda grad: grad * float("inf"))
        assert step(x).skipped == 1
    if where == "gradient":
        handle.remove()
    for a, b in zip((*network.parameters(), *step.ema.averages[0.9].values()), before, strict=True):
        assert torch.equal(a, b)
    assert step(images()).skipped == 0
    assert all(p.isfinite().all() for p in network.parameters())


def test_clipping_bounds_the_gradient():
    network = unet()
    before = torch.nn.utils.parameters_to_vector(network.parameters()).detach()
    result = step_of(network, torch.optim.SGD, lr=1.0, grad_clip=1e-3)(images())
    moved = torch.nn.utils.parameters_to_vector(network.parameters()).detach() - before
    assert moved.norm().item() == pytest.approx(1e-3, rel=1e-3)
    assert result.grad_norm > 0.1  # the norm before clipping


class Recording(nn.Module):
    """A network that keeps the labels and small images that it is given."""

    def __init__(self):
        super().__init__()
        self.layer, self.labels, self.low_res = zero_module(nn.Conv2d(1, 2, 1)), [], []

    def forward(self, x, t, y=None, low_res=None):
        self.labels.append(y)
        self.low_res.append(low_res)
        return self.layer(x)


def test_a_share_of_the_images_loses_its_class():
    """The share that is asked for, each image by the step and its place alone; the others keep their class."""
    x, y = images(64), torch.arange(64) % 3
    dropped, accumulated, plain = Recording(), Recording(), Recording()
    for network, options in ((dropped, {"label_dropout": 0.25}), (plain, {}),
                             (accumulated, {"label_dropout": 0.25, "gradient_accumulation": 2})):  # fmt: skip
        step = step_of(network, **options)
        for _ in range(12):
            step(x, y)
    given, kept = torch.cat(dropped.labels), torch.cat(plain.labels)
    assert 130 < (given == -1).sum() < 260  # of 768: 192 expected, five standard deviations either way
    assert torch.equal(given[given >= 0], kept[given >= 0])
    assert torch.equal(kept, y.repeat(12))
    assert torch.equal(torch.cat(accumulated.labels), given)


@pytest.mark.parametrize("classes", [False, True])
def test_an_upsampler_is_given_the_mean_of_each_area(classes):
    """Of the clean image, flipped like it."""
    network, x = Recording(), images(4)
    step = step_of(network, random_flip=True)
    for _ in range(20):
        step(x, torch.arange(4) if classes else None, low_res=shrink(x, 4))
    assert all((y is not None) == classes for y in network.labels)
    clean, flips = x.view(4, 1, 4, 2, 4, 2).mean((3, 5)), 0
    for small in torch.cat(network.low_res):
        matches = [torch.allclose(small, wanted, atol=1e-6) for wanted in (*clean, *clean.flip(-1))]
        assert sum(matches) == 1
        flips += matches.index(True) >= 4
    assert 20 < flips < 60  # of 80


def test_any_network_with_the_interface_can_be_trained():
    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = zero_module(nn.Conv2d(1, 2, 1))

        def forward(self, x, t):
            return self.layer(x)

    step = step_of(Linear(), lr=5e-2)
    means = [step(images(64)).losses.mean() for _ in range(40)]
    assert sum(means[-10:]) < 0.8 * sum(means[:10])


class Half(nn.Module):
    """A network that forgets the channels of the variance."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 1)

    def forward(self, x, t):
        return self.layer(x)


def test_wrong_names_and_shapes_get_one_line_from_python_too():
    x = images(4)
    for says, call in (
        ("prediction is eps; it must be one of epsilon", lambda: GaussianDiffusion(PROCESS.schedule, "eps")),
        ("variance_type is fixed_smal; .* mean fixed_small",
         lambda: GaussianDiffusion(PROCESS.schedule, "epsilon", "fixed_smal")),
        ("schedule is cosin; .* mean cosine", lambda: Schedule.named("cosin", 10)),
        ("loss_type is mae; it must be one of mse", lambda: step_of(unet(), loss="mae")(x)),
        ("4 images do not divide into 3 micro-batches", lambda: step_of(unet(), gradient_accumulation=3)(x)),
        ("output has 1 channels; variance_type learned_range needs 2", lambda: step_of(Half())(x)),
        ("sampler is plms; it must be one of ",
         lambda: sample_batch(PROCESS, unet(), (1, 8, 8), range(1), sampler="plms")),
        ("eta is 3; it must be from 0 to 1",
         lambda: sample_batch(PROCESS, unet(), (1, 8, 8), range(1), sampler="ddim", options={"eta": 3})),
        ("guidance is 2; it must be at least 0, and without labels, conditions or a guide 1",
         lambda: sample_batch(PROCESS, unet(), (1, 8, 8), range(1), guidance=2)),
        ("there must be images, and labels from -1", lambda: sample_batch(PROCESS, unet(), (1, 8, 8), range(0))),
        ("grad_clip is -1.0, which is out of range", lambda: step_of(unet(), grad_clip=-1.0)),
        ("label_dropout is 2, which is out of range", lambda: step_of(unet(), label_dropout=2)),
        ("label_dropout is 0.5, and there are no labels y", lambda: step_of(unet(), label_dropout=0.5)(x)),
        (r"rates are \[0.9, 1.5\]", lambda: step_of(unet(), ema_rates=[0.9, 1.5])),
        (r"rates are 0.999 .* lists, such as \[0.999\]", lambda: step_of(unet(), ema_rates=0.999)),
        (r"x_start has values from 0 to 255; images must be scaled to \[-1, 1\]",
         lambda: step_of(unet())(torch.arange(256.0).view(1, 1, 16, 16))),
        (r"batch is 4; it must be the numbers of the images, such as range\(4\)",
         lambda: sample_batch(PROCESS, unet(), (1, 8, 8), 4)),
        (r"x_start is torch.uint8 \(4, 1, 8, 8\)", lambda: step_of(unet())(x.byte())),
        (r"x_start is torch.float32 \(0,", lambda: step_of(unet())(x[:0])),
        ("none of the network's parameters",
         lambda: TrainingStep(unet(), PROCESS, torch.optim.SGD(unet().parameters()))),
        (r"labels y are torch.int64 \(1,\); they must be integers \(4,\)",
         lambda: step_of(unet(num_classes=3))(x, torch.zeros(1).long())),
        ("the input has 2 channels, and the model 1", lambda: unet()(x.expand(4, 2, 8, 8), torch.zeros(4))),
        ("steps is 0; it must be at least 1", lambda: Schedule.named("cosine", 0)),
        ("dims is 4; it must be 1, 2 or 3", lambda: unet(dims=4)),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=says):
            call()


def test_an_average_of_a_short_run_follows_the_weights():
    """As in a run, where ema_warmup is on: at a constant rate of 0.999 it would still be the initial weights."""
    network = unet()
    step, before = step_of(network, lr=1e-2, ema_rates=[0.999]), network.out[2].weight.detach().clone()
    for _ in range(6):
        step(images(4))
    moved = (network.out[2].weight - before).norm()
    assert (step.ema.averages[0.999]["out.2.weight"] - before).norm() > 0.5 * moved
