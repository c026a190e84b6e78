"""Quality against the length of the moving average, of one run with `train.ema_lengths`: a table and a plot.

    python train.py --out runs/lengths --train.ema_rates [] --train.ema_lengths [0.05,0.1] --checkpoint.every 25
    python benchmarks/averages.py --ckpt runs/lengths --out docs/averages-digits

Each length is reconstructed from the run's checkpoints (EDM2, section 3), and --seeds sets of --n samples of it are
scored by a Fréchet distance to the training images (benchmarks/quality.py). Lengths that the checkpoints cannot express
are left out.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib.pyplot as plt
from quality import Judge

from diffusion import load
from diffusion.errors import UsageError

sys.path.append(str(Path(__file__).parents[1] / "studies"))
from tables import interval, table

LENGTHS = ("none", *(f"length{length}" for length in (0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.125, 0.15, 0.2, 0.25)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="results: OUT.md and OUT.png")
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    judge, rows, points = Judge(load(args.ckpt).config), [], []
    for name in LENGTHS:
        try:
            run = load(args.ckpt, name)
        except UsageError as error:
            rows.append([name, str(error).rpartition("express it with ")[2].partition(",")[0]])
            continue
        found = [judge.distance(judge.samples(run.config, run.network, args.n, seed)) for seed in range(args.seeds)]
        mean, half = interval(found)
        rows.append([name, f"{mean:.4f} ± {half:.4f}"])
        points.append((0.0 if name == "none" else float(name.removeprefix("length")), mean, half))
    x, y, error_bars = zip(*points, strict=True)
    plt.figure(figsize=(6, 4))
    plt.errorbar(x, y, error_bars, marker="o", markersize=3)
    plt.xlabel("length of the average, relative to the run (0: the weights in training)")
    plt.ylabel("Fréchet distance")
    plt.tight_layout()
    plt.savefig(args.out.with_suffix(".png"), dpi=130)
    args.out.with_suffix(".md").write_text(table(["average", "Fréchet distance"], rows) + "\n")


if __name__ == "__main__":
    main()
