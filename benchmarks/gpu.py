"""What there is to measure on a GPU, in under ten minutes: throughput and its share of the peak, compiled and not, in
float32 and bf16, and whether a run resumes with the same bits, on one process and on two.

    python benchmarks/gpu.py            # the paper's CIFAR-10 network on random images, batch 128
    python benchmarks/gpu.py --dry      # a tiny network, on whatever there is: whether each command runs

Each command is printed, and can be repeated alone. What fails or takes too long is named, and the rest goes on. Two
processes need two GPUs, or none.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
LIMIT = 90
"""Seconds of one command."""
TINY = ("--train.batch_size", "4", "--model.model_channels", "32", "--model.num_res_blocks", "1",
        "--model.channel_mult", "[1, 1]", "--model.attention_resolutions", "[2]")  # fmt: skip


def run(*command: str) -> bool:
    """Run a command and print what it says. Returns whether it succeeded in time."""
    print(f"\n$ python {' '.join(command)}", flush=True)
    began = time.monotonic()
    try:
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        print(f"not done after {LIMIT} s")
        return False
    said = done.stdout if done.returncode == 0 else f"{done.stdout}{done.stderr[-2000:]}"
    print(f"{said.strip()}\n({time.monotonic() - began:.0f} s, exit code {done.returncode})", flush=True)
    return done.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="a tiny network")
    dry = parser.parse_args().dry
    gpus = torch.cuda.device_count()
    if not (gpus or dry):
        parser.error("there is no GPU: --dry tries the commands without one")
    device = torch.cuda.get_device_name() if gpus else "no GPU"
    print(f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}, {gpus} x {device}")
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images.npy"
        np.save(images, np.random.default_rng(0).integers(0, 256, (2048, 32, 32, 3), dtype=np.uint8))
        flags = ["--config", "cifar10", "--data.source", "arrays", "--data.path", str(images), *(TINY if dry else ())]
        ways = [
            [*flags, "--train.precision", precision, "--train.compile", compiled]
            for precision in ("no", "bf16")
            for compiled in ("false", "true")
        ]
        right = [run(str(HERE / "step.py"), *way) for way in ways]
        right += [run(str(HERE / "verify_resume.py"), *way) for way in ways[:1] + ways[-1:]]
        for processes in (1, 2):
            if processes <= gpus or not gpus:
                torchrun = "-m", "torch.distributed.run", "--nproc_per_node", str(processes)
                right.append(run(*torchrun, str(HERE / "verify_resume.py"), *ways[0]))
    print(f"\n{sum(right)} of {len(right)} commands succeeded")
    sys.exit(not all(right))


if __name__ == "__main__":
    main()
