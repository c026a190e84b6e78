"""How fast a folder or archive of images is opened, read and checked.

    python benchmarks/data.py FOLDER_OR_ARCHIVE

Seconds from the command to the end of the first step; images a second that the loader
gives, with 0 to 2 workers, and that the network of `folder_small` takes; seconds of `diffusion check-data`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

import torch

from diffusion.config.schema import config_of
from diffusion.data.base import open_data
from diffusion.data.loader import step_batches
from diffusion.training.dry_run import dry_run

BATCH, STEPS = 32, 100
ROOT = Path(__file__).parents[1]


def timed(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    path = str(parser.parse_args().path.resolve())
    print(f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}, {os.cpu_count()} cores\n")
    with tempfile.TemporaryDirectory() as folder:
        one = ["--train.steps", "1", "--sample.n", "1", "--sample.steps", "2", "--checkpoint.every", "1"]
        command = [sys.executable, "train.py", "--config", "folder_small", "--data.path", path, *one]
        print(f"a run of one step: {timed([*command, '--out', f'{folder}/run']):.1f} s", flush=True)
        check = [sys.executable, "-m", "diffusion", "check-data", "--config", "folder_small", "--data.path", path]
        seconds = timed([*check, "--sheet", f"{folder}/sheet.png"])
        print(f"check-data: {seconds:.1f} s", flush=True)
    data = {"source": "folder", "path": path, "image_size": 32}
    model = {"channel_mult": (1, 2, 2), "attention_resolutions": (4,), "class_cond": False}
    config = config_of({"data": data, "train": {"batch_size": BATCH, "lr": 2e-3}, "model": model})
    dataset = open_data(config.data)
    for workers in (0, 1, 2):
        with closing(step_batches(dataset, BATCH, 0, range(STEPS + 10), [slice(0, BATCH)], workers)) as batches:
            for _ in range(10):
                next(batches)
            began = time.perf_counter()
            for _ in range(STEPS):
                next(batches)
            print(
                f"loader, {workers} workers: {STEPS * BATCH / (time.perf_counter() - began):,.0f} images/s", flush=True
            )
    print("network:", next(line for line in dry_run(config) if "images/s" in line))


if __name__ == "__main__":
    main()
