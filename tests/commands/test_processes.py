"""Runs of several processes: what they agree on, how they end, and how they go on."""

import shutil
import subprocess
import time

import numpy as np
import psutil
import pytest
import torch
from helpers import ROOT, launch_environment, losses, tensors, together, user_environment
from PIL import Image
from test_trainer import assert_same_bits, small

from diffusion.run.checkpoint import Checkpoint, checkpoint_folder, newest
from diffusion.training.step import bound_loss_scale
from diffusion.training.trainer import Trainer

CONFIGS = ROOT / "configs/accelerate"
NETWORK = ["--model.channel_mult", "[1,2]", "--model.attention_resolutions", "[2]"]
PLAIN = [*NETWORK, "--train.batch_size", "16", "--train.warmup_steps", "0", "--train.lr_schedule", "constant",
         "--train.optimizer", "adamw", "--train.log_every", "1", "--sample.n", "4", "--sample.steps", "2"]  # fmt: skip


def outputs(run):
    """What the weights and the average of a run's newest checkpoint predict, for images and noise that are not the
    run's. (The weights themselves differ more: the gradient of a bias before a normalisation of one channel a group is
    rounding alone, of which Adam makes full steps.)"""
    saved, files = newest(run, Checkpoint.files)
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(64, 1, 8, 8, generator=generator), torch.linspace(0, 999, 64)
    inputs = {"y": torch.arange(64) % 10}
    if saved.config.data.low_res_size is not None:
        inputs["low_res"] = torch.randn(64, 1, 4, 4, generator=generator)
    if saved.vectors.size:
        inputs["vector"] = torch.randn(64, saved.vectors.size, generator=generator)
    with torch.no_grad():
        return torch.stack([saved.network(files[f"{name}.safetensors"]).eval()(x, t, **inputs)
                            for name in ("model", "ema_0.999")])  # fmt: skip


def assert_same_predictions(run, other):
    ours, theirs = outputs(run), outputs(other)
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


def go_back(run, step, copy):
    """A copy of a run without the checkpoints after a step."""
    shutil.copytree(run, copy)
    for path in (copy / "checkpoints").iterdir():
        if path != checkpoint_folder(copy, step):
            shutil.rmtree(path)
    return copy


def test_one_process_and_two_with_accumulation_agree_after_50_steps_and_continue_each_other(tmp_path):
    """With importance sampling, whose history is that of the whole batch, dropped conditions: classes, vectors, and the
    small images of an upsampler."""
    np.save(tmp_path / "vectors.npy", np.random.default_rng(0).normal(size=(1797, 5)))
    values = dict(train__steps=50, train__log_every=1, train__lr=1e-4, train__optimizer="adamw", checkpoint__every=25,
                  train__timestep_sampler="loss_second_moment", diffusion__steps=20, train__label_dropout=0.3,
                  data__low_res_size=4, data__conditions=str(tmp_path / "vectors.npy"))  # fmt: skip
    config = small(**values)
    flags = [*PLAIN, "--train.steps", 50, "--train.lr", "1e-4", "--checkpoint.every", 25, "--sample.every", 0,
             "--train.timestep_sampler", "loss_second_moment", "--diffusion.steps", 20, "--train.label_dropout", 0.3,
             "--data.low_res_size", 4, "--data.conditions", tmp_path / "vectors.npy",
             "--train.gradient_accumulation"]  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    Trainer(config, one).run()
    assert "on 2 x cpu" in together("train.py", "--out", two, *flags, 2)
    begun_by_one, begun_by_two = go_back(one, 25, tmp_path / "one, two"), go_back(two, 25, tmp_path / "two, one")
    assert "continues after step 25" in together("train.py", "--out", begun_by_one, *flags, 1)
    Trainer(config, begun_by_two).run()
    for run in (two, begun_by_one, begun_by_two):
        assert_same_predictions(run, one)
        for ours, theirs in zip(losses(run), losses(one), strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        ours, theirs = (
            {name: value for name, value in tensors(out).items() if "importance" in name} for out in (run, one)
        )
        assert torch.equal(ours["training.safetensors step/importance/counts"],
                           theirs["training.safetensors step/importance/counts"])  # fmt: skip
        for name, value in ours.items():
            torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-4)
    assert (theirs["training.safetensors step/importance/counts"] == 10).all()  # the last steps drew by importance


