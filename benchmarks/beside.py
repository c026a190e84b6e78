"""Training, sampling and evaluation beside processes that keep cores busy, in units of their speed alone.

    python benchmarks/beside.py                         # the digits
    python benchmarks/beside.py --config folder_small   # its network and batch, on random images

Prints images a second: alone, beside one busy process, and beside as many as there are cores.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator

from diffusion import likelihood
from diffusion.config.files import find_config, load_config
from diffusion.parallel.cores import CORES
from diffusion.parallel.launchers import keep_freed_memory
from diffusion.run.loaded import Run
from diffusion.training.build import build_step

SECONDS, WINDOWS = 4.0, 3


def rate(work: Callable[[], Any], images: int) -> float:
    """Images a second: the median of windows, after one that does not count."""
    rates = []
    for _ in range(WINDOWS + 1):
        began, done = time.perf_counter(), 0
        while time.perf_counter() - began < SECONDS:
            work()
            done += images
        rates.append(done / (time.perf_counter() - began))
    return statistics.median(rates[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="digits")
    config = load_config(find_config(parser.parse_args().config))
    keep_freed_memory()
    classes = 10 if config.model.class_cond else 0
    batch, process = config.train.batch_size, config.diffusion.process(8)
    network = config.network(classes)
    step = build_step(config, network, config.diffusion.process(), Accelerator(cpu=True))
    run = Run(config, config.network(classes).eval(), tuple(map(str, range(classes))))
    x = torch.rand(batch, *config.data.shape) * 2 - 1
    y = torch.arange(batch) % classes if classes else None
    inputs = {} if y is None else {"y": y}

    def evaluate() -> None:
        with CORES.followed(run.network) as follow:
            likelihood.bits_per_dim(process, partial(follow, **inputs), x, lambda i: torch.randn_like(x))

    works = {
        "training": lambda: step(x, y),
        "sampling": lambda: run.sample(batch, batch_size=batch, steps=8),
        "bits per dimension": evaluate,
    }
    kind = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    print(f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}, {kind}")
    for name, work in works.items():
        figures = {}
        for busy in (0, 1, os.cpu_count() or 2):
            others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
            figures[busy] = rate(work, batch)
            for other in others:
                other.kill()
                other.wait()
        said = "; ".join(f"beside {n}: {figures[n]:.0f} ({figures[n] / figures[0]:.2f})" for n in figures if n)
        print(f"{name}: alone {figures[0]:.0f} images/s; {said}", flush=True)


if __name__ == "__main__":
    main()
