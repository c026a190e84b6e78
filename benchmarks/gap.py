"""Whether the advice of `evaluate.py --metric gap` holds: its verdicts over a run, beside copies and what came next.

    python benchmarks/gap.py runs/few runs/most --at 250 500 750 --out docs/gap

For the checkpoints of each run after the steps --at: the verdict, the losses, the Fréchet distance of --n samples to
the held-out images (to those trained on, a copy is perfect), over --sets sets, and the share of copies, by pixels. The
plot shows the losses of each run's last one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt

from diffusion.run.checkpoint import checkpoint_folder
from diffusion.run.folder import read_lines

sys.path.append(str(Path(__file__).parents[1] / "studies"))
from tables import table

HEAD = ["run", "step", "verdict", "training loss", "held-out loss", "share copied", "Fréchet distance", "copies"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--at", type=int, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True, help="results: OUT.png, and the table on stdout")
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--sets", type=int, default=3)
    args = parser.parse_args()
    rows = []
    for run in args.runs:
        for path in [checkpoint_folder(run, step) for step in args.at if checkpoint_folder(run, step).exists()]:
            samples = ["--n", str(args.n), "--sets", str(args.sets)]
            far, near = ["--metric", "frechet", "--split", "held_out"], ["--metric", "nearest"]
            for flags in (["--metric", "gap"], [*far, *samples], [*near, *samples]):
                command = [sys.executable, "evaluate.py", "--ckpt", str(path), *flags]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            found = {one["metric"]: one for one in read_lines(run / "scores.jsonl") if one["checkpoint"] == path.name}
            gap, frechet = found["gap"], found["frechet"]
            losses = [f"{gap[name]:.4f} ± {gap[f'{name}_interval']:.4f}" for name in ("training_loss", "held_out_loss")]
            distance = f"{frechet['frechet']:.3f} ± {frechet['frechet_interval']:.3f}"
            about = [run.name, f"{int(path.name.removeprefix('step_')):,}", gap["verdict"] or ""]
            rows.append([*about, *losses, f"{gap['copied']:.2f}", distance, f"{found['nearest']['pixels_copies']:.1%}"])
            print(json.dumps(dict(zip(HEAD, rows[-1], strict=True)), ensure_ascii=False), file=sys.stderr, flush=True)
    print(table(HEAD, rows))
    figure, axes = plt.subplots(1, len(args.runs), figsize=(5 * len(args.runs), 3.6), squeeze=False)
    for run, axis in zip(args.runs, axes[0], strict=True):
        gap = [one for one in read_lines(run / "scores.jsonl") if one["metric"] == "gap"][-1]
        for name in ("training", "held-out", "optimal"):
            axis.plot(gap["log_snr"], gap["curves"][name], marker="o", markersize=3, label=name)
        axis.set(
            title=f"{run.name}: {gap['verdict']}", xlabel="log SNR, from noise (left) to the image", ylim=(0, None)
        )
        axis.legend()
    axes[0][0].set_ylabel("loss")
    figure.tight_layout()
    figure.savefig(args.out.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
