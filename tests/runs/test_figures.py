"""Every figure on a model whose score is known."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
from accelerate import Accelerator
from helpers import script
from PIL import Image
from test_trainer import metrics, small
from torch import nn

import evaluate
import sample
from diffusion import GaussianDiffusion, Schedule, UsageError
from diffusion.data.base import ArrayDataset, hold_out, part
from diffusion.data.sources.arrays import Arrays
from diffusion.data.sources.digits import Digits
from diffusion.data.sources.folder import Folder
from diffusion.data.summary import describe_data
from diffusion.metrics import METRICS
from diffusion.metrics.base import Reference, Score, Subject, over_sets
from diffusion.metrics.features import FEATURES, Extractor
from diffusion.metrics.samples import frechet_distance
from diffusion.run.loaded import Run
from diffusion.samplers import SAMPLERS
from diffusion.timesteps import LossSecondMoment
from diffusion.training.build import learning_rate
from diffusion.training.held_out import held_out_loss
from diffusion.training.meter import Meter
from diffusion.training.step import TrainingStep
from diffusion.training.trainer import Trainer

CPU = torch.device("cpu")
DIGITS = Digits().open()
TAIL = 170, 102, 61, 37, 22, 13, 8, 5, 3, 2


def fold(order, counts=None):
    """Half of the digits as a data set, and the other half, which a perfect model draws from."""
    half = torch.randperm(len(DIGITS), generator=torch.Generator().manual_seed(0))
    seen, unseen = half[:900], half[900:]
    if counts:
        seen = torch.cat([seen[DIGITS.labels[seen] == y][:count] for y, count in enumerate(counts)])
    by_class = torch.argsort(DIGITS.labels[seen], stable=True)
    in_turn = torch.argsort(torch.cat([torch.arange(count) for count in DIGITS.labels[seen].bincount().tolist()]))
    seen = seen[{"sorted": by_class, "shuffled": slice(None), "in turn": by_class[in_turn]}[order]]
    return DIGITS.select(seen.numpy()), DIGITS.select(unseen.numpy())


class Function(torch.nn.Module):
    """A function as a network."""

    def __init__(self, function):
        super().__init__()
        self.forward = function


def subject_of(data, pool, n, process_index=0, num_processes=1, **options):
    """A perfect model of `data`: its samples are images of `pool`, of the class that is asked for."""
    images = pool.images.float() / 127.5 - 1
    of_class = [torch.nonzero(pool.labels == y).flatten() for y in range(10)]

    def network(x, t, y):
        number = (x.double().abs().flatten(1).sum(1) * 1e6).long()
        return torch.stack([images[of_class[c][i % len(of_class[c])]] for c, i in zip(y.tolist(), number, strict=True)])

    config = small(diffusion__prediction="x_start", diffusion__variance="fixed_small")
    state = SimpleNamespace(device=CPU, process_index=process_index, num_processes=num_processes)
    run = Run(config, Function(network), data.class_names)
    return Subject(run, data, state, Reference(data, CPU, "pixels", **options), n)


PERFECT = "frechet", "kid", "precision_recall", "nearest"


@pytest.mark.parametrize("order", ["sorted", "shuffled", "in turn"])
@pytest.mark.parametrize("counts", [None, TAIL], ids=["balanced", "long tail"])
def test_a_perfect_model_scores_like_real_images(order, counts):
    """With classes in turn, the long tail had a distance of 3.8, and a recall below a half."""
    pytest.importorskip("torch_fidelity")
    data, pool = fold(order, counts)
    mixed = torch.randperm(len(data), generator=torch.Generator().manual_seed(1))
    a, b = (
        data.images[half].float().div(127.5).sub(1).flatten(1) for half in mixed.split(min(300, len(data) // 2))[:2]
    )
    between_halves = frechet_distance(a.numpy(), b.numpy())
    for n in (len(data), 300):
        subject = subject_of(data, pool, n, most=300)
        assert np.bincount(subject.given(range(n))["y"], minlength=10) / n == pytest.approx(
            np.bincount(data.labels, minlength=10) / len(data), abs=1 / n)  # fmt: skip
        found = {
            name: METRICS[name].score(subject).figures for name in ("frechet", "kid", "precision_recall", "nearest")
        }
        assert found["frechet"]["frechet"] < 1.5 * between_halves + 0.05
        assert abs(found["kid"]["kid"]) < 3 * found["kid"]["kid_std"] + 0.01
        assert found["precision_recall"]["precision"] > 0.7
        assert found["precision_recall"]["recall"] > 0.6
        assert found["nearest"]["pixels_copies"] == 0


def test_processes_share_the_same_samples(monkeypatch):
    data, pool = fold("sorted", TAIL)
    monkeypatch.setattr("accelerate.utils.gather_object", lambda values: values)
    whole = subject_of(data, pool, 101).samples
    shares = [subject_of(data, pool, 101, process_index=i, num_processes=3).samples for i in range(3)]
    assert torch.equal(torch.cat(shares), whole)


@pytest.mark.parametrize("n", [1, 7, 1000, 9991, 10_000])
def test_a_part_is_like_the_whole(n):
    """Also of data in the order of their classes, and of classes in turn, which a constant stride would meet in one."""
    for count in (1, 10, 1000, 10_000):
        chosen = part(n, count)
        assert len(chosen) == min(n, count)
        assert (np.diff(chosen) > 0).all()
        assert 0 <= chosen[0] <= chosen[-1] < n
    if n > 9000:
        chosen = part(n, 1000)
        for labels in (np.arange(n) % 10, np.arange(n) * 10 // n):
            assert np.abs(np.bincount(labels[chosen]) - 100).max() < 40


# --- the mean over t --------------------------------------------------------------------------------------------------


def known_loss(num_timesteps):
    """A loss at each t that falls to a hundredth, as that of real models does."""
    return 0.01 + np.exp(-np.arange(num_timesteps) / (0.05 * num_timesteps))


class Known(nn.Module):
    """For images of zeros: the squared error at t is `loss[t]`, and for class y it is y more."""

    def __init__(self, process, loss):
        super().__init__()
        self.sigma = torch.from_numpy(process.tables["sigma"]).float()
        self.loss, self.unused = torch.from_numpy(loss).float(), nn.Parameter(torch.zeros(1))

    def forward(self, x, t, y=None):
        loss = self.loss[t.long()] + (0 if y is None else y)
        noise = x / self.sigma[t.long()].view(-1, 1, 1, 1)
        return noise + loss.sqrt().view(-1, 1, 1, 1) + 0 * self.unused


def fixed(num_timesteps):
    return GaussianDiffusion(Schedule.named("cosine", num_timesteps), "epsilon", "fixed_small", rescale_timesteps=False)


@pytest.mark.parametrize("num_timesteps", [100, 1000])
@pytest.mark.parametrize("n", [1, 8, 26, 103, 999, 1797, 5000])
def test_the_held_out_loss_is_the_mean_over_t_and_images(n, num_timesteps):
    process = fixed(num_timesteps)
    config = small(diffusion__loss="mse", diffusion__weighting="none", diffusion__steps=num_timesteps, sample__steps="",
                   diffusion__prediction="epsilon", diffusion__variance="fixed_small",
                   diffusion__rescale_timesteps=False)  # fmt: skip
    loss = known_loss(num_timesteps)
    for labels in (np.sort(np.arange(n) % 10), np.arange(n) % 10):
        data = ArrayDataset(torch.full((n, 1, 2, 2), 0.0), torch.from_numpy(labels), tuple("0123456789"))
        run = Run(config, Known(process, loss), data.class_names)
        found = held_out_loss(run, data, Accelerator(cpu=True), 256)
        wanted = loss.mean() + labels.mean()
        assert found == pytest.approx(wanted, rel=1e-4 if n <= 1000 else 0.02)


@pytest.mark.parametrize("by_importance", [False, True], ids=["uniform", "by importance"])
def test_the_logged_loss_is_an_estimate_over_uniform_t(by_importance):
    """Unweighted, importance sampling logs E[L^2] / E[L]: eight times as much here."""
    process, loss = fixed(40), known_loss(40)
    network = Known(process, loss)
    step = TrainingStep(network, process, torch.optim.SGD(network.parameters(), lr=0.0), loss="mse",
                        timesteps=LossSecondMoment(40) if by_importance else None,
                        accelerator=Accelerator(cpu=True))  # fmt: skip
    meter = Meter(step.accelerator)
    for i in range(120):
        result = step(torch.zeros(64, 1, 2, 2))
        if i >= 60:  # the history of losses is full
            meter.update(result.losses, result.weights, result.t * 4 // 40)
    found = meter.compute()
    assert found["loss"] == pytest.approx(loss.mean(), rel=0.005 if by_importance else 0.06)
    for q in range(4):
        assert found[f"loss_q{q + 1}"] == pytest.approx(loss[10 * q : 10 * q + 10].mean(), rel=0.1)
    assert by_importance == bool((result.weights != 1).any())


def nearly(images, times):
    """Each image so many times, with one level of noise."""
    noise = torch.randint(-1, 2, (times, *images.shape), generator=torch.Generator().manual_seed(0))
    return (images.int() + noise).clamp(0, 255).to(torch.uint8).flatten(0, 1)


# --- copies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", ["once", "twice", "nearly twice", "nearly forty times", "twenty times",
                                  "mirrored in training", "mirrored"])  # fmt: skip
def test_copies_are_found_in_data_with_duplicates_and_flips(data):
    images = DIGITS.images[:400]
    held = {"twice": images.repeat(2, 1, 1, 1), "twenty times": images[:60].repeat(20, 1, 1, 1),
            "nearly twice": torch.cat([images, (images.int() - 1).clamp(0, 255).to(torch.uint8)]),
            "nearly forty times": nearly(images[:60], 40),
            "mirrored": torch.cat([images, images.flip(-1)])}.get(data, images)  # fmt: skip
    dataset = ArrayDataset(held, torch.zeros(len(held), dtype=torch.long), ())
    copies = (images[:30].int() + 1).clamp(0, 255).to(torch.uint8)
    copies = copies.flip(-1) if "mirrored" in data else copies
    real = DIGITS.images[600:630]
    for samples, share in ((copies, 1.0), (real, 0.0), (torch.cat([copies, real]), 0.5)):
        reference = Reference(dataset, CPU, "pixels", random_flip=data == "mirrored in training")
        subject = Subject(None, dataset, None, reference)
        subject.__dict__["samples"] = samples
        figures = METRICS["nearest"].score(subject).figures
        assert figures["pixels_copies"] == pytest.approx(share, abs=0.02)
        assert figures["features_copies"] == pytest.approx(share, abs=0.05)


def test_a_spread_over_subsets_is_one():
    pytest.importorskip("torch_fidelity")
    data, pool = fold("shuffled")
    for n in (20, 72, 500):
        found = METRICS["kid"].score(subject_of(data, pool, n)).figures
        assert found["kid_std"] > 1e-5
        assert found["subset"] == n // 10


# --- what figures depend on -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sampler", "guidance"), [(name, scale) for name in SAMPLERS for scale in (1.0, 3.0)])
def test_evaluations_are_counted_around_the_network(sampler, guidance):
    data, pool = fold("shuffled")
    subject = subject_of(data, pool, 6)
    further = dict(diffusion__loss="consistency", train__init_from="first") if sampler == "consistency" else {}
    subject.run.config = small(
        diffusion__prediction="x_start", diffusion__variance="fixed_small", sample__steps="5",
        train__label_dropout=0.1, sample__sampler=sampler, sample__guidance=guidance, **further)  # fmt: skip
    network = subject.run.network
    subject.run.network = Function(lambda x, t, y: network(x, t, y.clamp(min=0)))
    assert len(subject.samples) == 6
    assert subject.evaluations == {"heun": 9, "ode": 8}.get(sampler, 5) * (2 if guidance != 1 else 1)


@pytest.mark.parametrize("sets", [2, 3, 10])
def test_an_interval_over_sets_is_students(sets):
    values = np.random.default_rng(sets).normal(1, 0.1, sets)
    found = over_sets([Score({"frechet": float(value), "subset": 5}, ["frechet"], "frechet") for value in values])
    low, high = scipy.stats.t.interval(0.95, sets - 1, values.mean(), scipy.stats.sem(values))
    assert found.figures["frechet"] == pytest.approx(values.mean())
    assert found.figures["frechet_interval"] == pytest.approx((high - low) / 2, rel=1e-3)
    assert found.figures["subset"] == 5


# --- whole commands ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("figures") / "run"
    Trainer(small(train__steps=4, checkpoint__every=2, train__ema_rates=(0.5,), train__label_dropout=0.5,
                  sample__n=4), out).run()  # fmt: skip
    return out


def test_sets_and_classes_are_asked_for(run, tmp_path, monkeypatch, capsys):
    argv = ["--ckpt", run, "--metric", "frechet,precision_recall", "--features", "pixels", "--n", 24, "--steps", 2]
    pytest.importorskip("torch_fidelity")
    code, said, err = script(evaluate, monkeypatch, capsys, *argv, "--sets", 3, "--out", tmp_path / "a.json")
    assert code == 0, err
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["frechet_interval"] > 0
    assert f"frechet: {found['frechet']:.4f} +- {found['frechet_interval']:.4f} (95% interval over 3 sets)" in said
    assert found["settings"]["sets"] == 3
    singles = []
    for seed in range(3):
        out = tmp_path / f"{seed}.json"
        assert script(evaluate, monkeypatch, capsys, *argv, "--seed", seed, "--out", out)[0] == 0
        singles.append(json.loads(out.read_text())["frechet"])
    assert found["frechet"] == pytest.approx(np.mean(singles))

    code, _, err = script(evaluate, monkeypatch, capsys, *argv, "--classes", "3,7", "--out", tmp_path / "c.json")
    assert code == 0, err
    assert json.loads((tmp_path / "c.json").read_text())["settings"]["classes"] == {"3": 183, "7": 179}
    for more, says in ((["--classes", "cat"], "classes has 'cat'"), (["--sets", 0], "--sets: invalid choice: 0"),
                       (["--sets", 11], "--sets: invalid choice: 11")):  # fmt: skip
        code, _, err = script(evaluate, monkeypatch, capsys, *argv, *more)
        assert (code, err.count("\n")) == (2, 1)
        assert says in err


def test_every_says_which_differences_may_be_chance(run, monkeypatch, capsys):
    argv = ["--ckpt", run, "--metric", "frechet", "--features", "pixels", "--n", 24, "--steps", 2, "--every"]
    code, said, err = script(evaluate, monkeypatch, capsys, *argv, "--sets", 2)
    assert code == 0, err
    assert " +- " in said.splitlines()[-1]
    assert re.search(r"; \d of the 3 others are within the intervals$", said.splitlines()[-1])
    assert "24 images are few for a Fréchet distance" in said
    code, said, _ = script(evaluate, monkeypatch, capsys, *argv)
    assert code == 0
    assert "--sets 3 tells which differences are significant" in said.splitlines()[-1]


def test_a_metric_that_fails_takes_no_others_with_it(run, tmp_path, monkeypatch, capsys):
    def fails(subject):
        raise UsageError("no score")

    monkeypatch.setitem(METRICS, "kid", METRICS["kid"]._replace(score=fails, check=lambda reference: None))
    argv = ["--ckpt", run, "--metric", "kid,frechet", "--features", "pixels", "--n", 24, "--steps", 2]
    code, said, err = script(evaluate, monkeypatch, capsys, *argv, "--out", tmp_path / "a.json")
    assert code == 2
    assert "evaluate.py: kid of step_00000004, 0.5: no score" in err
    assert "Fréchet distance in the features of pixels (at most 8 an axis): " in said
    assert "frechet" in json.loads((tmp_path / "a.json").read_text())


def test_a_model_that_ignores_its_class_is_the_same_at_any_guidance(tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    trainer = Trainer(small(train__steps=1, train__label_dropout=0.5, train__ema_rates=(0.0,)), out)
    with torch.no_grad():
        trainer.network.label_emb.weight.zero_()
    trainer.training_step.optimizer.param_groups[0]["lr"] = 0.0
    monkeypatch.setattr("diffusion.training.trainer.learning_rate", lambda train, step: 0.0)
    trainer.run()
    images = []
    for guidance in (0, 1, 3):
        code, _, err = script(sample, monkeypatch, capsys, "--ckpt", out, "--n", 4, "--steps", 4, "--guidance",
                              guidance, "--npz", "--out", tmp_path / f"{guidance}.npz")  # fmt: skip
        assert code == 0, err
        with np.load(tmp_path / f"{guidance}.npz") as arrays:
            images.append(arrays["arr_0"].astype(int))
    assert all(np.abs(other - images[1]).max() <= 1 for other in images)


def test_samples_that_are_not_finite_are_not_drawn(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("diffusion.models.unet.UNetModel.forward",
                        lambda self, x, t, y=None: torch.full((len(x), 2, 8, 8), torch.nan))  # fmt: skip
    of_samples = ["--metric", "frechet", "--features", "pixels"]
    for command, more in ((sample, ["--out", tmp_path / "a.png"]), (evaluate, of_samples)):
        code, _, err = script(command, monkeypatch, capsys, "--ckpt", run, "--n", 4, "--steps", 2, *more)
        assert code == 2
        assert "hold numbers that are not finite" in err
    assert not (tmp_path / "a.png").exists()


# --- held out, and seen -----------------------------------------------------------------------------------------------


def test_held_out_images_that_were_seen_are_counted(tmp_path, capsys):
    images = np.moveaxis(DIGITS.images[:64].numpy(), 1, -1)
    np.savez(tmp_path / "once.npz", images=images)
    np.savez(tmp_path / "twice.npz", images=np.concatenate([images, images]))
    fields = {"data__source": "arrays", "data__channels": 1, "data__image_size": 8, "model__class_cond": False,
              "train__steps": 1, "diffusion__steps": 20}  # fmt: skip
    from diffusion.commands.train import announce

    for name, says in (
        ("once", "more images are held out\n"),
        ("twice", "of which are also among those that are trained"),
    ):
        path = str(tmp_path / f"{name}.npz")
        trainer = Trainer(small(**fields, data__path=path, data__held_out=0.3), tmp_path / name)
        announce(trainer)
        assert says in capsys.readouterr().out
        trainer.close()
    whole, held = hold_out(Arrays(path=path, channels=1, image_size=8).open(), 0.3, 0)
    trained = {whole.images[i].numpy().tobytes() for i in range(len(whole))}
    seen = sum(held.images[i].numpy().tobytes() in trained for i in range(len(held)))
    assert f", {seen} of which are" in (tmp_path / "twice/run.json").read_text()

    heard = []
    path = str(tmp_path / "once.npz")
    for source, more in (
        ("all", {}),
        ("same", {"data__held_out": 0.3}),
        ("seed", {"data__held_out": 0.3, "train__seed": 5}),
    ):
        Trainer(small(**fields, data__path=path, **more), tmp_path / source).run()
        new = tmp_path / f"from {source}"
        Trainer(small(**fields, data__path=path, data__held_out=0.3, train__init_from=str(tmp_path / source)), new,
                heard.append).close()  # fmt: skip
        heard.append("|")
    everything, same, seed, _ = " ".join(heard).split("|")
    n = len(hold_out(Arrays(path=path, channels=1, image_size=8).open(), 0.3, 0)[1])
    assert f"it was trained on {n} of the {n} images held out here" in everything
    assert "held out" not in same
    assert "it was trained on " in seed
    heard.clear()
    Trainer(small(**fields, data__path=str(tmp_path / "twice.npz"), data__held_out=0.3,
                  train__init_from=str(tmp_path / "same")), tmp_path / "other", heard.append).close()  # fmt: skip
    assert "it is not known whether images that are held out here were trained on there" in " ".join(heard)


# --- schedules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "warmup"), [(100, 80), (80, 100), (100, 60), (100, 10), (3, 30), (1, 1)])
def test_the_learning_rate_never_jumps_and_its_peak_is_said(steps, warmup, tmp_path):
    train = small(train__steps=steps, train__warmup_steps=warmup, train__lr_schedule="wsd", train__lr=1.0).train
    rates = np.array([learning_rate(train, step) for step in range(steps)])
    assert np.abs(np.diff(rates)).max(initial=0) <= 1 / warmup + 1 / (0.4 * steps) + 1e-9
    heard = []
    Trainer(
        small(train__steps=steps, train__warmup_steps=warmup, train__lr_schedule="wsd"), tmp_path, heard.append
    ).close()
    assert any("train.lr is not reached" in line for line in heard) == (rates.max() < 0.99)


def test_a_continued_run_logs_what_an_uninterrupted_one_does(tmp_path):
    """The weights of importance sampling are part of what is saved between two lines."""
    config = {"train__timestep_sampler": "loss_second_moment", "diffusion__steps": 3, "train__log_every": 4,
              "sample__steps": 3, "checkpoint__every": 3, "train__steps": 8}  # fmt: skip
    Trainer(small(**config), tmp_path / "whole").run()
    with pytest.raises(KeyboardInterrupt):
        Trainer(small(**config), tmp_path / "cut").run(stop_at(3))
    Trainer(small(**config), tmp_path / "cut").run()
    whole, cut = (metrics(tmp_path / name) for name in ("whole", "cut"))
    assert [(line["loss"], line["loss_q1"]) for line in whole] == [(line["loss"], line["loss_q1"]) for line in cut]


def stop_at(last):
    def on_step(step, found):
        if step == last + 1:
            raise KeyboardInterrupt

    return on_step


# --- what a stranger found --------------------------------------------------------------------------------------------


def test_numbered_class_folders_are_scored_by_name(tmp_path, monkeypatch, capsys):
    """Of 12 folders, 10 and 11 are sorted before 2; a converted model has numbers for names."""
    for y in range(12):
        for i in range(2):
            path = tmp_path / f"data/{y}/{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 8), 20 * y + i, np.uint8)).save(path)
    np.savez(tmp_path / "data.npz", np.full((24, 8, 8, 1), 20 * np.arange(24)[:, None, None, None] // 2, np.uint8),
             np.arange(24) // 2)  # fmt: skip
    fields = {
        "data__source": "arrays",
        "data__path": str(tmp_path / "data.npz"),
        "data__image_size": 8,
        "data__channels": 1,
    }
    Trainer(small(**fields, train__steps=2), tmp_path / "run").run()
    seen = []
    monkeypatch.setattr(Subject, "data_batches", lambda self: seen.append(self.dataset) or ())
    argv = ["--ckpt", tmp_path / "run", "--data.source", "folder", "--data.path", tmp_path / "data"]
    assert script(evaluate, monkeypatch, capsys, *argv)[0] == 2  # nothing is scored
    [data] = seen
    assert data.class_names == tuple(map(str, range(12)))
    for i in range(24):
        assert data.images[i].max() // 20 == data.labels[i]


def test_other_data_are_scored_whole(run, tmp_path, monkeypatch, capsys):
    images = np.moveaxis(DIGITS.images[:40].numpy(), 1, -1)
    for name, data in (("mine", images), ("other", images[::-1])):
        np.savez(tmp_path / f"{name}.npz", data)
    fields = {"data__source": "arrays", "data__image_size": 8, "data__channels": 1, "model__class_cond": False}
    Trainer(
        small(**fields, data__path=str(tmp_path / "mine.npz"), data__held_out=0.3, train__steps=1), tmp_path / "run"
    ).run()
    counts = {}
    for name, more in (("mine", []), ("other", []), ("mine", ["--split", "held_out"])):
        argv = ["--ckpt", tmp_path / "run", "--steps", 1, "--data.path", tmp_path / f"{name}.npz", *more]
        (tmp_path / "a.json").unlink(missing_ok=True)
        code, _, err = script(evaluate, monkeypatch, capsys, *argv, "--out", tmp_path / "a.json")
        assert code == 0, err
        counts[name, *more] = json.loads((tmp_path / "a.json").read_text())["images"]
        assert ("these are not the run's data" in err) == (name == "other")
    assert counts["other",] == 40 == counts["mine",] + counts["mine", "--split", "held_out"]
    code, _, err = script(evaluate, monkeypatch, capsys, *argv[:4], "--data.path", tmp_path / "other.npz", *more)
    assert code == 2
    assert "these data are not those that the run held some out of" in err
    code, _, err = script(evaluate, monkeypatch, capsys, "--ckpt", tmp_path / "run", "--metric", "nearest", *more)
    assert code == 2
    assert "nearest looks for copies of what was trained on" in err


def test_figures_are_compared_with_those_of_before(run, tmp_path, monkeypatch, capsys):
    argv = ["--ckpt", run, "--metric", "frechet", "--features", "pixels", "--n", 20, "--steps", 2]
    code, _, err = script(evaluate, monkeypatch, capsys, *argv, "--every", "--out", tmp_path / "every.json")
    assert code == 0, err
    for more, says in ((["--every", "--ema", "none"], "--every scores all checkpoints and averages: leave out"),
                       (["--out", tmp_path / "every.json"], "is there already: name another"),
                       (["--steps", "0"], "--steps: respacing '0' is not understood"),
                       (["--data.random_flip", "true"], "unrecognized arguments: --data.random_flip"),
                       (["--metric", "bits_per_dim", "--sets", 2], "--sets is of samples")):  # fmt: skip
        code, _, err = script(evaluate, monkeypatch, capsys, *argv, *more)
        assert code == 2, more
        assert says in err


def test_one_image_has_no_error_and_few_real_images_are_said(run, tmp_path, monkeypatch, capsys):
    code, _, err = script(
        evaluate, monkeypatch, capsys, "--ckpt", run, "--n", 1, "--steps", 2, "--out", tmp_path / "a.json"
    )
    assert code == 0, err
    assert json.loads((tmp_path / "a.json").read_text())["bits_per_dim_interval"] is None
    reference = SimpleNamespace(features=torch.randn(16, 4), extractor=Extractor("pixels", None))
    score = METRICS["frechet"].score(SimpleNamespace(features=(torch.randn(3000, 4), None), reference=reference))
    assert "16 images are few" in score.notes[0]


def test_noise_is_no_copy_of_a_few_images(monkeypatch):
    """In the features of a classifier of 39 images, noise is far from all of them, and each is near to many."""
    monkeypatch.setattr("diffusion.metrics.features.CLASSIFIER_STEPS", 100)  # by then it knows them all
    few = DIGITS.select(np.arange(39))
    subject = Subject(None, few, None, Reference(few, CPU, "classifier"))
    subject.__dict__["samples"] = torch.randint(256, (48, 1, 8, 8), dtype=torch.uint8)
    figures = METRICS["nearest"].score(subject).figures
    assert figures["pixels_copies"] == 0
    assert figures["features_copies"] < 0.1


def test_figures_are_compared_by_their_files(run, tmp_path, monkeypatch, capsys):
    """The same settings give the same file; what differs otherwise is the settings, with the figures."""
    argv = ["--ckpt", run, "--metric", "frechet", "--features", "pixels", "--steps", 2, "--sets", 2]
    for name, n in (("a", 20), ("b", 20), ("c", 21)):
        assert script(evaluate, monkeypatch, capsys, *argv, "--n", n, "--out", tmp_path / f"{name}.json")[0] == 0
    a, b, c = ((tmp_path / f"{name}.json").read_text() for name in "abc")
    assert a == b
    differ = [line for line in c.splitlines() if line not in a.splitlines()]
    assert {line.split('"')[1] for line in differ} >= {"n", "frechet"}
    assert '  "n": 21,' in differ
    assert json.loads(a)["frechet_interval"] > 0


def test_a_run_in_its_data_is_refused(tmp_path):
    for i in range(16):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8), i, np.uint8)).save(tmp_path / f"images/{i}.png")
    for out in (tmp_path / "images", tmp_path / "images/run"):
        with pytest.raises(UsageError, match=r"lies in data.path .*, and would become data: name another place"):
            Trainer(small(data__source="folder", data__path=str(tmp_path / "images"), model__class_cond=False), out)
    assert not (tmp_path / "images/run").exists()
    Trainer(small(data__source="folder", data__path=str(tmp_path / "images"), model__class_cond=False,
                  train__steps=1), tmp_path / "run").run()  # fmt: skip


def test_a_part_of_the_classes_is_told_by_a_classifier_of_all(run, monkeypatch, capsys):
    pytest.importorskip("torch_fidelity")
    monkeypatch.setattr("diffusion.metrics.features.CLASSIFIER_STEPS", 20)
    classes = []
    works = FEATURES["classifier"]
    monkeypatch.setitem(
        FEATURES, "classifier", lambda data, *a: classes.append(len(set(data.labels.tolist()))) or works(data, *a)
    )
    argv = ["--ckpt", run, "--steps", 2, "--n", 20, "--classes", "3"]
    code, _, err = script(evaluate, monkeypatch, capsys, *argv, "--metric", "inception_score")
    assert code == 2
    assert "inception_score needs data of several classes, and these have one" in err
    assert classes == [10]


def test_data_that_changed_are_told_and_rank_among_themselves(tmp_path):
    path, heard = tmp_path / "a.npz", []
    fields = {"data__source": "arrays", "data__image_size": 8, "data__channels": 1, "data__path": str(path),
              "diffusion__steps": 20, "model__class_cond": False, "data__held_out": 0.3,
              "checkpoint__every": 1}  # fmt: skip
    images = np.moveaxis(DIGITS.images[:64].numpy(), 1, -1)
    for steps, data in ((1, np.zeros_like(images)), (2, images)):
        np.savez(path, data)
        more = {"data__allow_change": True} if steps == 2 else {}
        Trainer(small(**fields, **more, train__steps=steps), tmp_path / "run", heard.append).run()
    assert any("the data have changed" in line for line in heard)
    assert (tmp_path / "run/best").resolve().name == "step_00000002"


def test_arrays_that_are_cut_or_enlarged_are_told(tmp_path):
    for name, shape in (("wide", (20, 60)), ("small", (4, 4))):
        for i in range(3):
            (tmp_path / name).mkdir(exist_ok=True)
            np.save(tmp_path / f"{name}/{i}.npy", np.zeros((*shape, 1), np.uint8))
    lines = {}
    for name in ("wide", "small"):
        config = Folder(path=str(tmp_path / name), image_size=8, channels=1)
        lines[name] = "\n".join(describe_data(config, config.open()))
    assert "3 files: 3 arrays; 3 60x20" in lines["wide"]
    assert "are of another shape than 8x8: 67% of all images' area is cut off" in lines["wide"]
    assert "3 are smaller than 8x8, and are enlarged" in lines["small"]
