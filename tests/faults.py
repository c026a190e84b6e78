"""A run that is killed at random moments, saves included: `python tests/faults.py --kills 200`.
With --sampling, a `sample.py` of --images or --npz images is killed instead, and goes on until all are drawn.

Each attempt is a fork of this process (or one for each of --processes), which has imported everything and computed
nothing. Within --seconds, one of its processes is killed by SIGKILL, every second time in the next save after that; the
others get torchrun's SIGTERM and have to end.
After each kill, some checkpoint must load, if one was ever finished; none may be less far than before. At the end the
run is finished in peace, and every file of its last checkpoint compared with that of a run that was never touched.
"""

import argparse
import os
import random
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch._dynamo  # which the first optimizer would import, in every child

sys.path.insert(0, str(Path(__file__).parents[1]))
from diffusion.commands import sample
from diffusion.commands.terminal import exit_code
from diffusion.config.schema import config_of
from diffusion.run import checkpoint
from diffusion.training.trainer import Trainer

TO_END = 60
"""Seconds in which a process whose fellow died has to end."""


def changed(**sections):
    """The digits run with some settings changed: `train=dict(steps=3)`."""
    return config_of(sections)


def configuration(steps):
    return changed(
        model=dict(dropout=0.1),
        train=dict(
            steps=steps,
            batch_size=8,
            gradient_accumulation=2,
            log_every=1,
            timestep_sampler="loss_second_moment",
            lr_schedule="constant",
        ),
        sample=dict(every=7, n=2, steps=2),
        checkpoint=dict(every=2, keep_last=3),
    )


def attempt(out, steps, processes):
    """Start or continue the run in child processes; their numbers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [_child(out, steps, processes, rank, port) for rank in range(processes)]


def _child(out, steps, processes, rank, port):
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            if processes > 1:
                os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes),
                                   LOCAL_WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                                   OMP_NUM_THREADS="1")  # fmt: skip
            sys.stderr = open(out.with_suffix(".log"), "a", buffering=1)  # noqa: SIM115
            config = configuration(steps)
            status = exit_code(lambda: Trainer(config, out, warn=lambda message: print(message, file=sys.stderr)).run())
        except BaseException as error:
            print(f"traceback: {error!r}", file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    return child


def sampling(argv):
    """Draw in a child process; its number."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            sys.argv = ["sample.py", *argv]
            sys.stderr = sys.stdout = open(os.devnull, "w")  # noqa: SIM115
            status = exit_code(sample.main)
        finally:
            os._exit(status)
    return child


def kill_sampling(kills, seconds, rng, folder):
    """Kill a folder of images and an array while they are drawn; both have to end like those that nobody touched."""
    finish(folder / "run", 2, 1)
    for form, name, n in (("--images", "a", 150 * kills), ("--npz", "a.npz", 150 * kills)):
        outs = folder / f"killed_{name}", folder / f"whole_{name}"
        argv = ["--ckpt", str(folder / "run"), "--n", str(n), "--steps", "10", "--batch_size", "16", form, "--out"]
        died = 0
        for _ in range(kills):
            child = sampling([*argv, str(outs[0])])
            time.sleep(rng.uniform(0, seconds))
            os.kill(child, signal.SIGKILL)
            died += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        for out in outs:
            assert os.waitpid(sampling([*argv, str(out)]), 0)[1] == 0
        ours, theirs = ({path.name: path.read_bytes() for path in (out.iterdir() if out.is_dir() else [out])}
                        for out in outs)  # fmt: skip
        assert list(map(len, (ours, theirs))) == [n + 1 if form == "--images" else 1] * 2
        assert sorted(ours.values()) == sorted(theirs.values()), f"{form}: the files differ"
        print(f"sample.py {form} of {n} images: {died} of {kills} kills while it drew; the same files at the end")


def finish(out, steps, processes):
    for child in attempt(out, steps, processes):
        assert os.waitpid(child, 0)[1] == 0, out.with_suffix(".log").read_text()[-2000:]


def ends(child):
    """How a process ended that had to."""
    for _ in range(TO_END * 100):
        number, status = os.waitpid(child, os.WNOHANG)
        if number:
            return status
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    raise AssertionError(f"a process hangs although its fellow died {TO_END} seconds ago")


def saves(run):
    """Whether a checkpoint is half written."""
    return any((run / "checkpoints").glob(".step_*.tmp"))


def stop_in_save(run, writer):
    """Wait for the next save of a run, and stop the process that writes in it."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        if saves(run):
            os.kill(writer, signal.SIGSTOP)
            time.sleep(0.002)
            if saves(run):
                return
            os.kill(writer, signal.SIGCONT)
        time.sleep(0.001)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=2.5)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sampling", action="store_true")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        if args.sampling:
            kill_sampling(args.kills, args.seconds, rng, Path(folder))
            return
        killed, whole = Path(folder, "killed"), Path(folder, "whole")
        reached, in_saves, slowest = 0, 0, 0.0
        for kill in range(args.kills):
            children = attempt(killed, 10**6, args.processes)
            time.sleep(rng.uniform(0, args.seconds))
            writer = children[0]
            if kill % 2:
                stop_in_save(killed, writer)
            first = children.pop(rng.randrange(args.processes))
            os.kill(first, signal.SIGKILL)
            said = killed.with_suffix(".log").read_text() if killed.with_suffix(".log").exists() else ""
            assert os.WIFSIGNALED(os.waitpid(first, 0)[1]), f"kill {kill}: ended by itself: {said[-2000:]}"
            in_saves += saves(killed)
            if writer in children:
                os.kill(writer, signal.SIGCONT)
            began = time.monotonic()
            for child in children:
                os.kill(child, signal.SIGTERM)  # as torchrun does
                assert ends(child) != 0
            slowest = max(slowest, time.monotonic() - began)
            if reached or checkpoint.folders(killed):
                step = checkpoint.newest(killed, checkpoint.Checkpoint.files)[0].step
                assert step >= reached, f"kill {kill}: fell back from step {reached} to {step}"
                reached = step
        steps = reached + 3
        finish(killed, steps, args.processes)
        finish(whole, steps, args.processes)
        said = killed.with_suffix(".log").read_text()
        assert "traceback" not in said, said[-2000:]
        ours, theirs = (checkpoint.checkpoint_folder(run, steps) for run in (killed, whole))
        for name in ("model.safetensors", "ema_0.999.safetensors", "training.safetensors"):
            assert (ours / name).read_bytes() == (theirs / name).read_bytes(), f"{name} differs after {steps} steps"
        lines = [[line.split('"images_per_second"')[0] for line in (run / "metrics.jsonl").read_text().splitlines()]
                 for run in (killed, whole)]  # fmt: skip
        assert lines[0] == lines[1], "the metrics differ"
    print(f"{args.kills} kills, {in_saves} of them in a save; after each the newest checkpoint loaded; {steps} steps:")
    if args.processes > 1:
        print(f"one of {args.processes} processes was killed; the others ended within {slowest:.1f} seconds;")
    print("weights, average, optimizer, importance and losses have the bits of a run that was never touched")


if __name__ == "__main__":
    main()