def test_a_transformer_on_a_flow_resumes_to_the_bit_and_agrees_on_one_process_and_two(tmp_path):
    flags = ["--config", "dit_small", "--diffusion.schedule", "flow", "--diffusion.prediction", "velocity",
             "--diffusion.variance", "fixed_small", "--train.timestep_sampler", "logit_normal",
             "--train.batch_size", 16,
             "--train.steps", 12, "--checkpoint.every", 6, "--sample.every", 0, "--sample.n", 4, "--train.log_every", 1,
             "--train.optimizer", "adamw", "--train.lr", "1e-4", "--train.warmup_steps", 0]  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    for out, processes in ((one, 1), (two, 2)):
        together("train.py", "--out", out, *flags, processes=processes)
        again = go_back(out, 6, tmp_path / f"{out.name} again")
        together("train.py", "--out", again, *flags, processes=processes)
        assert_same_bits(tensors(again), tensors(out))
    assert_same_predictions(two, one)
    assert (one / "samples/step_00000012.png").exists()


# --- processes that die -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """150 digits as files, in a folder for each class, so that a batch reaches over the end of an epoch."""
    folder = tmp_path_factory.mktemp("images")
    digits = small().data.open()
    for i in range(150):
        path = folder / str(int(digits.labels[i])) / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(digits.images[i, 0].numpy()).save(path)
    return folder


def everything_random(images):
    """Flags of a run with dropout, flips, accumulation, workers, importance, and epochs of 9.4 batches."""
    return ["--data.source", "folder", "--data.image_size", "8", "--data.channels", "1", "--data.path", images,
            "--data.workers", "2", "--data.random_flip", "true", "--model.dropout", "0.1", "--train.batch_size", "16",
            "--train.gradient_accumulation", "2", "--train.steps", "16", "--train.log_every", "1",
            "--train.timestep_sampler", "loss_second_moment", "--diffusion.steps", "20", "--checkpoint.every", "5",
            "--sample.every", "0", "--sample.n", "4", "--sample.steps", "2"]  # fmt: skip


@pytest.fixture(scope="module")
def untouched(images, tmp_path_factory):
    """Such a run of two processes that nothing happened to."""
    out = tmp_path_factory.mktemp("runs") / "untouched"
    together("train.py", "--out", out, *everything_random(images))
    return out


