"""A run: what it writes, that it continues to the bit, and what can go wrong in it."""

import dataclasses
import json
import math
import os
import re
import shutil
import signal

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

import diffusion
from diffusion import GaussianDiffusion, UsageError, load
from diffusion.config.schema import Config, config_of
from diffusion.data.sources.folder import Folder
from diffusion.data.values import shrink, to_x_start
from diffusion.errors import Stopped
from diffusion.losses import training_losses
from diffusion.models.initialisation import scalars
from diffusion.optimizers import OPTIMIZERS
from diffusion.run import checkpoint
from diffusion.run.checkpoint import Checkpoint, newest
from diffusion.training import step as step_module
from diffusion.training import trainer as trainer_module
from diffusion.training.build import learning_rate
from diffusion.training.data import describe_run
from diffusion.training.trainer import Trainer


def small(**sections):
    """Six steps of digits; `train__lr=1` and the like change a field."""
    values = {"train__steps": 6, "train__warmup_steps": 0, "train__lr_schedule": "constant",
              "train__batch_size": 16, "train__log_every": 2,
              "sample__every": 0, "sample__n": 4, "model__channel_mult": (1, 2), "model__attention_resolutions": (2,),
              "sample__steps": 2, "checkpoint__every": 0} | sections  # fmt: skip
    nested = {}
    for key, value in values.items():
        section, name = key.split("__")
        nested.setdefault(section, {})[name] = value
    if nested.get("data", {}).get("source") == "folder":
        nested["data"] = {"image_size": 8, "channels": 1} | nested["data"]
    return config_of(nested)


TINY = {"model__channel_mult": (1,), "model__attention_resolutions": ()}
"""A network of a third of the time."""


def train(config, out):
    trainer = Trainer(config, out)
    trainer.run()
    return trainer


def state(trainer):
    """Every tensor of a run, by name."""
    tensors = dict(trainer.network.state_dict())
    for rate, average in trainer.ema.averages.items():
        tensors |= {f"ema {rate} {name}": value for name, value in average.items()}
    for i, moments in trainer.training_step.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer {i} {name}": value for name, value in moments.items()}
    return tensors


