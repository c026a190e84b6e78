"""How cost grows: with the image, the width, the batch, checkpointing, processes, files, and samples.

    pip install -e '.[studies]'
    python benchmarks/growth.py steps      # seconds of a step and peak memory, each in a process of its own
    python benchmarks/growth.py files      # start of a run on a folder of 1,000 to 1,000,000 images (hard links of one)
    python benchmarks/growth.py samples --ckpt runs/digits   # sample.py of 1,000 to 50,000 images, start to end

Prints tables, keeps the figures in growth.json, and draws docs/growth.png from all that are there. "exponent" is that
of a power law between neighbouring rows: 1 where cost grows with the work.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from diffusion.config.schema import config_of
from diffusion.data.base import open_data
from diffusion.parallel.launchers import keep_freed_memory
from diffusion.training.build import build_step

sys.path.append(str(Path(__file__).parents[1] / "studies"))
from tables import keep, table

BASE: dict[str, Any] = dict(side=32, width=32, batch=16, checkpointing=False, processes=1)
SWEEPS: dict[str, tuple[Any, ...]] = {
    "side": (16, 32, 64, 128), "width": (32, 64, 128), "batch": (4, 16, 64), "checkpointing": (False, True),
    "processes": (1, 2),
}  # fmt: skip
FILES = 1_000, 10_000, 100_000, 1_000_000
SAMPLES = 1_000, 10_000, 50_000
ROOT = Path(__file__).parents[1]
FIGURES = Path(__file__).parent / "growth.json"
PANELS = {"seconds a step": ("side", "width", "batch"), "seconds to open": ("files",),
          "seconds to sample": ("samples",)}  # fmt: skip


def keep_figures(name: str, figures: list[tuple[int, float, float]]) -> None:
    """Keep (value, seconds, MB) of each row, and draw all sweeps that are there."""
    import matplotlib.pyplot as plt  # not in the processes that are measured

    kept = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    kept[name] = figures
    keep(FIGURES, kept)
    panels = {label: names for label, names in PANELS.items() if kept.keys() & set(names)}
    figure, axes = plt.subplots(1, len(panels), figsize=(3.7 * len(panels), 3.6), squeeze=False)
    for axis, (label, names) in zip(axes[0], panels.items(), strict=True):
        for name in names:
            if name in kept:
                values, seconds, _ = zip(*kept[name], strict=True)
                axis.plot(values, seconds, marker="o", markersize=3, label=name)
        axis.set(xscale="log", yscale="log", title=label)
        axis.xaxis.set_major_formatter("{x:,g}")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(ROOT / "docs/growth.png", dpi=130)
    plt.close(figure)


def step_of(setting: dict[str, Any]) -> dict[str, float]:
    """Seconds of a step, and MB at the most beyond those of the libraries, of one process."""
    keep_freed_memory()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    config = config_of({
        "data": {"source": "folder", "image_size": setting["side"], "channels": 3, "path": "."},
        "model": {"model_channels": setting["width"], "num_res_blocks": 2, "channel_mult": (1, 2, 2),
                  "attention_resolutions": (4,), "class_cond": False, "use_checkpoint": setting["checkpointing"]},
        "train": {"batch_size": setting["batch"]},
    })  # fmt: skip
    accelerator = Accelerator(cpu=True)
    step = build_step(config, config.network(0), config.diffusion.process(), accelerator)
    x = torch.rand(setting["batch"] // accelerator.num_processes, 3, setting["side"], setting["side"]) * 2 - 1
    times = []
    for _ in range(5):
        began = time.perf_counter()
        step(x)
        times.append(time.perf_counter() - began)
    return {
        "seconds": statistics.median(times[1:]),
        "mb": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
    }


def measure_steps() -> None:
    for name, values in SWEEPS.items():
        rows: list[list[str]] = []
        before: tuple[Any, dict[str, float]] | None = None
        figures = []
        for value in values:
            setting = BASE | ({"side": 64, "batch": 32} if name == "checkpointing" else {}) | {name: value}
            launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(setting["processes"])]
            command = [sys.executable, *(launcher if setting["processes"] > 1 else []), __file__, "one",
                       "--setting", json.dumps(setting)]  # fmt: skip
            threads = {"OMP_NUM_THREADS": str((os.cpu_count() or 1) // setting["processes"])}
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | threads)
            found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
            exponents = ["", ""]
            if before and not isinstance(value, bool):
                ratio = math.log(value / before[0])
                exponents = [f"{math.log(found[key] / before[1][key]) / ratio:.2f}" for key in ("seconds", "mb")]
            rows.append([str(value), f"{found['seconds']:.3f}", exponents[0], f"{found['mb']:.0f}", exponents[1]])
            before = value, found
            figures.append((value, found["seconds"], found["mb"]))
        keep_figures(name, figures)
        print(table([name, "seconds a step", "exponent", "MB at the most", "exponent"], rows), "\n", flush=True)


def open_of(path: str) -> dict[str, float]:
    """Seconds and MB that opening a folder takes."""
    config = config_of({"data": {"source": "folder", "path": path, "image_size": 32, "channels": 3}})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    dataset = open_data(config.data)
    dataset.fingerprint()
    seconds = time.perf_counter() - began
    mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"images": len(dataset), "seconds": seconds, "mb": mb}


def measure_files() -> None:
    rows = []
    figures: list[tuple[int, float, float]] = []
    with tempfile.TemporaryDirectory(dir=".") as folder:
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        made = 0
        for count in FILES:
            while made < count:
                shelf = Path(folder, f"{made // 10_000:04d}")
                if made % 10_000 == 0:
                    shelf.mkdir()
                    Image.fromarray(noise).save(shelf / "first.png")
                    made += 1
                    continue
                os.link(shelf / "first.png", shelf / f"{made:07d}.png")
                made += 1
            command = [sys.executable, __file__, "one", "--folder", folder]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            figures.append((count, found["seconds"], found["mb"]))
            rows.append([f"{found['images']:,}", f"{found['seconds']:.2f}", f"{found['mb']:.0f}",
                         f"{1024**2 * found['mb'] / found['images']:.0f}"])  # fmt: skip
    keep_figures("files", figures)
    print(table(["images", "seconds to open", "MB", "bytes a file"], rows))


def measure_samples(ckpt: Path) -> None:
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        for n in SAMPLES:
            began = time.perf_counter()
            flags = ["--n", str(n), "--batch_size", "500", "--npz", "--out", f"{folder}/{n}.npz"]
            command = [sys.executable, "sample.py", "--ckpt", str(ckpt.resolve()), *flags]
            process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            _, status, usage = os.wait4(process.pid, 0)
            if status:
                raise SystemExit(f"sample.py ended with {os.waitstatus_to_exitcode(status)}")
            figures.append((n, time.perf_counter() - began, usage.ru_maxrss / 1024))
    keep_figures("samples", figures)
    print(table(["images", "seconds", "MB"], [[f"{n:,}", f"{s:.1f}", f"{mb:.0f}"] for n, s, mb in figures]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["steps", "files", "samples", "one"])
    parser.add_argument("--ckpt", type=Path, help="the run to sample")
    parser.add_argument("--setting", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.what == "samples" and args.ckpt is None:
        parser.error("samples needs --ckpt RUN")
    if args.what == "one":
        print(json.dumps(open_of(args.folder) if args.folder else step_of(json.loads(args.setting))))
        return
    print(f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores\n")
    {"steps": measure_steps, "files": measure_files, "samples": lambda: measure_samples(args.ckpt)}[args.what]()


if __name__ == "__main__":
    main()
