"""Quality against evaluations of the network, for every sampler: a table and a plot of one trained run.

    pip install -e '.[studies]'
    python benchmarks/samplers.py --ckpt runs/digits --out docs/samplers-digits

Scores sets of --n images, each of its own seed, by a Fréchet distance to the training images (benchmarks/quality.py).
Each sampler is tried at the steps of `WAYS`; Heun takes two evaluations a step. Results are kept in OUT.json after each
set: what is there is not sampled again. OUT.md and OUT.png are rewritten from it.
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
from quality import Judge

from diffusion import load

sys.path.append(str(Path(__file__).parents[1] / "studies"))
from tables import interval, keep, table

EVALUATIONS = (5, 8, 10, 15, 20, 50, 250)


class Way(NamedTuple):
    """A sampler with its options, and how its steps are placed."""

    sampler: str
    placed: str = ""
    options: tuple[tuple[str, Any], ...] = ()

    def steps(self, evaluations: int) -> str:
        return f"{self.placed}{(evaluations + 1) // 2 if self.sampler == 'heun' else evaluations}"


WAYS = {
    "ddpm": Way("ddpm"),
    "ddim": Way("ddim"),
    "dpmpp, evenly": Way("dpmpp"),
    "dpmpp": Way("dpmpp", "logsnr"),
    "dpmpp, Karras": Way("dpmpp", "karras"),
    "dpmpp, order 3": Way("dpmpp", "logsnr", (("order", 3),)),
    "ipndm": Way("ipndm", "logsnr"),
    "ipndm, Karras": Way("ipndm", "karras"),
    "heun": Way("heun", "logsnr"),
    "heun, Karras": Way("heun", "karras"),
}


def score(ckpt: Path, way: Way, evaluations: int, clip: bool, n: int, seed: int, judge: Judge) -> float:
    torch.set_num_threads(1)
    run, options = load(ckpt), dict(way.options) | dict(clip_denoised=clip)
    x = judge.samples(run.config, run.network, n, seed, sampler=way.sampler, steps=way.steps(evaluations),
                      guidance=1.0, **options)  # fmt: skip
    return judge.distance(x)


def report(results: dict[str, list[float]], out: Path, title: str) -> str:
    """The table, and the plot."""
    rows, figure = [], plt.figure(figsize=(7, 4.5))
    for clip in (True, False):
        for name in WAYS:
            cells, points = [], []
            for evaluations in EVALUATIONS:
                found = results.get(f"{name}|{evaluations}|{clip}")
                if not found:
                    cells.append("")
                    continue
                mean, half = interval(found) if len(found) > 1 else (found[0], float("nan"))
                cells.append(f"{mean:.3f} ± {half:.3f}")
                points.append((evaluations, mean, half))
            if points:
                rows.append([name, "yes" if clip else "no", *cells])
            if points and clip:
                x, y, error = zip(*points, strict=True)
                plt.errorbar(x, y, error, label=name, marker="o", markersize=3, linewidth=1)
    plt.xscale("log")
    plt.yscale("log")
    plt.xticks(EVALUATIONS, [str(evaluations) for evaluations in EVALUATIONS])
    plt.minorticks_off()
    plt.xlabel("evaluations of the network")
    plt.ylabel("Fréchet distance")
    plt.title(title)
    plt.legend(fontsize=8)
    plt.tight_layout()
    plt.savefig(out.with_suffix(".png"), dpi=130)
    plt.close(figure)
    return table(["sampler", "clipped", *map(str, EVALUATIONS)], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="results: OUT.json, OUT.md and OUT.png")
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--evaluations", default=",".join(map(str, EVALUATIONS)), help="ddpm also takes 250")
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS), help="default: all")
    parser.add_argument("--clipped", action="store_true", help="only with clipping")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread")
    args = parser.parse_args()
    run = load(args.ckpt)
    judge = Judge(run.config)
    path = args.out.with_suffix(".json")
    results: dict[str, list[float]] = json.loads(path.read_text()) if path.exists() else {}
    few = [int(evaluations) for evaluations in args.evaluations.split(",")]
    jobs = {}
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        for clip, seed, name in product((True,) if args.clipped else (True, False), range(args.seeds), args.ways):
            way = WAYS[name]
            order = dict(way.options).get("order", 4 if way.sampler == "ipndm" else 1)
            for evaluations in sorted({*few, *([250] if name == "ddpm" and clip else [])}):
                key = f"{name}|{evaluations}|{clip}"
                if evaluations >= order and len(results.get(key, [])) <= seed:
                    jobs[pool.submit(score, args.ckpt, way, evaluations, clip, args.n, seed, judge)] = key
        for done in as_completed(jobs):
            results.setdefault(jobs[done], []).append(done.result())
            keep(path, results)
    first = judge.distance(judge.held_out[0])
    lines = report(results, args.out, f"{run.config.data.source}, {args.n} images a set")
    args.out.with_suffix(".md").write_text(
        f"{lines}\n\nMeans and 95% intervals of {args.seeds} sets of {args.n} images. {len(judge.held_out[0])} "
        f"held-out images: {first:.3f}. The classifier is right on {judge.accuracy:.1%} of them.\n"
    )


if __name__ == "__main__":
    main()