def assert_same_bits(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def saved_step(out):
    """The step of the newest checkpoint, all of whose files are whole."""
    return newest(out, Checkpoint.files)[0].step


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: its folder, its tensors after each step, and what `run` reported."""
    out, heard, states = tmp_path_factory.mktemp("whole") / "run", [], {}
    trainer = Trainer(small(sample__every=4, checkpoint__every=2), out)

    def on_step(step, metrics):
        heard.append((step, metrics))
        states[step] = {name: value.clone() for name, value in state(trainer).items()}

    trainer.run(on_step)
    return out, states, heard


@pytest.fixture
def run(whole, tmp_path):
    """A copy of that run's folder."""
    return shutil.copytree(whole[0], tmp_path / "run")


def test_a_run_leaves_what_it_promises(whole):
    out, _, heard = whole
    assert [step for step, _ in heard] == [1, 2, 3, 4, 5, 6]
    assert {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()} == {
        "run.json", "config.yaml", "metrics.jsonl", "samples/step_00000004.png", "samples/step_00000006.png",
        *(f"checkpoints/step_0000000{step}/{name}" for step in (2, 4, 6) for name in
          ("SHA256SUMS", "config.yaml", "state.json", "model.safetensors", "ema_0.999.safetensors",
           "training.safetensors")),
    }  # fmt: skip
    lines = metrics(out)
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert lines == [line for _, line in heard if line]
    names = {"step", "loss", "loss_q1", "loss_q2", "loss_q3", "loss_q4", "images_per_second", "grad_norm", "lr",
             "skipped", "unreadable"}  # fmt: skip
    for line in lines:
        assert line.keys() == names
        assert all(value is None or math.isfinite(value) for value in line.values())
    assert Image.open(out / "samples/step_00000006.png").size[0] > 4 * 64


def test_a_run_on_a_tensor_is_iterated_and_used(tmp_path):
    images, labels = (torch.rand(20, 2, 8, 8) * 2 - 1).requires_grad_(), torch.arange(20) % 3
    base = tmp_path / "base.yaml"
    base.write_text("{data: {source: folder, random_flip: true}, train: {steps: 9, batch_size: 4, warmup_steps: 0}}")
    settings = {"train.steps": 3, "sample.steps": 2, "model.channel_mult": [1], "sample.n": 2}
    for step, _ in diffusion.train((images, labels), tmp_path / "run", settings, base):
        if step == 2:
            break
    trainer = diffusion.train((images, labels), tmp_path / "run", settings, config=base)
    assert (trainer.step, trainer.class_names) == (2, ("0", "1", "2"))  # it was saved when the loop was left
    assert (trainer.config.train.batch_size, trainer.config.data.random_flip) == (4, True)
    assert [step for step, _ in trainer] == [3]
    run = diffusion.load(tmp_path / "run")
    assert run.saved.step == 3
    assert run.sample(3, classes=["2"]).shape == (3, 2, 8, 8)
    assert run.labels(2) == run.labels(torch.tensor([2])) == [2]
    assert repr(run).count("\n") == 0
    with pytest.raises(UsageError, match=r"unknown key steps: did you mean"):
        diffusion.train(images, tmp_path / "other", {"steps": 3})
    with pytest.raises(UsageError, match=r"data\.image_size is that of the images, which are \(20, 2, 8, 8\)"):
        diffusion.train(images, tmp_path / "other", {"data.image_size": 16})
    with pytest.raises(UsageError, match=r"out is empty"):
        diffusion.train(images, "")
    with pytest.raises(UsageError, match=r"data is torch.float32 \(0, 2, 8, 8\)"):
        diffusion.train(images[:0], tmp_path / "other")


def test_training_learns(tmp_path):
    train(small(train__steps=32, train__log_every=8, **TINY), tmp_path)
    losses = [line["loss"] for line in metrics(tmp_path)]
    assert losses[-1] < 0.75 * losses[0]


BY_IMPORTANCE = dict(
    train__timestep_sampler="loss_second_moment", diffusion__steps=2, diffusion__loss="rescaled_kl", train__history=4
)


@pytest.mark.parametrize("changes", [{}, BY_IMPORTANCE], ids=["uniform", "importance"])
def test_a_continued_run_ends_with_the_bits_of_an_uninterrupted_one(tmp_path, changes):
    config = small(model__dropout=0.3, train__gradient_accumulation=2, train__ema_rates=(0.9, 0.99),
                   train__ema_lengths=(0.1,), **changes)  # fmt: skip
    uninterrupted = train(config, tmp_path / "whole")
    train(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=3)), tmp_path / "parts")
    resumed = Trainer(config, tmp_path / "parts")
    assert resumed.step == 3
    resumed.run()
    assert_same_bits(state(resumed), state(uninterrupted))
    if changes:
        chances = [trainer.training_step.timesteps.probabilities() for trainer in (uninterrupted, resumed)]
        assert chances[0][0] != 0.5  # it has seen enough to choose
        assert (chances[0] == chances[1]).all()
    last = [metrics(tmp_path / name)[-1] for name in ("whole", "parts")]
    assert last[0] | {"images_per_second": 0} == last[1] | {"images_per_second": 0}


def test_an_optimizer_without_a_state_is_continued(tmp_path, monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "sgd", lambda network, groups, lr: torch.optim.SGD(groups, lr=lr))
    config = small(train__steps=2, train__optimizer="sgd", checkpoint__every=1)
    uninterrupted = train(config, tmp_path)
    shutil.rmtree(checkpoint.checkpoint_folder(tmp_path, 2))
    assert_same_bits(state(train(config, tmp_path)), state(uninterrupted))


def test_a_run_goes_back_where_later_checkpoints_are_moved_away(whole, run, tmp_path):
    """Metrics after it, and what a kill left of a line, are superseded; it ends with the same bits."""
    for step in (4, 6):
        checkpoint.checkpoint_folder(run, step).rename(tmp_path / f"step_{step}")
    (run / "metrics.jsonl").open("a").write('{"step": 7}\n{"st')
    trainer = Trainer(small(sample__every=4, checkpoint__every=2), run)
    assert trainer.step == 2
    superseded = (run / "metrics_superseded.jsonl").read_text().splitlines()
    assert [line[:11] for line in superseded] == ['{"step": 4,', '{"step": 6,', '{"step": 7}', '{"st']
    trainer.run()
    assert_same_bits(state(trainer), whole[1][6])
    ours, theirs = ([line | {"images_per_second": 0} for line in metrics(out)] for out in (run, whole[0]))
    assert ours == theirs


