"""What `accelerate launch` passes on is taken, or refused with both values; and what else a launcher may get wrong."""

import os
import re
import subprocess
import sys
import time

import psutil
import pytest
from helpers import ROOT, command, script, tensors, user_environment
from test_trainer import assert_same_bits, small, state, train

from diffusion import UsageError
from diffusion.commands import train as command_train
from diffusion.config.schema import config_of
from diffusion.parallel.launchers import check_launcher, with_launchers_settings
from diffusion.run.checkpoint import Checkpoint, newest
from diffusion.training.trainer import Trainer


@pytest.mark.parametrize(
    ("environment", "own", "field", "value"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {}, "precision", "bf16"),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, {}, "precision", None),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, {"precision": "bf16"}, "precision", "bf16"),  # accelerate's default
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {"precision": "bf16"}, "precision", "bf16"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, {}, "gradient_accumulation", 4),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto"}, {}, "gradient_accumulation", None),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"}, {"gradient_accumulation": 2}, "gradient_accumulation", 2),
        ({"ACCELERATE_GRADIENT_CLIPPING": "0.5"}, {}, "grad_clip", 0.5),
        ({"ACCELERATE_GRADIENT_CLIPPING": "none"}, {"grad_clip": 2.0}, "grad_clip", 2.0),
    ],
)
def test_what_is_left_open_is_taken(monkeypatch, environment, own, field, value):
    for name, text in environment.items():
        monkeypatch.setenv(name, text)
    assert getattr(with_launchers_settings(config_of({"train": own})).train, field) == value


@pytest.mark.parametrize(
    ("environment", "own", "says"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {"precision": "no"}, "precision is no, .* ACCELERATE_.*=bf16: leave"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, {}, "precision is fp8; it must be one of no, bf16, fp16"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, {"gradient_accumulation": 2}, "lation is 2, .*_STEPS=4"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "3"}, {}, "train.gradient_accumulation 3 does not divide"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "many"}, {}, "STEPS=many; it must be of type int"),
        ({"ACCELERATE_GRADIENT_CLIPPING": "0.5"}, {"grad_clip": 1.0}, "grad_clip is 1.0, .*=0.5"),
    ],
)
def test_what_differs_is_refused_with_both_values(monkeypatch, environment, own, says):
    for name, text in environment.items():
        monkeypatch.setenv(name, text)
    with pytest.raises(UsageError, match=says):
        with_launchers_settings(config_of({"train": own}))


def test_the_environment_does_not_divide_gradients_a_second_time(tmp_path, monkeypatch):
    plain = train(small(train__steps=2), tmp_path / "plain")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    told = train(small(train__steps=2), tmp_path / "told")
    assert_same_bits(state(told), state(plain))


def test_accelerate_launch_trains_as_python_does_with_its_settings_and_its_end_saves_the_run(tmp_path):
    run = tmp_path / "run"
    file = tmp_path / "accelerate.yaml"
    text = (ROOT / "configs/accelerate/cpu.yaml").read_text()
    file.write_text(text.replace('mixed_precision: "no"', "mixed_precision: bf16"))
    argv = ["accelerate", "launch", "--config_file", file, "train.py", "--out", run, "--train.steps", 100_000,
            "--train.batch_size", 16, "--train.warmup_steps", 0, "--train.lr_schedule", "constant",
            "--train.log_every", 1, "--checkpoint.every", 0, "--sample.every", 0]  # fmt: skip
    with subprocess.Popen([str(word) for word in argv], cwd=ROOT, env=user_environment()) as process:
        while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").read_text().count("\n") < 3:
            assert process.poll() is None
            time.sleep(0.05)
        child = psutil.Process(process.pid).children()[0]
        process.terminate()
        psutil.wait_procs([child], timeout=100)
    saved, _ = newest(run, Checkpoint.weights)
    assert saved.step >= 3
    assert saved.config.train.precision == "bf16"
    config = small(model__channel_mult=(1, 1), model__attention_resolutions=(), train__precision="bf16",
                   train__steps=saved.step)  # fmt: skip
    Trainer(config, tmp_path / "python").run()
    ours, theirs = (
        {name: value for name, value in tensors(path).items() if "meter" not in name}
        for path in (run, tmp_path / "python")
    )
    assert_same_bits(ours, theirs)


def test_a_launcher_that_starts_too_few_says_what_to_use(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setattr(sys, "argv", ["train.py"])
    words = ["sh", "-c", "echo begun; read wait", "accelerate", "launch", "--cpu", "--num_processes", "2"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as launcher:
        launcher.stdout.readline()  # before, its words may not be there yet
        monkeypatch.setattr(os, "getppid", lambda: launcher.pid)
        with pytest.raises(UsageError, match=r"one process without GPUs, not 2: use torchrun --nproc_per_node 2 train"):
            check_launcher()
        launcher.stdin.close()


def test_half_an_environment_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = script(command_train, monkeypatch, capsys, "--out", tmp_path / "run")
    assert code == 2
    assert re.search(r"accelerate cannot start: .*LOCAL_RANK=0, WORLD_SIZE=2\)", err), err
    assert err.count("\n") == 1


def test_windows_gets_one_line():
    code = "import sys; sys.modules['fcntl'] = None; import train"
    done = command(sys.executable, "-c", code, code=1)
    assert done.stderr == "Windows is not supported: run this in WSL2 or in a container\n"
