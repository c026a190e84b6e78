"""A run that is killed at random moments, saves included: `python tests/faults.py --kills 200`.

Each attempt is a fork of this process, which has imported everything and computed nothing, and is killed by SIGKILL
within --seconds. After each kill, some checkpoint must load, if one was ever finished; none may be less far than
before. At the end the run is finished in peace, and every file of its last checkpoint compared with that of a run that
was never touched.
"""

import argparse
import dataclasses
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch._dynamo  # which the first optimizer would import, in every child

from diffusion import checkpoint
from diffusion.config import Config
from diffusion.trainer import Trainer


def configuration(steps):
    config = Config()
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, dropout=0.1),
        train=dataclasses.replace(config.train, steps=steps, batch_size=8, accumulation=2, log_every=1,
                                  timesteps="loss_second_moment"),
        sample=dataclasses.replace(config.sample, every=7, n=2, steps=2),
        checkpoint=dataclasses.replace(config.checkpoint, every=2, keep_last=3),
    )  # fmt: skip


def attempt(out, steps):
    """Start or continue the run in a child process; its number."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            sys.stderr = open(out.with_suffix(".log"), "a")  # noqa: SIM115
            Trainer(configuration(steps), out, tell=lambda message: print(message, file=sys.stderr)).run()
            status = 0
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    return child


def finish(out, steps):
    assert os.waitpid(attempt(out, steps), 0)[1] == 0, out.with_suffix(".log").read_text()[-2000:]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=2.5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        killed, whole = Path(folder, "killed"), Path(folder, "whole")
        reached, in_saves = 0, 0
        for kill in range(args.kills):
            child = attempt(killed, 10**6)
            time.sleep(rng.uniform(0, args.seconds))
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            assert os.WIFSIGNALED(status), (
                f"kill {kill}: ended by itself: {killed.with_suffix('.log').read_text()[-2000:]}"
            )
            in_saves += any((killed / "checkpoints").glob(".step_*.tmp"))
            if reached or checkpoint.folders(killed):
                step = checkpoint.open_checkpoint(killed).step
                assert step >= reached, f"kill {kill}: fell back from step {reached} to {step}"
                reached = step
        steps = reached + 3
        finish(killed, steps)
        finish(whole, steps)
        ours, theirs = (checkpoint.checkpoint_folder(run, steps) for run in (killed, whole))
        for name in ("model.safetensors", "ema_0.999.safetensors", "training.pt"):
            assert (ours / name).read_bytes() == (theirs / name).read_bytes(), f"{name} differs after {steps} steps"
        lines = [[line.split('"images_per_second"')[0] for line in (run / "metrics.jsonl").read_text().splitlines()]
                 for run in (killed, whole)]  # fmt: skip
        assert lines[0] == lines[1], "the metrics differ"
    print(f"{args.kills} kills, {in_saves} of them in a save; after each the newest checkpoint loaded; {steps} steps:")
    print("weights, average, optimizer, importance and losses have the bits of a run that was never touched")


if __name__ == "__main__":
    main()