def test_accumulation_is_the_whole_batch_in_parts(tmp_path):
    changes = BY_IMPORTANCE | {"train__grad_clip": 0.1, "train__optimizer": "adamw", "train__lr": 1e-3}
    a, b = (
        train(small(train__gradient_accumulation=accumulation, **changes), tmp_path / str(accumulation))
        for accumulation in (1, 4)
    )
    # Outputs are compared instead of weights: a bias before a normalisation of one channel a group has a gradient of
    # rounding alone, which Adam scales up to full steps.
    x, t, y = torch.randn(4, 1, 8, 8), torch.tensor([0.0, 10.0, 500.0, 999.0]), torch.tensor([1, 2, 3, 4])
    torch.testing.assert_close(b.network(x, t, y), a.network(x, t, y), atol=1e-4, rtol=1e-3)
    for one, parts in zip(metrics(tmp_path / "1"), metrics(tmp_path / "4"), strict=True):
        assert one["loss"] == pytest.approx(parts["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(parts["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("warmup", [True, False])
def test_the_average_follows_every_step(tmp_path, warmup):
    trainer = Trainer(small(train__steps=3, train__ema_rates=(0.5,), train__ema_warmup=warmup), tmp_path)
    weights = [trainer.network.out[2].weight.detach().clone()]
    trainer.run(lambda step, metrics: weights.append(trainer.network.out[2].weight.detach().clone()))
    average = weights[0]
    for n, weight in enumerate(weights[1:]):
        rate = min(0.5, (1 + n) / (10 + n)) if warmup else 0.5
        average = rate * average + (1 - rate) * weight
    torch.testing.assert_close(trainer.ema.averages[0.5]["out.2.weight"], average)


def test_sampling_leaves_the_weights_in_training_untouched(tmp_path):
    trainer = train(small(train__steps=2, model__dropout=0.1), tmp_path / "a")
    before = {name: value.clone() for name, value in state(trainer).items()}
    generator = torch.get_rng_state()
    trainer.sample()
    assert_same_bits(state(trainer), before)
    assert torch.equal(torch.get_rng_state(), generator)
    assert trainer.network.training
    often = train(small(train__steps=2, model__dropout=0.1, sample__every=1), tmp_path / "b")
    assert_same_bits(state(often), before)


def test_the_grid_shows_the_average_and_not_the_weights(tmp_path):
    trainer = Trainer(small(), tmp_path)
    trainer.sample()
    first = trainer.last_grid.read_bytes()
    torch.nn.init.normal_(trainer.network.out[2].weight)
    trainer.sample()
    assert trainer.last_grid.read_bytes() == first
    torch.nn.init.normal_(trainer.ema.averages[0.999]["out.2.weight"])
    trainer.sample()
    assert trainer.last_grid.read_bytes() != first


def test_no_initialisation_touches_what_zero_module_set(tmp_path):
    trainer = Trainer(small(), tmp_path)
    for weights in (trainer.network.state_dict(), trainer.ema.averages[0.999]):
        ends = [name for name in weights if name.endswith(("out_layers.3.weight", "proj_out.weight", "out.2.weight"))]
        assert len(ends) == 13
        assert all((weights[name] == 0).all() for name in ends)
    trainer.close()


def test_bf16_trains_with_float32_weights(tmp_path):
    trainer = train(small(train__steps=2, train__batch_size=2, train__precision="bf16"), tmp_path)
    assert {p.dtype for p in trainer.network.parameters()} == {torch.float32}
    assert all(math.isfinite(line["loss"]) for line in metrics(tmp_path))


def test_another_seed_is_another_run(whole, tmp_path):
    other = train(small(train__steps=1, train__seed=1), tmp_path)
    assert not torch.equal(other.network.out[2].weight, whole[1][1]["out.2.weight"])


@pytest.mark.parametrize("random_flip", [True, False])
def test_flips_mirror_half_of_the_images(tmp_path, monkeypatch, random_flip):
    left_is_white = Image.new("L", (8, 8))
    left_is_white.paste(255, (0, 0, 4, 8))
    (tmp_path / "in").mkdir()
    for i in range(16):
        left_is_white.save(tmp_path / f"in/{i}.png")
    seen = []

    def spy(process, model, x_start, *rest):
        seen.append(x_start)
        return training_losses(process, model, x_start, *rest)

    monkeypatch.setattr("diffusion.training.step.training_losses", spy)
    config = small(model__class_cond=False, data__source="folder", data__path=str(tmp_path / "in"), train__steps=3,
                   data__random_flip=random_flip)  # fmt: skip
    train(config, tmp_path / "run")
    images = torch.cat(seen)
    mirrored = (images[:, 0, :, 0] == -1).all(1) & (images[:, 0, :, 7] == 1).all(1)
    straight = (images[:, 0, :, 0] == 1).all(1) & (images[:, 0, :, 7] == -1).all(1)
    assert (mirrored | straight).all()
    assert 0.3 < mirrored.float().mean() < 0.7 if random_flip else not mirrored.any()


def test_learning_rates():
    train = dataclasses.replace(Config().train, lr=2.0, lr_schedule="constant", warmup_steps=4, steps=104)
    assert [learning_rate(train, step) for step in (0, 1, 3, 4, 103)] == [0.5, 1.0, 2.0, 2.0, 2.0]
    cosine = dataclasses.replace(train, lr_schedule="cosine")
    assert [learning_rate(cosine, step) for step in (0, 4, 54)] == pytest.approx([0.5, 2.0, 1.0])
    assert 0 < learning_rate(cosine, 103) < 1e-3
    wsd = dataclasses.replace(train, lr_schedule="wsd", steps=100)  # it falls over the last 40 steps
    assert [learning_rate(wsd, step) for step in (0, 4, 60, 80, 99)] == pytest.approx([0.5, 2.0, 2.0, 1.0, 0.05])
    wsd = dataclasses.replace(wsd, decay_share=0.2)
    assert [learning_rate(wsd, step) for step in (79, 90, 99)] == pytest.approx([2.0, 1.0, 0.1])


# --- what a run's folder is continued with ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model__num_res_blocks": 2}, "model.num_res_blocks was 1 and is 2, in the run"),
        ({"train__seed": 1}, "train.seed was 0 and is 1, in the run"),
        ({"train__ema_rates": (0.9,)}, "train.ema_rates"),
        ({"train__momentum": 0.9}, "train.momentum was 0.95 and is 0.9, in the run"),
        ({"diffusion__schedule": "linear"}, "diffusion.schedule was cosine and is linear, in the run"),
        ({"train__init_from": "/elsewhere"}, "train.init_from was null and is /elsewhere, in the run"),
        ({"train__steps": 4}, "train.steps is 4, and .* has done 6"),
    ],
)
def test_another_run_in_the_same_folder_is_refused(whole, change, says):
    before = contents(whole[0])
    with pytest.raises(UsageError, match=says):
        Trainer(small(**change), whole[0])
    after = contents(whole[0])
    assert after.keys() == before.keys()
    assert all(after[path] == before[path] for path in before if path.name != "run.json")


