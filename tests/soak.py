"""A long run of a small network, with saves and grids: its memory and open files must not grow.

`python tests/soak.py --steps 20000`. Prints both at ten times of the run, and fails where either grew after the first.
"""

import argparse
import tempfile
from pathlib import Path

import psutil
from faults import changed

from diffusion.training.trainer import Trainer

MEGABYTES = 30
"""Growth that is noise: the allocator's, and what is cached at first use."""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=0)
    args = parser.parse_args()
    config = changed(
        data=dict(workers=args.workers),
        model=dict(model_channels=32, channel_mult=(1,), attention_resolutions=(), num_heads=1, dropout=0.1),
        train=dict(steps=args.steps, batch_size=4, log_every=10, timestep_sampler="loss_second_moment"),
        diffusion=dict(steps=50),
        sample=dict(every=50, n=2, steps=3),
        checkpoint=dict(every=25, keep_last=3, keep_every=args.steps // 4),
    )
    process, seen = psutil.Process(), []

    def look(step, metrics):
        if step % (args.steps // 10) == 0:
            seen.append((process.memory_info().rss / 2**20, process.num_fds()))
            print(f"step {step}: {seen[-1][0]:.0f} MB, {seen[-1][1]} open files", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        Trainer(config, Path(folder, "run")).run(look)
        files = len(list(Path(folder, "run/checkpoints").iterdir()))
        assert files <= 3 + 4, f"{files} checkpoints are left"
    assert seen[-1][0] < seen[1][0] + MEGABYTES, f"memory grew from {seen[1][0]:.0f} to {seen[-1][0]:.0f} MB"
    assert seen[-1][1] <= seen[1][1], f"open files grew from {seen[1][1]} to {seen[-1][1]}"
    print(f"{args.steps} steps, {args.steps // 25} saves and {args.steps // 50} grids: memory and open files stay flat")


if __name__ == "__main__":
    main()
