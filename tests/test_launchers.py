"""What accelerate launch was told is taken, or refused with both values; and what else a launcher may get wrong."""

import re
import subprocess
import sys

import pytest
import yaml
from helpers import ROOT, SMALL, command, user_environment
from test_scripts import script
from test_trainer import assert_same_bits, small, state

import train
from diffusion import UsageError
from diffusion.config.schema import config_of
from diffusion.parallel.launchers import with_launchers_settings
from diffusion.run import checkpoint
from diffusion.training.trainer import Trainer


@pytest.mark.parametrize(
    ("environment", "mine", "field", "value"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {}, "precision", "bf16"),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, {}, "precision", None),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, {"precision": "bf16"}, "precision", "bf16"),  # its default says no
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {"precision": "bf16"}, "precision", "bf16"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, {}, "gradient_accumulation", 4),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto"}, {}, "gradient_accumulation", None),
        ({"ACCELERATE_GRADIENT_CLIPPING": "0.5"}, {}, "grad_clip", 0.5),
        ({"ACCELERATE_GRADIENT_CLIPPING": "none"}, {"grad_clip": 2.0}, "grad_clip", 2.0),
    ],
)
def test_what_is_left_open_is_taken(monkeypatch, environment, mine, field, value):
    for name, text in environment.items():
        monkeypatch.setenv(name, text)
    assert getattr(with_launchers_settings(config_of({"train": mine})).train, field) == value


@pytest.mark.parametrize(
    ("environment", "mine", "says"),
    [
        (
            {"ACCELERATE_MIXED_PRECISION": "bf16"},
            {"precision": "no"},
            "precision is no, .* told --mixed_precision bf16",
        ),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, {}, "told --mixed_precision fp8; it must be no, bf16 or fp16"),
        (
            {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
            {"gradient_accumulation": 2},
            "accumulation is 2, .*_steps 4",
        ),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "3"}, {}, "train.gradient_accumulation 3 does not divide"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "many"}, {}, "steps many; it must be of type int"),
        ({"ACCELERATE_GRADIENT_CLIPPING": "0.5"}, {"grad_clip": 1.0}, "grad_clip is 1.0, .* 0.5"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"}, {}, "tp_size 2"),
    ],
)
def test_what_differs_is_refused_with_both_values(monkeypatch, environment, mine, says):
    for name, text in environment.items():
        monkeypatch.setenv(name, text)
    with pytest.raises(UsageError, match=says):
        with_launchers_settings(config_of({"train": mine}))


def test_the_flags_of_accelerate_launch_are_those_of_the_run(tmp_path):
    """Its command line and its file; accumulation it does not even pass on."""
    file = tmp_path / "accelerate.yaml"
    text = yaml.safe_load((ROOT / "configs/accelerate/cpu.yaml").read_text()) | {"mixed_precision": "bf16"}
    file.write_text(yaml.safe_dump(text))
    launch = ["accelerate", "launch", "--config_file", file, "--gradient_accumulation_steps", 2]
    command(*launch, "train.py", "--out", tmp_path / "told", *SMALL)
    command(sys.executable, "train.py", "--out", tmp_path / "set", *SMALL, "--train.precision", "bf16",
            "--train.gradient_accumulation", 2)  # fmt: skip
    told, alike = (checkpoint.open_checkpoint(tmp_path / name) for name in ("told", "set"))
    assert (told.config.train.precision, told.config.train.gradient_accumulation) == ("bf16", 2)
    assert told.config == alike.config
    assert_same_bits(told.weights(), alike.weights())
    done = command(*launch, "train.py", "--out", tmp_path / "other", *SMALL, "--train.precision", "no", code=1)
    assert "train.precision is no, and the launcher was told --mixed_precision bf16" in done.stderr
    done = command("accelerate", "launch", "--cpu", "--mixed_precision", "no", "--num_processes", 1, "train.py",
                   "--out", tmp_path / "other", *SMALL, "--train.precision", "bf16", code=1)  # fmt: skip
    assert "train.precision is bf16, and the launcher was told --mixed_precision no" in done.stderr


def test_the_environment_does_not_divide_gradients_a_second_time(tmp_path, monkeypatch):
    plain = Trainer(small(train__steps=2), tmp_path / "plain")
    plain.run()
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    told = Trainer(small(train__steps=2), tmp_path / "told")
    told.run()
    assert_same_bits(state(told), state(plain))


def test_dynamo_compiles_and_saves_the_same_names(tmp_path):
    command("accelerate", "launch", "--cpu", "--num_processes", 1, "--dynamo_backend", "eager", "train.py", "--out",
            tmp_path / "run", *SMALL)  # fmt: skip
    saved = checkpoint.open_checkpoint(tmp_path / "run")
    assert saved.network(saved.weights()) is not None


def test_inductor_without_a_compiler_is_refused(monkeypatch):
    from torch._inductor import cpp_builder

    def none():
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    monkeypatch.setattr("diffusion.parallel.launchers.on_cpu", lambda: True)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with pytest.raises(UsageError, match="needs a C\\+\\+ compiler"):
        with_launchers_settings(config_of({}))


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "WORLD_SIZE=2, but LOCAL_RANK, MASTER_ADDR, MASTER_PORT is missing"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two, which is no number"),
        (
            {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "y"},
            "MASTER_PORT=y, which is no",
        ),
        ({"LOCAL_RANK": "5"}, "LOCAL_RANK=5, but no WORLD_SIZE"),
        ({"ACCELERATE_USE_FSDP": "zzz"}, "ACCELERATE_USE_FSDP=zzz; it must be true or false"),
        ({"ACCELERATE_USE_CPU": ""}, "ACCELERATE_USE_CPU=; it must be true or false"),
        ({"ACCELERATE_DYNAMO_BACKEND": "zzz"}, "accelerate cannot start: .*ACCELERATE_DYNAMO_BACKEND=zzz"),
        ({"ACCELERATE_TORCH_DEVICE": "zzz"}, "accelerate cannot start: .*ACCELERATE_TORCH_DEVICE=zzz"),
    ],
)
def test_half_an_environment_is_named(monkeypatch, capsys, tmp_path, environment, says):
    for name, text in environment.items():
        monkeypatch.setenv(name, text)
    code, _, err = script(train, monkeypatch, capsys, "--out", tmp_path / "run", *SMALL)
    assert code == 2
    assert re.search(says, err), err
    assert err.count("\n") == 1


@pytest.mark.parametrize("streams", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_do_not_end_a_run_and_no_file_takes_their_place(tmp_path, streams):
    argv = f"{sys.executable} train.py --out {tmp_path / 'run'} {' '.join(SMALL)} {streams}"
    done = subprocess.run(argv, shell=True, cwd=ROOT, env=user_environment(), timeout=120)
    assert done.returncode == 0
    assert checkpoint.open_checkpoint(tmp_path / "run").step == 3


def test_windows_gets_one_line(tmp_path):
    code = "import sys; sys.modules['fcntl'] = None; import train"
    done = command(sys.executable, "-c", code, code=1)
    assert done.stderr == "Windows is not supported: run this in WSL2 or in a container\n"
