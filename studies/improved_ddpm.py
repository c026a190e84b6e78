"""The ablation of Improved DDPM (Nichol & Dhariwal 2021, sections 3 and 4) in small, on the 8x8 digits.

    pip install -e '.[studies]'
    python studies/improved_ddpm.py

Six arms x five seeds, each trained alike, then scored: bits per dimension of held-out digits, and the Fréchet distance
of samples at several numbers of steps. The claims to be compared are `CLAIMS`, named before the first run. Arms of one
seed share initial weights (as far as their outputs allow), images, timesteps and noise, so differences are paired.

Results are kept in runs/studies/improved_ddpm/, one file a run: what is there already is not run again. At the end the
tables in docs/improved-ddpm.md and the figure beside it are rewritten. Every run is one thread, so that the figures do
not depend on --workers.
"""

from __future__ import annotations

import argparse
import json
import statistics
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from tables import interval, keep, put_tables, table
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

from diffusion import GaussianDiffusion, Schedule, UNetModel
from diffusion.data.loader import batch_indices
from diffusion.data.sources.digits import Digits
from diffusion.data.values import to_x_start
from diffusion.likelihood import bits_per_dim
from diffusion.metrics.samples import frechet_distance
from diffusion.process import VarianceType
from diffusion.randomness import generator_for, image_noise, seed_for
from diffusion.sampling import sample_batch
from diffusion.timesteps import LossSecondMoment
from diffusion.training.step import TrainingStep

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "improved-ddpm.md"
SEEDS = range(5)
T = 250
TRAINING_STEPS, BATCH_SIZE, LR, EMA_RATE = 1500, 64, 1e-3, 0.995
SAMPLES = 400
HELD_OUT_EVERY = 10
SAMPLING_STEPS = (5, 10, 25, 50)
CLASSIFIER_STEPS = 1000


class Arm(NamedTuple):
    schedule: str
    loss: str
    variances: tuple[VarianceType, ...]
    """of the trained process, or the fixed ones that it is scored with"""
    by_importance: bool = False


FIXED: tuple[VarianceType, ...] = ("fixed_small", "fixed_large")
ARMS = {
    "simple, linear": Arm("linear", "mse", FIXED),
    "simple, cosine": Arm("cosine", "mse", FIXED),
    "hybrid, linear": Arm("linear", "rescaled_mse", ("learned_range",)),
    "hybrid, cosine": Arm("cosine", "rescaled_mse", ("learned_range",)),
    "vlb, uniform": Arm("cosine", "rescaled_kl", ("learned_range",)),
    "vlb, importance": Arm("cosine", "rescaled_kl", ("learned_range",), by_importance=True),
}


class Claim(NamedTuple):
    """That `better` has the lower `figure`. A simple arm is scored with the variance that serves it best on average."""

    says: str
    source: str
    figure: str
    better: str
    worse: str


CLAIMS = [
    Claim("L_vlb with importance sampling has a better likelihood than L_hybrid", "2.94 and 3.17 bits/dim",
          "bits", "vlb, importance", "hybrid, cosine"),
    Claim("L_hybrid has a better likelihood than L_simple", "3.17 and 3.26",
          "bits", "hybrid, cosine", "simple, cosine"),
    Claim("importance sampling improves the likelihood of L_vlb", "section 3.3",
          "bits", "vlb, importance", "vlb, uniform"),
    Claim("the cosine schedule improves the likelihood of L_hybrid", "3.17 and 3.26",
          "bits", "hybrid, cosine", "hybrid, linear"),
    Claim("the cosine schedule improves the likelihood of L_simple", "3.26 and 3.37",
          "bits", "simple, cosine", "simple, linear"),
    Claim("at 10 steps, the cosine schedule improves samples of L_hybrid", "section 4",
          "fd10", "hybrid, cosine", "hybrid, linear"),
    Claim("at 5 steps, the learned variance gives better samples than the fixed ones", "section 4",
          "fd5", "hybrid, cosine", "simple, cosine"),
    Claim("at 10 steps, the learned variance gives better samples than the fixed ones", "section 4",
          "fd10", "hybrid, cosine", "simple, cosine"),
    Claim("at 25 steps, the learned variance gives better samples than the fixed ones", "section 4",
          "fd25", "hybrid, cosine", "simple, cosine"),
    Claim("at 50 steps, L_hybrid gives better samples than L_vlb", "FID 3.19 and 11.47",
          "fd50", "hybrid, cosine", "vlb, importance"),
]  # fmt: skip


