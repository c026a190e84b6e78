"""Which path, which prediction, which network: diffusion and flow matching with all else equal.

    pip install -e '.[studies]'
    python benchmarks/paths.py [--mnist FOLDER_THAT_HOLDS_MNIST/raw] --out docs/paths

Every arm trains --seeds times as the default run does, in processes of one thread, on nine tenths of the digits (or
of MNIST: `ON_MNIST`), and is scored by Fréchet distances of 500 samples (benchmarks/quality.py) at 4,
8 and 12 evaluations (DPM-Solver++, spaced in log SNR) and at 250 (DDIM). No variance is learned, since a flow has
none. Runs are kept in runs/paths/: what is there is not run again. The table OUT-digits.md (or OUT-mnist.md) is
rewritten: means and 95% intervals over the seeds that are there, and p of a paired t-test at 12 evaluations against
the first row of the same network, by Holm's correction.
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import lru_cache
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from quality import Judge
from safetensors.torch import load_file, save_file
from scipy.stats import ttest_rel
from speedrun import fit

from diffusion.config.schema import Config, by_section, config_of

sys.path.append(str(Path(__file__).parents[1] / "studies"))
from tables import interval, keep, table

RUNS, SAMPLES = Path(__file__).parents[1] / "runs" / "paths", 500
EVALUATIONS = {4: ("dpmpp", "logsnr4"), 8: ("dpmpp", "logsnr8"), 12: ("dpmpp", "logsnr12"), 250: ("ddim", "250")}
COMMON = {"diffusion.variance": "fixed_small", "diffusion.loss": "mse"}
NETWORKS: dict[str, dict[str, Any]] = {
    "U-Net": {},
    "DiT": {"model.network": "dit", "model.hidden_size": 64, "model.depth": 4, "model.num_heads": 4},
}
"""Of 0.31M and 0.33M parameters on the digits."""
PATHS: dict[str, dict[str, Any]] = {
    "VP, v": {"diffusion.schedule": "cosine", "diffusion.prediction": "v"},
    "VP, epsilon": {"diffusion.schedule": "cosine", "diffusion.prediction": "epsilon"},
    "VP, velocity": {"diffusion.schedule": "cosine", "diffusion.prediction": "velocity"},
    "straight, v": {"diffusion.schedule": "flow", "diffusion.prediction": "v"},
    "straight, epsilon": {
        "diffusion.schedule": "flow", "diffusion.prediction": "epsilon", "diffusion.s_max": 0.999,
    },
    "straight, velocity": {"diffusion.schedule": "flow", "diffusion.prediction": "velocity"},
    "straight, velocity, logit-normal": {
        "diffusion.schedule": "flow", "diffusion.prediction": "velocity", "train.timestep_sampler": "logit_normal",
    },
}  # fmt: skip
ON_MNIST: dict[str, dict[str, Any]] = {
    "U-Net": {"model.channel_mult": [1, 2, 2], "model.attention_resolutions": [4], "train.steps": 300},
    "DiT": NETWORKS["DiT"] | {"model.patch_size": 4, "model.hidden_size": 128, "train.steps": 820},
}
"""Of 1.19M and 1.28M parameters; the transformer takes 820 steps in the time of 300."""


def configuration(data: str, path: str | None, network: str, arm: str) -> Config:
    of_network, training = (NETWORKS, {}) if data == "digits" else (ON_MNIST, {"train.lr": 4e-3})
    where = {"data.source": data} | ({"data.path": path} if path else {})
    return config_of(by_section(where | COMMON | training | of_network[network] | PATHS[arm]))


@lru_cache
def judge_of(data: str, path: str | None) -> Judge:
    return Judge(configuration(data, path, "U-Net", "VP, v"))


def run(data: str, path: str | None, network: str, arm: str, seed: int, evaluations: list[int]) -> None:
    """Train an arm, unless its weights are there, and add what is missing of its scores."""
    file = RUNS / data / f"{network}_{arm}_{seed}.json".replace(", ", "_")
    found: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}
    todo = [count for count in evaluations if str(count) not in found]
    if not todo:
        return
    torch.set_num_threads(1)
    judge, config, weights = judge_of(data, path), configuration(data, path, network, arm), file.with_suffix(".weights")
    if not weights.exists():
        step, found["cpu seconds"] = fit(config, judge, seed)
        with step.ema.in_place(config.train.averages[0]):
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file(dict(step.network.state_dict()), weights)
    model = config.network(judge.classes).eval()
    model.load_state_dict(load_file(weights))
    for count in todo:
        sampler, steps = EVALUATIONS[count]
        found[str(count)] = judge.distance(
            judge.samples(config, model, SAMPLES, seed, sampler=sampler, steps=steps, guidance=1.0)
        )
        keep(file, found)


def report(data: str, arms: list[tuple[str, str]], seeds: int) -> str:
    """The table of what is there."""
    rows, values = list[list[str]](), dict[tuple[str, str], list[dict[str, float]]]()
    for network, arm in arms:
        files = [RUNS / data / f"{network}_{arm}_{seed}.json".replace(", ", "_") for seed in range(seeds)]
        values[network, arm] = [json.loads(file.read_text()) for file in files if file.exists()]
    first = dict[str, str]()
    for network, arm in arms:
        first.setdefault(network, arm)
    p = {
        key: float(ttest_rel(*([one["12"] for one in values[key[0], name]] for name in (key[1], first[key[0]]))).pvalue)
        for key in arms
        if key[1] != first[key[0]] and len(values[key]) == len(values[key[0], first[key[0]]]) > 1
    }
    corrected = dict[tuple[str, str], float]()
    for place, key in enumerate(sorted(p, key=lambda key: p[key])):
        corrected[key] = min(1.0, max([*corrected.values(), p[key] * (len(p) - place)]))
    for key in arms:
        cells = []
        for figure in ("cpu seconds", *map(str, EVALUATIONS)):
            numbers = [one[figure] for one in values[key] if figure in one]
            mean, half = interval(numbers) if len(numbers) > 1 else (sum(numbers), float("nan"))
            cell = f"{mean:.0f}" if figure == "cpu seconds" else f"{mean:.3f} ± {half:.3f}"
            cells.append(cell if numbers else "")
        rows.append([*key, *cells, f"{corrected[key]:.2g}" if key in corrected else ""])
    heads = [f"at {count}" for count in EVALUATIONS]
    return table(["network", "path and prediction", "CPU seconds", *heads, "p at 12, Holm"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", help="data.path; not given: digits")
    parser.add_argument("--arms", nargs="*", choices=PATHS, default=list(PATHS), help="default: all")
    parser.add_argument("--evaluations", nargs="*", type=int, choices=EVALUATIONS, default=list(EVALUATIONS))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    data, arms = "mnist" if args.mnist else "digits", list(product(NETWORKS, args.arms))
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(run, data, args.mnist, network, arm, seed, args.evaluations)
                for seed in range(args.seeds) for network, arm in arms]  # fmt: skip
        for done in as_completed(jobs):
            done.result()
    lines = report(data, arms, args.seeds)
    args.out.with_name(f"{args.out.name}-{data}.md").write_text(lines + "\n")
    print(lines)


if __name__ == "__main__":
    main()