def test_what_may_change_may_change(run):
    heard = []
    changes = dict(
        train__steps=7,
        train__lr=1e-4,
        train__lr_schedule="wsd",
        train__decay_share=1e-9,
        train__weight_decay=0.1,
        train__gradient_accumulation=2,
        sample__sampler="ddim",
        sample__eta=0.5,
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        trainer = Trainer(small(**changes), run, warn=heard.append)
        trainer.run()
    finally:
        torch.set_num_threads(threads)
    assert trainer.training_step.optimizer.param_groups[0]["weight_decay"] == 0.1
    assert metrics(run)[-1]["lr"] == 1e-4
    assert saved_step(run) == 7
    for said in ("train.steps was 6 and is 7", "train.lr was 0.005 and is 0.0001", "sample.eta was null and is 0.5",
                 f"threads was {threads} and is {threads + 1}"):  # fmt: skip
        assert said in "; ".join(heard)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"train__batch_size": 2000}, "hold 1797 images, fewer than train.batch_size 2000"),
        ({"train__precision": "fp16"}, "fp16, which needs a GPU"),
    ],
)
def test_what_cannot_begin_says_so(tmp_path, change, says):
    with pytest.raises(UsageError, match=says):
        Trainer(small(**change), tmp_path / "a/run")
    assert list(tmp_path.iterdir()) == []


