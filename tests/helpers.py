"""The golden figures, the known weights and noise that they were computed with, and whole commands."""

import importlib
import json
import math
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from diffusion import GaussianDiffusion, Schedule, UNetModel

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"
BIN = Path(sys.executable).parent
SMALL = ["--train.steps", "3", "--train.warmup_steps", "0", "--train.lr_schedule", "constant",
         "--train.batch_size", "16", "--train.log_every", "1",
         "--model.channel_mult", "[1,2]", "--model.attention_resolutions", "[2]",
         "--sample.n", "6", "--sample.steps", "2"]  # fmt: skip


def golden(name):
    """A golden file: a dict of arrays (.npz) or what the JSON says."""
    path = GOLDEN / name
    if path.suffix == ".json":
        return json.loads(path.read_text())
    with np.load(path) as arrays:
        return dict(arrays)


def fill(model, seed):
    """Give every parameter the known value of the golden figures' guide, in alphabetical order."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted((name, p) for name, p in model.named_parameters() if p.requires_grad):
            z = torch.randn(p.shape, generator=generator)
            if p.ndim > 1:
                p.copy_(z / math.sqrt(p[0].numel()))
            else:
                p.copy_(1 + 0.1 * z if name.endswith("weight") else 0.1 * z)
    return model


def golden_unet(case, **options):
    """A network of the golden figures, with fresh weights. (The published SuperResModel is one of our options.)"""
    small = {"image_channels": case["kwargs"]["in_channels"]} if case["model"] == "SuperResModel" else {}
    return UNetModel(**case["kwargs"], **small, **options)


def moved(network):
    """The network with weights like those of a trained one: none is zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return network


def small_unet(variance="learned_range", **options):
    """The network that losses and samples were computed with."""
    learned = variance in ("learned", "learned_range")
    arguments = dict(
        in_channels=3, model_channels=32, out_channels=6 if learned else 3, num_res_blocks=1,
        attention_resolutions=(2,), channel_mult=(1, 2), num_heads=2, use_scale_shift_norm=True,
    )  # fmt: skip
    return fill(UNetModel(**(arguments | options)), 1 if learned else 2)


def process(schedule="cosine", steps=1000, respacing="", mean="epsilon", variance="learned_range", rescale=True):
    return GaussianDiffusion(Schedule.named(schedule, steps, respacing), mean, variance, rescale)


def tensor(array):
    return torch.from_numpy(array)


def user_environment():
    """The environment as a user has it; with a GPU, promises to the bit are still those of the CPU."""
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    if not torch.cuda.is_available():
        environment.pop("ACCELERATE_USE_CPU")
    with socket.socket() as free:  # several tests may be running
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return environment | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PET_MASTER_PORT": str(port)}


def command(*argv, code=0, cwd=ROOT):
    """Run a whole command; its output."""
    done = subprocess.run(
        [str(a) for a in argv], capture_output=True, text=True, cwd=cwd, env=user_environment(), timeout=300
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([f"diffusion.commands.{name}" for name in ("train", "sample", "evaluate")]
                             + ["diffusion.training.trainer", "torch._dynamo", "accelerate"])  # fmt: skip


class Forked:
    """A script such as `train.py` as torchrun runs it, in processes that are forked from one that has imported
    everything: seconds of CPU time less each. Has the methods of a `Popen` of the first process that tests use.

    Args:
        each: further arguments of each process, by rank.
        environment: further variables.
    """

    def __init__(self, script, *argv, processes=1, cwd=ROOT, each=lambda rank: (), environment=()):
        user = user_environment()
        shared = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1",
                  "MASTER_PORT": user["PET_MASTER_PORT"], "OMP_NUM_THREADS": 1} if processes > 1 else {}  # fmt: skip
        self.output, self.processes = tempfile.TemporaryFile(), []  # noqa: SIM115
        for rank in range(processes):
            ranks = {"RANK": rank, "LOCAL_RANK": rank} if processes > 1 else {}
            variables = {name: str(value) for name, value in (user | shared | ranks | dict(environment)).items()}
            output = multiprocessing.reduction.DupFd(self.output.fileno())
            words = [script, *map(str, (*argv, *each(rank)))]
            self.processes.append(FORKS.Process(target=_forked, args=(variables, words, cwd, output)))
            self.processes[-1].start()
        self.pid = self.processes[0].pid

    @property
    def returncode(self):
        return self.processes[0].exitcode

    def poll(self):
        return self.returncode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def terminate(self):
        self.processes[0].terminate()

    def kill(self):
        self.processes[0].kill()
        self.processes[0].join()

    def communicate(self, timeout=300):
        """Wait for all processes. Returns "" and all that they print."""
        for process in self.processes:
            process.join(timeout)
            process.kill()
            process.join()
        self.output.seek(0)
        return "", self.output.read().decode()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.communicate(0 if any(exception) else 60)


def together(script, *argv, code=0, timeout=300, **options):
    """Run a script in `processes` forked processes (2). Returns all that they print."""
    run = Forked(script, *argv, **{"processes": 2} | options)
    output = run.communicate(timeout)[1]
    assert [process.exitcode for process in run.processes] == [code] * len(run.processes), output
    return output


def launch_environment(config_file):
    """The variables that `accelerate launch --config_file` sets, but for those of ranks."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils import prepare_multi_gpu_env

    args = launch_command_parser().parse_args(["--config_file", str(config_file), "train.py"])
    variables = prepare_multi_gpu_env(_validate_launch_command(args)[0])
    return {name: value for name, value in variables.items() if name.startswith(("ACCELERATE_", "FSDP_"))}


def _forked(environment, argv, cwd, output):
    from diffusion.commands.terminal import exit_code

    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    multiprocessing.set_start_method(None, force=True)  # as a new process has it
    descriptor = output.detach()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if "RANK" in environment:
        torch.set_num_threads(1)  # torchrun sets OMP_NUM_THREADS
    sys.argv = argv
    folder, name = Path(argv[0]).parent.name, Path(argv[0]).stem
    package = {"benchmarks": "benchmarks.", "tests": ""}.get(folder, "diffusion.commands.")
    code = exit_code(importlib.import_module(f"{package}{name}").main)
    sys.stdout.flush()
    os._exit(code)


def script(module, monkeypatch, capsys, *argv):
    """Run a script's main in this process: exit code, stdout, stderr."""
    from diffusion.commands.terminal import exit_code

    monkeypatch.setattr(sys, "argv", [f"{module.__name__.split('.')[-1]}.py", *map(str, argv)])
    code = exit_code(module.main)
    out = capsys.readouterr()
    return code, out.out, out.err


def tensors(run):
    """Every tensor of a run's newest checkpoint, by file and name."""
    from diffusion.run.checkpoint import Checkpoint, newest

    _, files = newest(run, Checkpoint.files)
    return {f"{file} {name}": value for file, content in files.items() for name, value in content.items()}


def losses(run):
    """The lines of a run's metrics, without the speed."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "images_per_second"} for line in lines]


class Trap:
    """What a pickle can do to whoever opens it: write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))
