"""The gap to the optimal loss of any network: exact where the optimum is known, and what it says of runs."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from helpers import script
from test_report import data_of
from test_trainer import TINY, small
from torch import nn

import evaluate
from diffusion import UsageError
from diffusion.config.schema import config_of
from diffusion.data.base import ArrayDataset
from diffusion.metrics import METRICS
from diffusion.metrics.base import Reference, Subject
from diffusion.metrics.gap import LEVELS, Losses, earlier, gap, levels_of, optimal_losses, posterior_means, score
from diffusion.run.checkpoint import Checkpoint
from diffusion.run.folder import append_line, read_lines
from diffusion.run.loaded import Run, load_run
from diffusion.training.trainer import Trainer

PROCESSES = {
    "epsilon": {"diffusion__prediction": "epsilon"},
    "x_start, min_snr": {"diffusion__prediction": "x_start", "diffusion__weighting": "min_snr"},
    "v, learned variance": {"diffusion__prediction": "v", "diffusion__variance": "learned_range"},
    "previous_x": {"diffusion__prediction": "previous_x"},
    "flow": {"diffusion__schedule": "flow", "diffusion__prediction": "velocity"},
}


class Copier(nn.Module):
    """The network whose loss is the least: it knows the images, and what class each has."""

    def __init__(self, process, images, labels):
        super().__init__()
        self.process, self.images, self.labels = process, images.double(), labels

    def forward(self, x, network_t, y=None):
        table = torch.as_tensor(np.asarray(self.process.tables["network_t"])[: self.process.num_timesteps])
        t = (table[None] - network_t[:, None]).abs().argmin(1)
        alpha, sigma = (self.process.at(name, t, x).double() for name in ("alpha", "sigma"))
        distances = ((x[:, None].double() - alpha[:, None] * self.images) ** 2).flatten(2).sum(2)
        weights = -distances / (2 * sigma.view(-1, 1) ** 2)
        if y is not None:
            weights[y[:, None] != self.labels[None]] = -torch.inf
        x_start = torch.einsum("qn,n...->q...", weights.softmax(1), self.images)
        output = self.process.mean_target(x_start, x, t, (x - alpha * x_start) / sigma).float()
        return torch.cat([output, torch.zeros_like(output)], 1) if self.process.learns_variance else output


def subject_of(images, labels=None, n=None, held_out=None, noise_of=None, **settings):
    """A subject whose network is the best for images that it was trained on."""
    settings = {"diffusion__variance": "fixed_small", "model__class_cond": labels is not None, **TINY, **settings}
    data = {"data__source": "memory", "data__channels": images.shape[1], "data__image_size": tuple(images.shape[2:])}
    config, names = small(**data, **settings), ("a", "b") if labels is not None else ()
    labels = torch.zeros(len(images), dtype=torch.int64) if labels is None else labels
    dataset = ArrayDataset(images, labels, names)
    mirrored = torch.cat([images, images.flip(-1)]) if config.data.random_flip else images
    network = Copier(config.diffusion.process(), mirrored, labels.repeat(len(mirrored) // len(images)))
    saved = Checkpoint(
        Path("nowhere"), 1, config, names, data=dataset.fingerprint(), sums={"ema_0.999.safetensors": ""}
    )
    reference = Reference(dataset, torch.device("cpu"), "pixels")
    run = Run(config, network, names, checkpoint=saved)
    return Subject(run, dataset, PartialState(cpu=True), reference, n=n, held_out=held_out)


def some_images(n=40):
    return torch.rand(n, 2, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("classes", [False, True])
def test_the_best_network_has_no_gap(name, classes):
    """Also with mirrored images, and at the loss's own weights; another network, which knows other images, has one."""
    labels = torch.arange(40) % 2 if classes else None
    subject = subject_of(some_images(), labels, **PROCESSES[name], data__random_flip=True)
    figures = gap(subject).figures
    assert abs(figures["gap"]) < 1e-4 * figures["optimal_loss"]
    assert figures["optimal_loss"] > 0
    subject = subject_of(some_images(), labels, **PROCESSES[name], data__random_flip=True)
    subject.run.network.images[::2] *= 0.9
    assert gap(subject).figures["gap"] > 1e-3 * figures["optimal_loss"]