def test_two_runs_in_one_folder_at_once_are_refused(tmp_path, monkeypatch):
    """The second of two starts looks for checkpoints once no other process can be saving one."""
    first = Trainer(small(train__steps=1), tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "newest", lambda *args: pytest.fail("looked for checkpoints"))
        with pytest.raises(UsageError, match=r"is in use by this process: close\(\) its other trainer first"):
            Trainer(small(train__steps=2), tmp_path)
        mark = json.loads((tmp_path / "run.json").read_text())
        (tmp_path / "run.json").write_text(json.dumps(mark | {"process": 1}))
        with pytest.raises(UsageError, match=f"is in use by another process that trains there: 1 on {mark['host']}"):
            Trainer(small(train__steps=2), tmp_path)
    first.run()
    assert train(small(train__steps=2), tmp_path).step == 2


# --- numbers that go bad ----------------------------------------------------------------------------------------------


def test_a_run_that_never_comes_back_ends_and_says_where(tmp_path):
    """A learning rate that no network bears: the weights of such steps are not saved as good ones."""
    config = small(train__lr=1e30, train__steps=100, train__max_skipped=3, train__log_every=1, checkpoint__every=1)
    heard = []
    trainer = Trainer(config, tmp_path, warn=heard.append)
    with pytest.raises(
        UsageError, match=r"3 steps in a row .* was step (\d), with t \d+, .* images number \d+, "
    ) as caught:
        trainer.run()
    last = int(re.search(r"was step (\d)", str(caught.value))[1])
    assert trainer.step == last
    assert len(heard) == 3
    assert saved_step(tmp_path) == last - 3
    t = [int(word) for word in re.search(r"with t ([\d, ]+), \.\.\.", str(caught.value))[1].split(",")]
    assert t == trainer.training_step.draws(last - 1, 16, (1, 8, 8)).t[:8].tolist()


def test_divergence_before_the_first_checkpoint_does_not_speak_of_one(tmp_path):
    config = small(train__lr=1e30, train__steps=50, train__max_skipped=2, train__log_every=1)
    says = r"no checkpoint was saved before, so the same command begins again, with a lower train\.lr"
    with pytest.raises(UsageError, match=says):
        Trainer(config, tmp_path).run()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    for line in lines:
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert json.loads(lines[-1])["grad_norm"] is None


def test_a_step_that_is_not_finite_touches_nothing_and_is_counted(whole, tmp_path, monkeypatch):
    """Weights, averages, moments and the optimizer's own count are those of the step before."""
    works, states = step_module.training_losses, {}

    def broken(*args):
        terms = works(*args)
        if trainer.step == 2:
            terms["loss"] = terms["loss"] * float("nan")
        return terms

    monkeypatch.setattr(step_module, "training_losses", broken)
    trainer = Trainer(small(train__log_every=1, train__steps=4), tmp_path)
    trainer.run(lambda step, _: states.update({step: {name: value.clone() for name, value in state(trainer).items()}}))
    assert_same_bits(states[3], whole[1][2])
    assert all(value.isfinite().all() for value in states[4].values())
    assert (states[4]["out.2.weight"] != states[3]["out.2.weight"]).any()
    counts = [value for name, value in states[4].items() if name.startswith("optimizer") and name.endswith(" step")]
    assert set(map(float, counts)) == {3}
    assert [line["skipped"] for line in metrics(tmp_path)] == [0, 0, 1, 0]
    assert metrics(tmp_path)[2]["loss"] is None


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    """A rate so high that one step of a finite gradient ruins the weights: no step is skipped."""
    trainer = Trainer(small(train__lr=1e300, train__steps=1), tmp_path / "run")
    with pytest.raises(UsageError, match=r"after step 1, [\w.]+ is no longer finite, and nothing is saved"):
        trainer.run()
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))


