"""Runs of several processes: what they agree on, how they end, and how they go on."""

import json
import shutil
import subprocess
import time

import numpy as np
import psutil
import pytest
import torch
from helpers import ROOT, SMALL, command, together, user_environment
from PIL import Image
from test_trainer import assert_same_bits, small

from diffusion.run import checkpoint
from diffusion.training.step import bound_loss_scale
from diffusion.training.trainer import Trainer

FOLDER = ["--data.source", "folder", "--data.image_size", "8", "--data.channels", "1"]
TWO = ["torchrun", "--nproc_per_node", "2"]
ACCELERATE = ["accelerate", "launch", "--config_file"]
CONFIGS = ROOT / "configs/accelerate"


def tensors(run):
    """Every tensor of a run's newest checkpoint, by name."""
    saved = checkpoint.open_checkpoint(run)
    training = checkpoint.load_plain(saved.path / "training.pt")
    everything = {f"weight {name}": value for name, value in saved.weights().items()}
    for rate in saved.config.train.ema_rates:
        everything |= {f"average {name}": value for name, value in saved.ema(rate).items()}
    for i, moments in training["step"]["optimizer"].items():
        everything |= {f"optimizer {i} {name}": value for name, value in moments.items()}
    return everything | {f"importance {name}": value for name, value in (training["step"]["importance"] or {}).items()}


def outputs(run):
    """What the weights and the average of a run's newest checkpoint predict, for images and noise that are not the
    run's. (Not the weights themselves: a bias before a normalisation of one channel a group has a gradient of rounding
    alone, of which Adam makes full steps.)"""
    saved = checkpoint.open_checkpoint(run)
    generator = torch.Generator().manual_seed(0)
    x, t, y = torch.randn(64, 1, 8, 8, generator=generator), torch.linspace(0, 999, 64), torch.arange(64) % 10
    with torch.no_grad():
        return torch.stack([saved.network(w).eval()(x, t, y) for w in (saved.weights(), saved.ema(0.999))])


def assert_same_predictions(run, other):
    ours, theirs = outputs(run), outputs(other)
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