def test_the_optimal_loss_of_two_images_is_its_closed_form():
    """Of -1 and 1 everywhere, E[x_0 | x_t] is tanh(alpha sum(x_t) / sigma^2), and the least squared error of x_0 is 1
    minus the mean of its square: an integral over one normal variable."""
    images = torch.tensor([-1.0, 1.0]).repeat(300).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous()
    subject = subject_of(images, diffusion__prediction="v", n=600)
    ours, process = optimal_losses(subject, 600), subject.run.process
    z, weights = np.polynomial.hermite_e.hermegauss(200)
    alpha, sigma = (process.tables[name][levels_of(process)][:, None] for name in ("alpha", "sigma"))
    known = np.tanh(alpha * (4 * alpha + 2 * sigma * z) / sigma**2)
    wanted = ((1 - known**2) * weights).sum(1) / math.sqrt(2 * math.pi) / sigma[:, 0] ** 2  # of v, not x_0
    error, often = ours.std(0).numpy() / math.sqrt(600), wanted > 0.1  # elsewhere, rare noise is what counts
    assert ours.shape == (600, LEVELS)
    assert often.sum() > 8
    np.testing.assert_array_less(np.abs(ours.mean(0).numpy() - wanted)[often], 4 * error[often])
    assert (4 * error < 0.2 * wanted)[often].any()