def test_one_process_that_dies_takes_all_down_and_the_launcher_goes_on_to_the_same_bits(images, untouched, tmp_path):
    run = tmp_path / "run"
    argv = ["accelerate", "launch", "--config_file", CONFIGS / "multi_gpu.yaml", "--max_restarts", 1, "train.py",
            "--out", run, *everything_random(images)]  # fmt: skip
    with subprocess.Popen([str(word) for word in argv], cwd=ROOT, env=user_environment(), text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:  # fmt: skip
        while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").read_text().count("\n") < 7:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.02)
        children = psutil.Process(process.pid).children(recursive=True)
        dead = [child for child in children if child.environ().get("RANK") == "1"]
        dead[0].kill()
        said = process.communicate(timeout=300)[0]
    assert "train.py [rank 0]: another process of this run ended" in said
    assert process.returncode == 0, said
    assert_same_bits(tensors(run), tensors(untouched))
    assert losses(run) == losses(untouched)


# --- several machines -------------------------------------------------------------------------------------------------


def test_two_machines_train_together(images, untouched, tmp_path):
    """Both are this one, each with one process."""
    machines = launch_environment(CONFIGS / "multi_machine.yaml") | {"LOCAL_WORLD_SIZE": 1, "LOCAL_RANK": 0}
    said = together("train.py", "--out", tmp_path / "run", *everything_random(images), environment=machines)
    assert "on 2 x cpu" in said
    assert_same_bits(tensors(tmp_path / "run"), tensors(untouched))


@pytest.mark.parametrize(
    ("differ", "says"),
    [
        (lambda rank: ["--out", rank], "the newest checkpoint is: step_00000002 in process 0, and none in process 1"),
        (lambda rank: ["--out", "0", "--train.lr", [1e-3, 2e-3][rank]], "the configuration is: "),
    ],
    ids=["folder", "command"],
)
def test_machines_with_other_folders_or_commands_are_told(tmp_path, differ, says):
    Trainer(small(train__steps=2, train__optimizer="adamw"), tmp_path / "0").run()
    flags = [*PLAIN, "--train.log_every", 2, "--sample.every", 0, "--checkpoint.every", 0, "--train.steps", 4]
    said = together("train.py", *flags, cwd=tmp_path, each=differ, code=2)
    assert said.count(says) == 2, said


# --- networks that are cut up -----------------------------------------------------------------------------------------


def test_a_network_that_fsdp2_cuts_up_trains_and_resumes_like_any_other(tmp_path):
    """Weights, averages, clipping, the grid and checkpoints; a run may change between this and other ways."""
    flags = [*PLAIN, "--train.grad_clip", "1", "--model.dropout", "0.1", "--train.gradient_accumulation", "2",
             "--sample.every", "2", "--checkpoint.every", "2", "--train.lr", "1e-3", "--train.steps", "4"]  # fmt: skip
    variables = launch_environment(CONFIGS / "fsdp2.yaml")
    whole, usual = tmp_path / "whole", tmp_path / "usual"
    together("tests/sharded.py", "--out", whole, *flags, environment=variables)
    together("train.py", "--out", usual, *flags)
    resumed, changed = (go_back(whole, 2, tmp_path / name) for name in ("resumed", "changed"))
    together("tests/sharded.py", "--out", resumed, *flags, environment=variables)
    together("train.py", "--out", changed, *flags)
    assert_same_bits(tensors(resumed), tensors(whole))
    for run in (whole, changed):
        assert_same_predictions(run, usual)
        for ours, theirs in zip(losses(run), losses(usual), strict=True):
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
    for grid in ("step_00000002.png", "step_00000004.png"):
        drawn = [np.asarray(Image.open(run / "samples" / grid)).astype(int) for run in (whole, usual)]
        assert abs(drawn[0] - drawn[1]).max() <= 1


def test_a_transformer_is_cut_up_too(tmp_path):
    flags = ["--config", "dit_small", "--model.depth", 2, "--train.batch_size", 16, "--train.steps", 4,
             "--checkpoint.every", 2, "--sample.every", 0, "--sample.n", 4, "--train.optimizer", "adamw",
             "--train.lr", "1e-3", "--train.warmup_steps", 0, "--train.grad_clip", 1]  # fmt: skip
    variables = launch_environment(CONFIGS / "fsdp2.yaml")
    together("tests/sharded.py", "--out", tmp_path / "whole", *flags, environment=variables)
    resumed = go_back(tmp_path / "whole", 2, tmp_path / "resumed")
    together("tests/sharded.py", "--out", resumed, *flags, environment=variables)
    assert_same_bits(tensors(resumed), tensors(tmp_path / "whole"))
    together("train.py", "--out", tmp_path / "usual", *flags, processes=1)
    assert_same_predictions(tmp_path / "whole", tmp_path / "usual")


def test_other_ways_to_cut_a_network_up_are_refused(tmp_path, monkeypatch):
    from accelerate.utils import DistributedType

    monkeypatch.setattr("accelerate.Accelerator.distributed_type", DistributedType.DEEPSPEED)
    with pytest.raises(ValueError, match=r"set up for DEEPSPEED; only FSDP2 shards"):
        Trainer(small(), tmp_path / "run")


def test_every_file_for_accelerate_is_one():
    from accelerate.commands.config.config_args import load_config_from_file

    files = {path.stem: load_config_from_file(str(path)) for path in CONFIGS.iterdir()}
    processes = {"cpu": 1, "one_gpu": 1, "multi_gpu": 2, "multi_machine": 2, "fsdp2": 2}
    assert {name: file.num_processes for name, file in files.items()} == processes


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