@lru_cache
def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and held-out digits in [-1, 1], (N, 1, 8, 8), each with its labels: every tenth is held out."""
    dataset = Digits().open()
    x, y = to_x_start(dataset.images), dataset.labels
    held_out = torch.arange(len(x)) % HELD_OUT_EVERY == 0
    return x[~held_out], y[~held_out], x[held_out], y[held_out]


def process(arm: Arm, variance: VarianceType, respacing: str = "") -> GaussianDiffusion:
    return GaussianDiffusion(Schedule.named(arm.schedule, T, respacing), "epsilon", variance)


def train(arm: Arm, seed: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """The network, and the moving average of its weights that is scored."""
    x_start, *_ = data()
    trained = process(arm, arm.variances[0])
    torch.manual_seed(seed_for(seed, "weights"))
    out_channels = 2 if trained.learns_variance else 1
    network = UNetModel(1, 32, out_channels, 1, (2,), channel_mult=(1, 2), num_heads=2, use_scale_shift_norm=True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR, weight_decay=0.0, fused=True)
    step = TrainingStep(
        network, trained, optimizer, ema_rates=[EMA_RATE], ema_warmup=True, loss=arm.loss, seed=seed,
        timesteps=LossSecondMoment(T) if arm.by_importance else None, accelerator=Accelerator(cpu=True),
    )  # fmt: skip
    for i in range(TRAINING_STEPS):
        step(x_start[batch_indices(len(x_start), BATCH_SIZE, seed, i)])
    return network.eval(), step.ema.averages[EMA_RATE]


@lru_cache
def features() -> tuple[nn.Sequential, float]:
    """What the Fréchet distance looks through: a small classifier, up to its 32 features, and its held-out accuracy."""
    x, y, test_x, test_y = data()
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(64 * 16, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    for step in range(CLASSIFIER_STEPS):
        batch = batch_indices(len(x), 64, 0, step)
        F.cross_entropy(net(x[batch]), y[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
    accuracy = (net(test_x).argmax(1) == test_y).float().mean().item()
    return net[:-1].requires_grad_(False), accuracy


def distances(x: Tensor) -> dict[str, float]:
    """Fréchet distances of images to the training digits: in the classifier's features, and in plain pixels."""
    real, net = data()[0], features()[0]
    scale = net(real).std()
    pairs = {"fd": (net(x) / scale, net(real) / scale), "pixels": (x.flatten(1), real.flatten(1))}
    return {name: frechet_distance(a.numpy(), b.numpy()) for name, (a, b) in pairs.items()}


def run(name: str, seed: int, folder: Path) -> Path:
    """Train and score one arm with one seed, unless its file is there."""
    arm = ARMS[name]
    path = folder / f"{name.replace(', ', '_')}_{seed}.json"
    if path.exists():
        return path
    torch.set_num_threads(1)
    network, average = train(arm, seed)

    def model(x: Tensor, t: Tensor, y: None = None) -> Tensor:
        return functional_call(network, average, (x, t))

    held_out = data()[2]
    result: dict[str, Any] = {"arm": name, "seed": seed}
    for variance in arm.variances:
        noise = partial(image_noise, range(len(held_out)), held_out.shape[1:], torch.device("cpu"), seed)
        bits = bits_per_dim(process(arm, variance), model, held_out, noise).total.mean().item()
        result[variance] = {"bits": bits}
        for steps in SAMPLING_STEPS:
            drawn = sample_batch(process(arm, variance, str(steps)), model, (1, 8, 8), range(SAMPLES), seed=seed)
            result[variance] |= {f"{kind}{steps}": value for kind, value in distances(drawn.clamp(-1, 1)).items()}
    keep(path, result)
    return path


Results = dict[str, dict[str, dict[str, list[float]]]]
"""arm -> variance -> figure -> its value for each seed"""