def test_parts_of_a_set_count_as_the_whole_and_only_those_of_the_own_group():
    x, x_t = (torch.randn(n, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (30, 8))
    alpha, sigma = torch.linspace(0.1, 0.99, 8).double(), torch.linspace(0.9, 0.01, 8).double()
    groups, own = torch.arange(30) % 3, torch.arange(8) % 3
    log_q = -((x_t[:, None] - alpha[:, None, None] * x) ** 2).sum(2) / (2 * sigma[:, None] ** 2)
    wanted = log_q.masked_fill(own[:, None] != groups, -torch.inf).softmax(1) @ x
    for size in (30, 7, 1):
        parts = zip(x.split(size), groups.split(size), strict=True)
        torch.testing.assert_close(posterior_means(x_t, alpha, sigma, own, parts), wanted)


def history(*pairs, n=200):
    """Losses of checkpoints whose means over images are these pairs (training, held out), each with the same spread."""
    spread = torch.randn(n, LEVELS, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.02
    spread = spread - spread.mean(0)
    return [Losses(100 * (i + 1), train + spread, held_out + spread) for i, (train, held_out) in enumerate(pairs)]


@pytest.mark.parametrize(
    ("pairs", "verdict", "says"),
    [
        (
            [(0.3, 0.31), (0.25, 0.27)],
            "still learning",
            "fell by 12.9% since step 100; at this pace, twice the steps bring 12.9% at best: train",
        ),
        (
            [(0.3, 0.31), (0.25, 0.27), (0.24, 0.27)],
            "as good as held-out images allow",
            "has not fallen beyond chance since step 200",
        ),
        ([(0.3, 0.31), (0.25, 0.27), (0.2, 0.3)], "as good as held-out images allow", "risen by 11.1% since step 200"),
        ([(0.3, 0.31), (0.15, 0.3), (0.1, 0.35)], "copying", "(since step 200, of 3 checkpoints)"),
        ([(0.3, 0.31), (0.15, 0.3), (0.1, 0.35)], "copying", "train on more images, or take step 200"),
        ([(0.3, 0.31)], None, "there is no earlier checkpoint to compare with"),
    ],
)
def test_what_follows_from_the_losses_of_a_run(pairs, verdict, says):
    losses = history(*pairs)
    process = small().diffusion.process()
    result = score(losses, torch.full((200, LEVELS), 0.05, dtype=torch.float64), process)
    assert result.figures["verdict"] == verdict
    assert says in result.lines[1]
    assert result.figures["gap"] == pytest.approx(pairs[-1][0] - 0.05)


def test_few_images_give_no_verdict():
    few = [Losses(one.step, one.train[:19], one.held_out) for one in history((0.3, 0.31), (0.1, 0.35))]
    result = score(few, torch.full((19, LEVELS), 0.05, dtype=torch.float64), small().diffusion.process())
    assert result.figures["verdict"] is None
    assert result.lines[1] == "19 images are too few for a verdict, which needs 20"


def test_a_checkpoint_of_other_data_is_not_scored():
    """Of a run that was continued on other data, --every opens such ones, too."""
    subject = subject_of(some_images())
    subject.run.checkpoint = dataclasses.replace(subject.run.saved, data="of others")
    with pytest.raises(UsageError, match="needs the images that nowhere was trained on"):
        gap(subject)


def test_what_is_no_copy_is_not_called_one():
    """Where the optimal loss is near what held-out images allow, as in nearly pure noise, to reach it is no copying."""
    process, losses = small().diffusion.process(), history((0.3, 0.31), (0.28, 0.3))
    assert score(losses, torch.full((200, LEVELS), 0.27, dtype=torch.float64), process).figures["verdict"] != "copying"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("gap") / "run"
    Trainer(small(train__steps=4, checkpoint__every=2, data__held_out=0.1, **TINY), out).run()
    return out


def test_a_run_keeps_its_gap_and_shows_it_on_its_page(run, tmp_path, monkeypatch, capsys):
    out = tmp_path / "a.json"
    code, said, err = script(evaluate, monkeypatch, capsys, "--ckpt", run, "--metric", "gap", "--n", 20, "--out", out)
    assert code == 0, err
    found, [kept] = json.loads(out.read_text()), [json.loads(line) for line in (run / "scores.jsonl").open()]
    assert {name: kept[name] for name in ("checkpoint", "gap", "held_out_loss", "curves")} == {
        name: found[name] for name in ("checkpoint", "gap", "held_out_loss", "curves")
    }
    assert "still learning: the held-out loss fell by" in said
    assert found["gap"] == pytest.approx(found["training_loss"] - found["optimal_loss"])
    [shown] = data_of((run / "report.html").read_text())
    assert shown["gap"]["says"].startswith("step_00000004, 0.999: still learning: ")
    assert shown["gap"]["curves"]["optimal"] == {"x": kept["log_snr"], "y": kept["curves"]["optimal"]}
    assert shown["scores"][0].startswith("step_00000004, 0.999: gap ")


def test_a_checkpoint_is_compared_with_those_some_time_before(tmp_path):
    """With the one just before, the pace would be that of chance."""
    Trainer(small(train__steps=7, checkpoint__every=1, **TINY), tmp_path / "run").run()
    for step, compared in {7: [1, 2, 4, 5], 2: [1], 1: []}.items():
        run = load_run(tmp_path / f"run/checkpoints/step_0000000{step}")
        assert [one.saved.step for one in earlier(run)] == compared


def test_a_line_that_a_kill_cut_off_costs_no_other(run, tmp_path):
    for text, whole in (("", 0), ('{"a": 1}\n{"b', 1), ("{", 0)):
        (tmp_path / "scores.jsonl").write_text(text)
        append_line(tmp_path / "scores.jsonl", {"c": 2})
        lines = read_lines(tmp_path / "scores.jsonl")
        assert len(lines) == whole + 1
        assert lines[-1] == {"c": 2}


def test_a_broken_network_is_named_in_a_line(run, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    broken = {"train__optimizer": "adamw", "train__lr": 1e18, "train__steps": 1, "data__held_out": 0.1}
    Trainer(small(**broken, **TINY), out).run()
    code, _, err = script(evaluate, monkeypatch, capsys, "--ckpt", out, "--metric", "gap", "--n", 20)
    assert code == 2
    assert "is not finite at all noise levels: its weights are broken" in err.splitlines()[-1]


def test_a_checkpoint_in_another_runs_folder_is_compared_with_none_of_its(run, tmp_path, monkeypatch, capsys):
    other = shutil.copytree(run, tmp_path / "other", symlinks=True)
    alone = shutil.copytree(run / "checkpoints/step_00000004", other / "kept/step_00000004")
    code, said, err = script(evaluate, monkeypatch, capsys, "--ckpt", alone, "--metric", "gap", "--n", 20)
    assert code == 0, err
    assert "there is no earlier checkpoint to compare with" in said


def test_checkpoints_and_averages_are_ranked_by_their_held_out_loss(run, monkeypatch, capsys):
    argv = ["--ckpt", run, "--metric", "gap,bits_per_dim", "--n", 4, "--steps", 2, "--every"]
    code, said, err = script(evaluate, monkeypatch, capsys, *argv)
    assert code == 0, err
    assert "best by held_out_loss: step_00000004, none (" in said
    page = (run / "report.html").read_text()
    assert str(run.parent) not in page
    [shown] = data_of(page)
    assert "bits per dimension" in str(shown["scores"])
    assert shown["gap"]["says"].startswith("step_00000004, 0.999: ")  # of the first average, not of the last scored


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--split", "held_out"], "--metric gap needs the images that"),
        (["--classes", "3"], "--metric gap needs the images that"),
        (["--data.source", "arrays", "--data.path", "nowhere.npy"], "nowhere.npy"),
        (["--steps", "10"], "--steps is of samples, and gap draws none: leave it out"),
        (["--sampler", "ddim"], "--sampler is of samples, and gap draws none"),
        (["--n", "1"], "gap needs at least 2"),
    ],
)
def test_what_the_closed_form_does_not_cover_is_refused(run, argv, says, monkeypatch, capsys):
    fails = METRICS["gap"]._replace(score=lambda subject: pytest.fail("computed before the refusal"))
    monkeypatch.setitem(METRICS, "gap", fails)
    code, _, err = script(evaluate, monkeypatch, capsys, "--ckpt", run, "--metric", "gap", *argv)
    assert code == 2
    assert says in err.rstrip().splitlines()[-1]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"diffusion__loss": "kl"},
            "--metric gap is defined for the losses mse and rescaled_mse, and diffusion.loss is kl",
        ),
        ({"data__low_res_size": 4}, "not defined with condition images (low_res)"),
    ],
)
def test_losses_and_conditions_without_a_closed_form_are_refused(settings, says, tmp_path, monkeypatch, capsys):
    Trainer(small(train__steps=1, **settings), tmp_path / "run").run()
    code, _, err = script(evaluate, monkeypatch, capsys, "--ckpt", tmp_path / "run", "--metric", "gap")
    assert code == 2
    assert says in err