# --- saves that fail, are damaged, or are too many --------------------------------------------------------------------


def test_a_damaged_newest_checkpoint_is_put_away_and_the_run_ends_with_the_same_bits(whole, run):
    damaged = run / "checkpoints/step_00000006"
    (damaged / "training.safetensors").write_bytes(b"")
    (run / "checkpoints/.step_00000003.tmp").mkdir()  # of a kill
    heard = []
    trainer = Trainer(small(sample__every=4, checkpoint__every=2), run, warn=heard.append)
    assert trainer.step == 4
    [said] = heard
    assert "step_00000006 is not whole: training.safetensors is damaged" in said
    assert "that of step 4 is used" in said
    trainer.run()
    assert_same_bits(state(trainer), whole[1][6])
    names = sorted(path.name for path in damaged.parent.iterdir())
    assert names[0].startswith("damaged_step_00000006_")
    assert names[1:] == ["step_00000002", "step_00000004", "step_00000006"]
    assert [line["step"] for line in metrics(run)] == [2, 4, 6]


def test_only_the_last_checkpoints_are_kept(tmp_path):
    train(small(train__steps=4, checkpoint__every=1, checkpoint__keep_last=1, checkpoint__keep_every=3), tmp_path)
    assert [path.name for path in checkpoint.folders(tmp_path)] == ["step_00000004", "step_00000003"]