def gather(folder: Path) -> Results:
    runs = {name: [json.loads(run(name, seed, folder).read_text()) for seed in SEEDS] for name in ARMS}
    return {
        name: {v: {key: [r[v][key] for r in runs[name]] for key in runs[name][0][v]} for v in ARMS[name].variances}
        for name in ARMS
    }


def best(results: Results, name: str, figure: str) -> list[float]:
    """A figure of an arm, with the variance whose mean is the lowest."""
    return min((values[figure] for values in results[name].values()), key=statistics.fmean)


def claims_table(results: Results) -> str:
    heads = ["the paper's claim", "in the paper", "here: claimed better", "claimed worse",
             "difference, 95% interval", ""]  # fmt: skip
    rows = []
    for claim in CLAIMS:
        better, worse = best(results, claim.better, claim.figure), best(results, claim.worse, claim.figure)
        mean, half = interval([w - b for b, w in zip(better, worse, strict=True)])
        verdict = "holds" if mean > half else "the reverse" if mean < -half else "no effect seen"
        means = [f"{statistics.fmean(values):.3f}" for values in (better, worse)]
        rows.append([claim.says, claim.source, *means, f"{mean:+.3f} ± {half:.3f}", verdict])
    return table(heads, rows)


def figures_table(results: Results) -> str:
    last = SAMPLING_STEPS[-1]
    columns = ["bits", *(f"fd{n}" for n in SAMPLING_STEPS), f"pixels{last}"]
    heads = ["bits/dim", *(f"{n} steps" for n in SAMPLING_STEPS), f"{last} steps, in pixels"]
    rows = []
    for name, variances in results.items():
        for variance, values in variances.items():
            cells = ["{:.3f} ± {:.3f}".format(*interval(values[column])) for column in columns]
            rows.append([name, variance, *cells])
    floor = distances(data()[0][torch.randperm(len(data()[0]), generator=generator_for("cpu", 0))[:SAMPLES]])
    blank = [""] * len(SAMPLING_STEPS)
    rows.append([f"{SAMPLES} training digits, the floor", "", *blank, f"{floor['fd']:.3f}", f"{floor['pixels']:.3f}"])
    return table(["arm", "variance", *heads], rows)


def plot(results: Results, path: Path) -> None:
    """The likelihood of each arm, and the quality of samples by number of steps, with 95% intervals."""
    lines = [(f"{name}, {v}" if len(variances) > 1 else name, values)
             for name, variances in results.items() for v, values in variances.items()]  # fmt: skip
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for i, (label, values) in enumerate(lines):
        colour = f"C{i}"
        mean, half = interval(values["bits"])
        left.errorbar(mean, -i, xerr=half, fmt="o", color=colour, capsize=3)
        points = [interval(values[f"fd{n}"]) for n in SAMPLING_STEPS]
        right.errorbar(SAMPLING_STEPS, [p[0] for p in points], yerr=[p[1] for p in points], label=label, color=colour,
                       marker="o", capsize=3, linestyle="--" if "linear" in label else "-")  # fmt: skip
    left.set_yticks([-i for i in range(len(lines))], [label for label, _ in lines])
    left.set_xlabel("bits per dimension of held-out digits")
    right.set(xscale="log", yscale="log", xlabel="sampling steps", ylabel="Fréchet distance, classifier's features")
    right.set_xticks(SAMPLING_STEPS, [str(n) for n in SAMPLING_STEPS], minor=False)
    right.minorticks_off()
    for tick, i in zip(left.get_yticklabels(), range(len(lines)), strict=True):
        tick.set_color(f"C{i}")  # so the right panel needs no legend, for which it has no room
    right.set_title("colours as on the left, linear schedules dashed", fontsize=9)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, of one thread each")
    parser.add_argument("--results", type=Path, default=ROOT / "runs" / "studies" / "improved_ddpm")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(run, name, seed, args.results) for seed in SEEDS for name in ARMS]
        for job in tqdm(as_completed(jobs), total=len(jobs), unit="run"):
            job.result()
    report(gather(args.results))


def report(results: Results) -> None:
    """Rewrite the tables of the document, and the figure beside it."""
    put_tables(DOCUMENT, {"claims": claims_table(results), "figures": figures_table(results)})
    plot(results, DOCUMENT.with_suffix(".png"))
    print(f"{DOCUMENT} and its picture are written")


if __name__ == "__main__":
    main()