def test_only_images_of_the_same_condition_vector_count(tmp_path, monkeypatch, capsys):
    """Where few share one, a note says so; where each has its own, nothing is left to guess."""
    for name, vectors in {"shared": np.arange(1797)[:, None] % 600.0, "own": np.arange(1797.0)[:, None]}.items():
        np.save(tmp_path / "rows.npy", vectors)
        conditions = {"data__conditions": str(tmp_path / "rows.npy"), "model__class_cond": False}
        Trainer(small(train__steps=1, **conditions, **TINY), tmp_path / name).run()
        argv = ["--ckpt", tmp_path / name, "--metric", "gap", "--n", 10]
        code, said, err = script(evaluate, monkeypatch, capsys, *argv)
        assert code == 0, err
        assert f"{3.0 if name == 'shared' else 1.0} images share a class and condition vector on average" in said
        assert ("optimal loss 0.0000" in said) == (name == "own")
        assert "nothing is held out" in said


@pytest.mark.slow
def test_a_run_on_50_digits_copies_and_one_on_1617_does_not_in_the_time_of_the_default(tmp_path, monkeypatch, capsys):
    """And `nearest` agrees. Two minutes on two cores."""
    copies = {}
    for name, held_out in {"few": 0.9722, "most": 0.1}.items():
        config = config_of({"data": {"held_out": held_out}, "train": {"batch_size": 32 if name == "few" else 64}})
        Trainer(config, tmp_path / name).run()
        out = tmp_path / f"{name}.json"
        argv = ["--ckpt", tmp_path / name, "--metric", "gap,nearest", "--n", 300, "--out", out]
        code, _, err = script(evaluate, monkeypatch, capsys, *argv)
        assert code == 0, err
        copies[name] = json.loads(out.read_text())
    assert copies["few"]["verdict"] == "copying"
    assert copies["few"]["pixels_copies"] > 0.3
    assert copies["most"]["verdict"] == "still learning"
    assert copies["most"]["pixels_copies"] < 0.01
