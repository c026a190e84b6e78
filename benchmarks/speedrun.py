"""Time to quality: how long a recipe trains until it is as good as the baseline of its track.

    pip install -e '.[studies]'
    python benchmarks/speedrun.py digits
    python benchmarks/speedrun.py mnist --path FOLDER_THAT_HOLDS_MNIST/raw

The rules: each recipe of a track trains --seeds times, in processes of one thread, on nine tenths of the images, and is
scored by the rest (benchmarks/quality.py): bits per dimension, and Fréchet distances of `SAMPLES` samples to the
training images, at 10 and 12 evaluations (DPM-Solver++) and, of the recipes that are `full`, at 250 (ancestral). A
recipe that trains another one `of` the track further, as a consistency model, is scored at 1, 2 and 4 evaluations
instead, and its seconds are those of the further training alone. CPU seconds are of training. The targets are the
baseline's means. p is of a one-sided Welch test against the recipe that it `beats`. Runs are kept in runs/speedrun/:
what is there is not run again. Each recipe's record is appended to benchmarks/records.jsonl, with date, commit and
machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from quality import Judge
from scipy.stats import ttest_ind

from diffusion.config.schema import Config, by_section, config_of
from diffusion.data.loader import batch_indices
from diffusion.parallel.compilation import precision_of
from diffusion.parallel.launchers import keep_freed_memory
from diffusion.training.build import build_step, learning_rate
from diffusion.training.step import TrainingStep

sys.path.append(str(Path(__file__).parents[1] / "studies"))
from tables import keep, table

ROOT = Path(__file__).parents[1]
RUNS, RECORDS = ROOT / "runs" / "speedrun", Path(__file__).parent / "records.jsonl"


class Recipe(NamedTuple):
    """Settings by "section.field", and the recipe that this one is to beat."""

    settings: dict[str, Any]
    beats: str | None = None
    full: bool = False
    """also score samples of 250 evaluations"""
    of: str | None = None
    """the recipe that this one trains further"""


OLD = {"diffusion.prediction": "epsilon", "train.steps": 1500, "train.batch_size": 64, "train.optimizer": "adamw",
       "train.lr": 1e-3, "train.lr_schedule": "constant", "train.warmup_steps": 0, "model.channel_mult": [1, 2],
       "model.attention_resolutions": [2]}  # fmt: skip
THIRD = OLD | {"train.steps": 500}
SCHEDULE = {"train.lr": 3e-3, "train.lr_schedule": "wsd", "train.warmup_steps": 30}
V = {"diffusion.prediction": "v"}
MUON = {"train.optimizer": "muon"}
STACK = OLD | V | SCHEDULE | MUON | {"train.lr": 4e-3, "train.steps": 450}
NARROW = {"model.channel_mult": [1, 1], "model.attention_resolutions": []}
MNIST = {"model.channel_mult": [1, 2, 2], "model.attention_resolutions": [4]}
DIGITS = STACK | NARROW | {"train.lr": 5e-3, "train.steps": 750}
MNIST_HALF = STACK | MNIST | {"train.steps": 1300, "train.precision": "auto"}
CONSISTENT = {"diffusion.loss": "consistency", "sample.sampler": "consistency", "train.lr": 1e-3, "train.steps": 540,
              "train.decay_share": 0.8, "train.init_from": "the recipe before"}  # fmt: skip
RECIPES = {
    "digits": {
        "baseline": Recipe(OLD, full=True),
        "a third of its steps": Recipe(THIRD),
        "+ schedule": Recipe(THIRD | SCHEDULE, "a third of its steps"),
        "+ v": Recipe(THIRD | V, "a third of its steps"),
        "+ Muon": Recipe(THIRD | MUON, "a third of its steps"),
        "v and schedule": Recipe(THIRD | V | SCHEDULE, "+ v"),
        "v, schedule and Muon": Recipe(STACK, "v and schedule"),
        "v, schedule, Muon, narrow": Recipe(DIGITS, "v, schedule and Muon", full=True),
        "the default, again": Recipe(DIGITS),
        "consistency": Recipe(DIGITS | CONSISTENT, of="the default, again"),
    },
    "mnist": {
        "baseline": Recipe(OLD | MNIST | {"train.steps": 150}),
        "v, schedule and Muon": Recipe(STACK | MNIST | {"train.steps": 50}, "baseline"),
        "1,300 steps in bf16": Recipe(MNIST_HALF, full=True),
        "consistency": Recipe(MNIST_HALF | CONSISTENT | {"train.steps": 975}, of="1,300 steps in bf16"),
    },
}  # fmt: skip
SAMPLES = {"digits": 1000, "mnist": 400}


@lru_cache
def judge_of(track: str, path: str | None) -> Judge:
    return Judge(configuration(track, "baseline", path))


def configuration(track: str, name: str, path: str | None) -> Config:
    data = {"data.source": track} | ({"data.path": path} if path else {})
    return config_of(by_section(data | RECIPES[track][name].settings))


def kept(track: str, name: str, seed: int, suffix: str) -> Path:
    """A file of what is kept of a run."""
    return RUNS / track / f"{name.replace(' ', '_')}_{seed}.{suffix}"


def fit(config: Config, judge: Judge, seed: int, weights: Path | None = None) -> tuple[TrainingStep, float]:
    """Train a network on the images of a judge, by one thread, from `weights` if given: the step that holds it, and the
    CPU seconds."""
    torch.set_num_threads(1)
    keep_freed_memory()
    (x, y), train = judge.train, config.train
    torch.manual_seed(seed)
    network = config.network(judge.classes)
    if weights is not None:
        network.load_state_dict(torch.load(weights))
    accelerator = Accelerator(cpu=True, mixed_precision=precision_of(train.precision))
    step = build_step(config, network, config.diffusion.process(), accelerator)
    step.seed = seed
    began = time.process_time()
    for i in range(train.steps):
        for group in step.optimizer.param_groups:
            group["lr"] = learning_rate(train, i)
        indices = batch_indices(len(x), train.batch_size, seed, i)
        step(x[indices], y[indices] if config.model.class_cond else None)
    network.eval()
    return step, time.process_time() - began


def run(track: str, name: str, seed: int, path: str | None) -> dict[str, float]:
    """Train a recipe, score its first average, and keep it."""
    judge, config, recipe = judge_of(track, path), configuration(track, name, path), RECIPES[track][name]
    step, seconds = fit(config, judge, seed, kept(track, recipe.of, seed, "pt") if recipe.of else None)
    network, train = step.network, config.train
    found = {"cpu seconds": seconds, "images": train.steps * train.batch_size}
    ways: dict[int, dict[str, Any]] = {n: dict(steps=n) for n in (1, 2, 4)}
    if not recipe.of:
        ways = {n: dict(sampler="dpmpp", steps=f"logsnr{n}") for n in (10, 12)}
        ways |= {250: dict(sampler="ddpm", steps=250)} if recipe.full else {}
    with step.ema.in_place(train.averages[0]):
        if not recipe.of:
            found["bits/dim"] = judge.bits_per_dim(config, network)
        for evaluations, way in ways.items():
            samples = judge.samples(config, network, SAMPLES[track], seed, **way)
            found[f"distance at {evaluations}"] = judge.distance(samples)
        kept(track, name, seed, "pt").parent.mkdir(parents=True, exist_ok=True)
        torch.save(network.state_dict(), kept(track, name, seed, "pt"))
    return found


def worse(found: list[float], others: list[float]) -> float:
    """p of the hypothesis that `found` are not lower than `others`."""
    return float(ttest_ind(found, others, equal_var=False, alternative="less").pvalue)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("track", choices=RECIPES)
    parser.add_argument("--path", help="data.path of the track")
    parser.add_argument("--recipes", nargs="*", help="default: all")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread")
    args = parser.parse_args()
    recipes = args.recipes or list(RECIPES[args.track])
    files = {(name, seed): kept(args.track, name, seed, "json") for seed in range(args.seeds) for name in recipes}
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        for further in (False, True):
            wanted = [key for key, path in files.items() if not path.exists()]
            jobs = {pool.submit(run, args.track, *key, args.path): files[key]
                    for key in wanted if bool(RECIPES[args.track][key[0]].of) == further}  # fmt: skip
            for done in as_completed(jobs):
                keep(jobs[done], done.result())
    results: dict[str, dict[str, list[float]]] = {}
    for (name, _), path in files.items():
        for figure, value in json.loads(path.read_text()).items():
            results.setdefault(name, {}).setdefault(figure, []).append(value)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout
    figures = ["cpu seconds", "images", "bits/dim", *(f"distance at {n}" for n in (1, 2, 4, 10, 12, 250))]
    rows = []
    for name in recipes:
        recipe, found = RECIPES[args.track][name], results[name]
        p = {figure: worse(found[figure], results[recipe.beats][figure])
             for figure in ("bits/dim", "distance at 10") if recipe.beats in results}  # fmt: skip
        spread = {figure: (statistics.fmean(values), statistics.stdev(values)) for figure, values in found.items()}
        record = dict(date=time.strftime("%Y-%m-%d"), commit=commit.strip(), track=args.track, recipe=name,
                      settings=recipe.settings, n=args.seeds, mean_and_sd=spread, p=p, beats=recipe.beats,
                      machine=f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
                      torch=torch.__version__)  # fmt: skip
        with RECORDS.open("a") as file:
            file.write(json.dumps(record) + "\n")
        cells = [f"{spread[figure][0]:.4g} ± {spread[figure][1]:.2g}" if figure in spread else "" for figure in figures]
        rows.append([name, *cells, ", ".join(f"{value:.2g}" for value in p.values())])
    print(table(["recipe", *figures, "p (bits, distance)"], rows))


if __name__ == "__main__":
    main()