@pytest.mark.parametrize("broken", ["checkpoint", "grid"])
def test_a_full_disk(whole, tmp_path, monkeypatch, broken):
    """The run stops with what was saved before, and continues."""
    config = small(train__steps=4, checkpoint__every=2, sample__every=2)
    target = "safetensors.torch.save_file" if broken == "checkpoint" else "diffusion.training.trainer.save_grid"
    calls, heard = [], []

    def full(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2 or broken == "grid":
            raise OSError(28, "No space left on device")
        return works(*args, **kwargs)

    works = checkpoint.safetensors.torch.save_file if broken == "checkpoint" else trainer_module.save_grid
    with monkeypatch.context() as patched:
        patched.setattr(target, full)
        left = "no checkpoint was saved" if broken == "checkpoint" else "the checkpoints up to step 2 are whole"
        with pytest.raises(UsageError, match=rf"cannot be written: .*No space left on device; {left}"):
            Trainer(config, tmp_path, warn=heard.append).run()
        assert not heard
    trainer = train(config, tmp_path)  # there is room again
    assert saved_step(tmp_path) == 4
    assert not list((tmp_path / "checkpoints").glob(".*"))
    assert_same_bits(state(trainer), whole[1][4])


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
def test_a_signal_saves_and_stops(tmp_path, name):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    trainer = Trainer(small(), tmp_path)
    with pytest.raises(Stopped, match=f"stopped by {name} after step 1, which is saved") as caught:
        trainer.run(lambda step, metrics: os.kill(os.getpid(), number))
    assert caught.value.code == 128 + number
    assert signal.getsignal(number) is before
    assert saved_step(tmp_path) == 1


def test_a_run_that_a_signal_stopped_ends_with_the_same_bits(whole, tmp_path):
    with pytest.raises(Stopped):
        Trainer(small(), tmp_path).run(lambda step, _: os.kill(os.getpid(), signal.SIGTERM) if step == 3 else None)
    assert saved_step(tmp_path) == 3
    assert_same_bits(state(train(small(), tmp_path)), whole[1][6])
    ours, theirs = ([line | {"images_per_second": 0} for line in metrics(out)] for out in (tmp_path, whole[0]))
    assert ours == theirs  # a line of the metrics goes on, too


def test_a_signal_that_was_ignored_stays_ignored(tmp_path):
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        Trainer(small(train__steps=1), tmp_path).run(lambda step, _: os.kill(os.getpid(), signal.SIGHUP))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert saved_step(tmp_path) == 1


def test_a_signal_cuts_a_grid_off(tmp_path, monkeypatch):
    trainer = Trainer(small(sample__every=2, sample__steps=1000), tmp_path / "run")
    drawn = []
    works = GaussianDiffusion.predict_xstart

    def interrupted(*args):
        drawn.append(args)
        if len(drawn) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return works(*args)

    monkeypatch.setattr("diffusion.samplers.GaussianDiffusion.predict_xstart", interrupted)
    with pytest.raises(Stopped, match="after step 2, which is saved"):
        trainer.run()
    assert len(drawn) == 5
    assert not (tmp_path / "run/samples").exists()
    assert saved_step(tmp_path / "run") == 2


# --- data that changed ------------------------------------------------------------------------------------------------


def noise_images(folder, count):
    folder.mkdir()
    for i in range(count):
        Image.effect_noise((8, 8), 100).save(folder / f"{i}.png")
    return folder


def on_folder(folder, steps, *, lr=1e-3, **data):
    """A run on a folder of images, in batches of four."""
    plain = small(train__steps=steps, train__batch_size=4, train__log_every=4, train__lr=lr, model__class_cond=False,
                  model__dropout=0.1, **TINY)  # fmt: skip
    return dataclasses.replace(plain, data=Folder(image_size=8, channels=1, path=str(folder), **data))


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_run_does_not_go_on_with_other_images_unless_that_is_meant(tmp_path, monkeypatch, in_memory):
    if not in_memory:
        monkeypatch.setattr("diffusion.data.image_files.IN_MEMORY_BYTES", 0)
    folder, run = noise_images(tmp_path / "images", 5), tmp_path / "run"
    train(on_folder(folder, 1), run)
    moved = folder.rename(tmp_path / "moved")
    train(on_folder(moved, 2), run)  # the same images
    Image.effect_noise((30, 30), 50).save(moved / "3.png")
    with pytest.raises(UsageError, match=r"the data are not those .*: --data\.allow_change true continues on these"):
        Trainer(on_folder(moved, 3), run)
    heard = []
    trainer = Trainer(on_folder(moved, 3, allow_change=True), run, warn=heard.append)
    trainer.run()
    assert "the data have changed: held-out images may have been trained on" in "; ".join(heard)


@pytest.mark.parametrize(("in_memory", "workers"), [(True, 0), (False, 2)])
def test_images_that_cannot_be_read_are_counted_and_the_run_still_resumes_exactly(
    tmp_path, monkeypatch, in_memory, workers
):
    if not in_memory:
        monkeypatch.setattr("diffusion.data.image_files.IN_MEMORY_BYTES", 0)
    folder = noise_images(tmp_path / "images", 9)
    (folder / "4.png").write_bytes(b"not this one")
    config, heard = on_folder(folder, 9, on_error="skip", workers=workers, random_flip=True), []
    uninterrupted = Trainer(config, tmp_path / "whole", warn=heard.append)
    uninterrupted.run()
    assert all("4.png cannot be read as an image" in message for message in heard)
    if in_memory:
        assert "1 image files left out, since they cannot be read" in heard[0]
    assert sum(line["unreadable"] for line in metrics(tmp_path / "whole")) == (0 if in_memory else 4)  # 36 of 9 images
    trainer = Trainer(config, tmp_path / "run")
    with pytest.raises(Stopped):  # between two lines of the log
        trainer.run(lambda step, _: os.kill(os.getpid(), signal.SIGTERM) if step == 6 else None)
    assert_same_bits(state(train(config, tmp_path / "run")), state(uninterrupted))
    lines = [[{**line, "images_per_second": 0} for line in metrics(tmp_path / name)] for name in ("run", "whole")]
    assert lines[0] == lines[1]


# --- upsamplers, averages ---------------------------------------------------------------------------------------------


def test_an_upsampler_learns_to_use_the_small_image(tmp_path):
    """Digits from 4x4 to 8x8: what it draws shrinks back to what it was given, and only to that."""
    config = small(train__steps=40, train__lr=1e-2, train__ema_rates=(0.9,), sample__n=1, data__low_res_size=4,
                   diffusion__steps=100, diffusion__prediction="x_start", diffusion__variance="fixed_small",
                   **TINY)  # fmt: skip
    trainer = train(config, tmp_path)
    assert trainer.last_grid.exists()
    low_res = shrink(to_x_start(trainer.dataset.images[:16]), 4)
    labels = trainer.dataset.labels[:16].tolist()
    drawn = diffusion.load(tmp_path).sample(16, classes=labels, low_res=low_res, sampler="ddim", steps=5)
    error = ((shrink(drawn, 4) - low_res) ** 2).mean()
    elsewhere = ((shrink(drawn, 4) - low_res.roll(1, 0)) ** 2).mean()
    assert error < 0.2 * elsewhere  # 0.03 when this was written


@pytest.mark.parametrize(
    ("values", "says"),
    [({"ema_rates": [], "ema_lengths": []}, "train.ema_rates is [], and train.ema_lengths too"),
     ({"ema_lengths": [0.3]}, "train.ema_lengths are [0.3]; they must be different, above 0"),
     ({"ema_lengths": [0.1, 0.1]}, "train.ema_lengths are [0.1, 0.1]; they must be different")],
)  # fmt: skip
def test_impossible_averages_are_refused_before_the_first_step(values, says):
    with pytest.raises(UsageError, match=re.escape(says)):
        config_of({"train": values})


FIXUP = dict(model__use_norm=False, model__init="fixup")


def test_a_fixup_run_continues_with_the_bits_of_an_uninterrupted_one(tmp_path):
    factor = 0.1
    changes = FIXUP | dict(train__scalar_lr_factor=factor, train__weight_decay=0.1, model__dropout=0.1,
                           train__optimizer="adamw", train__lr=1e-3, train__lr_schedule="constant",
                           train__warmup_steps=0)  # fmt: skip
    whole = Trainer(small(**changes), tmp_path / "whole")
    whole.run()
    Trainer(small(train__steps=3, **changes), tmp_path / "run").run()
    again = Trainer(small(**changes), tmp_path / "run")
    again.run()
    assert_same_bits(state(again), state(whole))
    assert {group["lr"] for group in whole.training_step.optimizer.param_groups} == {1e-3, 1e-3 * factor}
    assert [group["weight_decay"] for group in whole.training_step.optimizer.param_groups] == [0.1, 0.0]
    assert len(whole.training_step.optimizer.param_groups[1]["params"]) == len(scalars(whole.network))
    network = load(tmp_path / "run").network
    assert any(p.item() not in (0.0, 1.0) for p in scalars(network))


def test_a_run_whose_rates_fall_with_the_width_continues_with_the_same_bits(tmp_path):
    changes = dict(train__lr_base_width=64, train__weight_decay=0.1)  # half the width: twice the rate
    whole = train(small(**changes), tmp_path / "whole")
    train(small(train__steps=3, **changes), tmp_path / "run")
    assert_same_bits(state(train(small(**changes), tmp_path / "run")), state(whole))
    lr = whole.config.train.lr
    assert any("from 64 learn at 64/32 of train.lr" in line for line in describe_run(whole.config, whole.data))
    assert {group["lr"] for group in whole.training_step.optimizer.param_groups} == {lr, 2 * lr}
    with pytest.raises(UsageError, match=r"train\.lr_base_width was 64 and is null, in the run"):
        train(small(train__weight_decay=0.1), tmp_path / "run")


def test_fixup_upsamples_too(tmp_path):
    assert len(scalars(small(**FIXUP, data__low_res_size=4).network(10))) > 50
    Trainer(small(**FIXUP, data__low_res_size=4), tmp_path).run()


def test_without_normalisation_clipping_is_advised(tmp_path):
    heard = []
    Trainer(small(**FIXUP), tmp_path / "a", warn=heard.append)
    assert "--train.grad_clip 1" in heard[0]
    Trainer(small(**FIXUP, train__grad_clip=1.0), tmp_path / "b", warn=heard.append)
    Trainer(small(), tmp_path / "c", warn=heard.append)
    assert len(heard) == 1


def test_auto_precision_is_bf16_where_the_processor_multiplies_it(tmp_path, monkeypatch):
    heard = []
    for has, precision, steps in ((True, "bf16", 2), (False, "no", 4)):
        monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": has}, raising=False)  # noqa: B023
        trainer = Trainer(small(**TINY, train__precision="auto", train__steps=steps), tmp_path / "run", heard.append)
        assert trainer.accelerator.mixed_precision == precision
        trainer.run()
        AcceleratorState._reset_state(reset_partial_state=True)
    assert any("the run continues with other rounding: precision was bf16 and is no" in line for line in heard)