def losses(run):
    """The lines of a run's metrics, without the speed."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "images_per_second"} for line in lines]


def test_one_process_two_and_accumulation_agree_after_50_steps_and_continue_each_other(tmp_path):
    flags = [*SMALL, "--train.log_every", "25", "--sample.n", "4", "--sample.every", "0", "--train.lr", "1e-4",
             "--train.optimizer", "adamw", "--train.steps"]  # fmt: skip

    def alone(out, steps, **changes):
        values = dict(train__steps=steps, train__log_every=25, train__lr=1e-4, train__optimizer="adamw") | changes
        Trainer(small(**values), out).run()

    def both(out, steps):
        together("train.py", "--out", out, *flags, steps)

    alone(tmp_path / "one", 25)
    both(tmp_path / "two", 25)
    shutil.copytree(tmp_path / "one", tmp_path / "one, then two")
    shutil.copytree(tmp_path / "two", tmp_path / "two, then one")
    both(tmp_path / "one, then two", 50)
    both(tmp_path / "two", 50)
    alone(tmp_path / "two, then one", 50)
    alone(tmp_path / "one", 50)
    alone(tmp_path / "accumulated", 50, train__gradient_accumulation=2)
    for name in ("two", "accumulated", "one, then two", "two, then one"):
        assert_same_predictions(tmp_path / name, tmp_path / "one")
        for ours, theirs in zip(losses(tmp_path / name), losses(tmp_path / "one"), strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


# --- processes that die -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """300 digits as files, in a folder for each class, so that a batch reaches over the end of an epoch."""
    folder = tmp_path_factory.mktemp("images")
    digits = small().data.open()
    for i in range(300):
        path = folder / str(int(digits.labels[i])) / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(digits.images[i, 0].numpy()).save(path)
    return folder


def everything_random(images):
    """Flags of a run with dropout, flips, accumulation, workers, importance, and epochs of 9.4 batches."""
    return [*FOLDER, "--data.path", images, "--data.workers", "2", "--data.random_flip", "true",
            "--model.dropout", "0.1", "--train.batch_size", "32", "--train.gradient_accumulation", "2",
            "--train.steps", "24",
            "--train.log_every", "1", "--train.timestep_sampler", "loss_second_moment", "--diffusion.steps", "20",
            "--checkpoint.every", "5", "--sample.every", "0", "--sample.n", "4", "--sample.steps", "2"]  # fmt: skip


@pytest.fixture(scope="module")
def untouched(images, tmp_path_factory):
    """Such a run of two processes, that nothing happened to."""
    out = tmp_path_factory.mktemp("runs") / "untouched"
    together("train.py", "--out", out, *everything_random(images))
    return out


@pytest.mark.parametrize(
    "launcher",
    [[*TWO, "--max-restarts", "1"], [*ACCELERATE, CONFIGS / "multi_gpu.yaml", "--max_restarts", "1"]],
    ids=["torchrun", "accelerate"],
)
def test_one_process_that_dies_takes_all_down_and_the_launcher_goes_on_to_the_same_bits(
    launcher, images, untouched, tmp_path
):
    argv = [*launcher, "train.py", "--out", tmp_path / "run", *everything_random(images)]
    with subprocess.Popen(
        [str(arg) for arg in argv], cwd=ROOT, env=user_environment(), text=True, stderr=subprocess.PIPE
    ) as process:
        lines = tmp_path / "run/metrics.jsonl"
        while not lines.exists() or lines.read_text().count("\n") < 7:
            assert process.poll() is None
            time.sleep(0.02)
        children = psutil.Process(process.pid).children(recursive=True)
        dead = [child for child in children if child.environ().get("RANK") == "1"]
        dead[0].kill()
        err = process.communicate(timeout=90)[1]
    assert "train.py [rank 0]: another process of this run ended" in err
    assert process.returncode == 0, err
    assert_same_bits(tensors(tmp_path / "run"), tensors(untouched))
    assert losses(tmp_path / "run") == losses(untouched)


# --- several machines -------------------------------------------------------------------------------------------------


def on_two_machines(*argvs):
    """Run one command for each of two "machines", both this one; their exit codes and what they said."""
    started = [
        subprocess.Popen([str(arg) for arg in argv], cwd=ROOT, env=user_environment(), text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for argv in argvs
    ]  # fmt: skip
    said = [process.communicate(timeout=120)[0] for process in started]
    return [process.returncode for process in started], said


def test_two_machines_train_together(images, untouched, tmp_path):
    flags = ["train.py", "--out", tmp_path / "run", *everything_random(images)]
    machines = ([*ACCELERATE, CONFIGS / "multi_machine.yaml", "--machine_rank", rank, *flags] for rank in (0, 1))
    codes, said = on_two_machines(*machines)
    assert codes == [0, 0], said
    assert "on 2 x cpu" in "".join(said)
    assert_same_bits(tensors(tmp_path / "run"), tensors(untouched))


def test_machines_that_do_not_share_the_runs_folder_are_told(tmp_path):
    Trainer(small(train__steps=2), tmp_path / "0").run()
    launcher = ["torchrun", "--nnodes", 2, "--master-port", 29517, "--node-rank"]
    flags = ["--train.steps", 4, "--train.batch_size", 16]
    codes, said = on_two_machines(
        *([*launcher, rank, "train.py", "--out", tmp_path / str(rank), *flags] for rank in (0, 1))
    )
    assert 0 not in codes
    for text in said:
        assert "the newest checkpoint is: step_00000002 in process 0, and none in process 1: --out" in text


# --- networks that are cut up -----------------------------------------------------------------------------------------


def test_a_network_that_fsdp2_cuts_up_trains_and_resumes_like_any_other(tmp_path):
    """Weights, averages, clipping, the grid and checkpoints; a run may change between this and other ways."""
    flags = [*SMALL, "--train.grad_clip", "1", "--model.dropout", "0.1", "--train.gradient_accumulation", "2",
             "--sample.every", "2", "--train.optimizer", "adamw", "--train.lr", "1e-3",
             "--train.steps"]  # fmt: skip
    sharded = [*ACCELERATE, CONFIGS / "fsdp2.yaml", "tests/sharded.py"]
    command(*sharded, "--out", tmp_path / "whole", *flags, 6)
    command(*sharded, "--out", tmp_path / "broken", *flags, 3)
    shutil.copytree(tmp_path / "broken", tmp_path / "changed")
    command(*sharded, "--out", tmp_path / "broken", *flags, 6)
    assert_same_bits(tensors(tmp_path / "broken"), tensors(tmp_path / "whole"))
    together("train.py", "--out", tmp_path / "usual", *flags, 6)
    together("train.py", "--out", tmp_path / "changed", *flags, 6)
    for name in ("whole", "changed"):
        assert_same_predictions(tmp_path / name, tmp_path / "usual")
        for ours, theirs in zip(losses(tmp_path / name), losses(tmp_path / "usual"), strict=True):
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
    for grid in ("step_00000002.png", "step_00000006.png"):
        drawn = [np.asarray(Image.open(tmp_path / name / "samples" / grid)).astype(int) for name in ("whole", "usual")]
        assert abs(drawn[0] - drawn[1]).max() <= 1


def test_other_ways_to_cut_a_network_up_are_refused(tmp_path, monkeypatch):
    from accelerate.utils import DistributedType

    monkeypatch.setattr("accelerate.Accelerator.distributed_type", DistributedType.DEEPSPEED)
    with pytest.raises(ValueError, match=r"set up for DEEPSPEED, .* --config_file configs/accelerate/fsdp2\.yaml"):
        Trainer(small(), tmp_path / "run")


def test_every_file_for_accelerate_is_one(tmp_path):
    from accelerate.commands.config.config_args import load_config_from_file

    files = {path.stem: load_config_from_file(str(path)) for path in CONFIGS.iterdir()}
    assert files.keys() == {"cpu", "one_gpu", "multi_gpu", "multi_machine", "fsdp2"}
    for name in ("cpu", "one_gpu"):
        out = command(*ACCELERATE, CONFIGS / f"{name}.yaml", "train.py", "--out", tmp_path / name, *SMALL).stdout
        assert "on 1 x" in out


# --- fp16 -------------------------------------------------------------------------------------------------------------


def test_the_loss_scale_stays_in_bounds():
    """Halved by every bad step and doubled by every good one, it neither vanishes nor grows for ever."""
    weight = torch.nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=1)
    for gradient, end in ((float("inf"), 1.0), (1.0, 2.0**24)):
        for _ in range(60):
            scaler.scale(weight * 0).backward()
            weight.grad.fill_(gradient)
            scaler.step(optimizer)
            scaler.update()
            bound_loss_scale(scaler)
            assert 1 <= scaler.get_scale() <= 2**24
        assert scaler.get_scale() == end
