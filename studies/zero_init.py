"""Why zero works: the paper's zero initialisation against others, with and without normalisation, and in a transformer.

    pip install -e '.[studies]'
    python studies/zero_init.py --mnist FOLDER    (the folder that holds MNIST/raw)

Six arms x four learning rates x ten seeds on the 8x8 digits, a few more that each answer one question, four arms on
MNIST at 16x16, and two at the length of an earlier default run: `SETTINGS`. All are trained alike, with gradients
clipped to a norm of 1 (Ho et al. 2020) unless the arm says otherwise: runs of one seed share images, timesteps and
noise, and what weights they can. Scored on held-out images. The comparisons are `COMPARISONS`, paired by seed. They
were named before the first run but for the last two, since a first attempt without clipping had shown spikes.

The transformer (`dit` in the names of arms and settings) has 0.33M parameters, and the U-Net beside it 0.31M, that of
configs/digits.yaml. Of equal steps the transformer takes less time: the arm "equal time" has as many as fit in it. On
MNIST, each arm has the rate that was best for it on the digits. `OF_TRANSFORMERS` were named before the first run.

Results are kept in runs/studies/zero_init/, one file a run: what is there already is not run again. At the end the
tables in docs/zero-init.md and the figures beside it are rewritten. Every run is one thread, so that the figures do not
depend on --workers (but for steps a second, which are measured by benchmarks/initialisation.py).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import lru_cache, partial
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib.pyplot as plt
import torch
from accelerate import Accelerator
from symmetry import make_alike
from tables import holm, interval, keep, p_value, put_tables, table
from torch import Tensor, nn
from tqdm import tqdm

from diffusion import GaussianDiffusion, Schedule, UNetModel
from diffusion.commands.terminal import exit_code
from diffusion.data.loader import batch_indices
from diffusion.data.sources.digits import Digits
from diffusion.data.sources.torchvision import MNIST
from diffusion.data.values import to_x_start
from diffusion.likelihood import bits_per_dim
from diffusion.losses import training_losses
from diffusion.models.dit import DiT
from diffusion.models.initialisation import InitName, initialise, layers
from diffusion.randomness import generator_for, image_noise, seed_for
from diffusion.training.step import TrainingStep

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "zero-init.md"
T, EMA_RATE = 1000, 0.99
LOOK_EVERY = 50
"""Steps between two looks at the held-out loss."""
LIKELIHOOD_STEPS = "25"
TRAINS = 0.5
"""A run trains if its held-out loss ends below this: predicting no noise at all gives 1."""


class Arm(NamedTuple):
    init: InitName | Literal["all_zero"]
    use_norm: bool = True
    clip: float = 1.0
    network: Literal["earlier unet", "unet", "dit"] = "earlier unet"


ARMS = {
    "zero": Arm("zero"),
    "small": Arm("small"),
    "default": Arm("default"),
    "fixup, no norm": Arm("fixup", False),
    "zero, no norm": Arm("zero", False),
    "default, no norm": Arm("default", False),
    "all_zero": Arm("all_zero"),
    "zero, no clip": Arm("zero", clip=math.inf),
    "fixup, no norm, no clip": Arm("fixup", False, math.inf),
    "dit zero": Arm("zero", network="dit"),
    "dit small": Arm("small", network="dit"),
    "dit default": Arm("default", network="dit"),
    "unet zero": Arm("zero", network="unet"),
    "unet default": Arm("default", network="unet"),
    "unet zero, equal time": Arm("zero", network="unet"),
}
GRID = (5e-4, 2e-3, 8e-3, 3.2e-2)


class Setting(NamedTuple):
    """A data set, and what is run on it."""

    size: int
    steps: int
    batch_size: int
    seeds: int
    arms: dict[str, tuple[float, ...]]
    """the learning rates of each"""
    held_out: int = 180
    equal_time: int = 0
    """steps of the arm that has the time of the transformer's (CPU seconds of a step, one thread: 0.0196 and 0.0264 on
    the digits, 0.0479 and 0.0576 on MNIST)"""


EVERYWHERE = dict.fromkeys(("zero", "small", "default", "fixup, no norm", "zero, no norm", "default, no norm"), GRID)
ONE_QUESTION = {"all_zero": (2e-3,), "zero, no clip": (2e-3,), "fixup, no norm, no clip": (5e-4, 2e-3)}
TRANSFORMERS = "dit zero", "dit small", "dit default", "unet zero", "unet default", "unet zero, equal time"
BEST_ON_DIGITS: dict[str, tuple[float, ...]] = dict.fromkeys(
    ("dit zero", "dit small", "dit default", "unet default"), (8e-3,)
)
BEST_ON_DIGITS |= dict.fromkeys(("unet zero", "unet zero, equal time"), (2e-3,))
SETTINGS = {
    "digits": Setting(8, 400, 32, 10, EVERYWHERE | ONE_QUESTION),
    "long": Setting(8, 1500, 64, 2, dict.fromkeys(("zero", "fixup, no norm"), (1e-3, 2e-3, 4e-3))),
    "dit digits": Setting(8, 400, 32, 10, dict.fromkeys(TRANSFORMERS, GRID), equal_time=297),
    "dit mnist": Setting(16, 300, 32, 10, BEST_ON_DIGITS, equal_time=250),
    "mnist": Setting(16, 300, 32, 5, dict.fromkeys(("zero", "default", "fixup, no norm", "default, no norm"), (2e-3,))),
}


class Comparison(NamedTuple):
    """That `better` has a lower `figure` than `worse`: each with the rate that suits it best on average, or at one."""

    says: str
    better: str
    worse: str
    figure: str = "loss"
    rate: float | None = None


COMPARISONS = [
    Comparison("zero ends lower than default", "zero", "default"),
    Comparison("zero ends lower than small", "zero", "small"),
    Comparison("zero is further after 100 steps than default", "zero", "default", "loss at 100"),
    Comparison("zero has the better likelihood", "zero", "default", "bits"),
    Comparison("at a rate of 8e-3, zero ends lower than default", "zero", "default", "loss", 8e-3),
    Comparison("without normalisation, zero ends lower than default", "zero, no norm", "default, no norm"),
    Comparison("without normalisation, fixup ends lower than default", "fixup, no norm", "default, no norm"),
    Comparison("without normalisation, fixup ends lower than zero", "fixup, no norm", "zero, no norm"),
    Comparison("the normalised network ends lower than fixup", "zero", "fixup, no norm"),
    Comparison("the normalised network ends lower if clipped", "zero", "zero, no clip", "loss", 2e-3),
    Comparison("fixup ends lower if clipped", "fixup, no norm", "fixup, no norm, no clip"),
]

OF_TRANSFORMERS = [
    Comparison("in the transformer, zero ends lower than default", "dit zero", "dit default"),
    Comparison("in the transformer, zero ends lower than small", "dit zero", "dit small"),
    Comparison("in the transformer, zero is further after 100 steps", "dit zero", "dit default", "loss at 100"),
    Comparison("in the transformer, zero has the better likelihood", "dit zero", "dit default", "bits"),
    Comparison("in the transformer at a rate of 8e-3, zero ends lower", "dit zero", "dit default", "loss", 8e-3),
    Comparison("in the U-Net, zero ends lower than default", "unet zero", "unet default"),
    Comparison("in the U-Net, zero is further after 100 steps", "unet zero", "unet default", "loss at 100"),
    Comparison("of equal size, the U-Net ends lower", "unet zero", "dit zero"),
    Comparison("of equal size and in equal time, the U-Net ends lower", "unet zero, equal time", "dit zero"),
]


class Job(NamedTuple):
    setting: str
    arm: str
    rate: float
    seed: int

    def path(self, folder: Path) -> Path:
        return folder / self.setting / f"{self.arm.replace(', ', '_').replace(' ', '_')}_{self.rate:g}_{self.seed}.json"


def jobs(names: list[str]) -> list[Job]:
    """All runs, seed by seed, so that whatever is done is balanced."""
    return [Job(name, arm, rate, seed) for name in names for seed in range(SETTINGS[name].seeds)
            for arm, rates in SETTINGS[name].arms.items() for rate in rates]  # fmt: skip


@lru_cache
def data(name: str, path: str | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and held-out images in [-1, 1], each with its labels: of MNIST the first 20,000 and its test images."""
    setting = SETTINGS[name]
    of_mnist = name.endswith("mnist")
    source = MNIST(path=path, image_size=setting.size) if of_mnist else Digits()
    dataset = source.open()
    x, y = to_x_start(dataset.images), dataset.labels
    if not of_mnist:
        held_out = torch.arange(len(x)) % (len(x) // setting.held_out) == 0
        return x[~held_out], y[~held_out], x[held_out], y[held_out]
    test = source.open("test")
    return x[:20_000], y[:20_000], to_x_start(test.images)[: setting.held_out], test.labels[: setting.held_out]


def network(arm: Arm, seed: int, size: int) -> Any:
    """The network of an arm: the U-Net that was that of configs/digits.yaml, today's, or a transformer."""
    torch.manual_seed(seed_for(seed, "weights"))
    if arm.network == "dit":
        model: Any = DiT(size, 2, 1, hidden_size=64, depth=4, num_heads=4, num_classes=10)
    else:
        levels, attention = ((1, 2), (2,)) if arm.network == "earlier unet" else ((1, 1), ())
        model = UNetModel(1, 32, 2, 1, attention, channel_mult=levels, num_heads=2, use_scale_shift_norm=True,
                          num_classes=10, use_norm=arm.use_norm)  # fmt: skip
    if arm.init == "all_zero":
        make_alike(layers(model), "all zero")
        nn.init.zeros_(model.label_emb.weight)
    else:
        initialise(model, arm.init)
    return model


def process(respacing: str = "") -> GaussianDiffusion:
    return GaussianDiffusion(Schedule.named("cosine", T, respacing))


@torch.no_grad()
def held_out_loss(model: nn.Module, x_start: Tensor, y: Tensor, learned: GaussianDiffusion | None = None) -> float:
    """The mean squared error of epsilon, or of what is `learned`, on images that are not trained on: at four timesteps
    each, always the same."""
    learned, losses = learned or process(), []
    for part in range(4):
        generator = generator_for("cpu", 0, "held out", part)
        t = torch.randint(T, (len(x_start),), generator=generator)
        noise = torch.randn(x_start.shape, generator=generator)
        losses.append(training_losses(learned, partial(model, y=y), x_start, t, noise, "rescaled_mse")["mse"].mean())
    return torch.stack(losses).mean().item()


def run(job: Job, folder: Path, path: str | None) -> Path:
    """Train and score one arm with one rate and seed, unless its file is there."""
    file = job.path(folder)
    if file.exists():
        return file
    torch.set_num_threads(1)
    setting = SETTINGS[job.setting]
    x_start, y, test_x, test_y = data(job.setting, path)
    model = network(ARMS[job.arm], job.seed, setting.size)
    steps = setting.equal_time if job.arm.endswith("equal time") else setting.steps
    optimizer = torch.optim.AdamW(model.parameters(), lr=job.rate, weight_decay=0.0, fused=True)
    step = TrainingStep(
        model, process(), optimizer, ema_rates=[EMA_RATE], ema_warmup=True, seed=job.seed,
        grad_clip=ARMS[job.arm].clip, accelerator=Accelerator(cpu=True),
    )  # fmt: skip
    norms: list[float] = []
    looks: dict[int, float] = {}
    began = time.process_time()
    for i in range(steps):
        if i % LOOK_EVERY == 0:
            looks[i] = held_out_loss(model, test_x, test_y)
        batch = batch_indices(len(x_start), setting.batch_size, job.seed, i)
        done = step(x_start[batch], y[batch])
        norms.append(done.grad_norm.item())
        if done.skipped:
            break
    result: dict[str, Any] = job._asdict() | {"norms": norms, "seconds": time.process_time() - began}
    finite = len(norms) == steps and math.isfinite(norms[-1])
    result |= {"looks": looks, "loss": math.nan, "bits": math.nan}
    if finite:
        noise_of = partial(image_noise, range(len(test_x)), test_x.shape[1:], torch.device("cpu"), job.seed)
        with step.ema.in_place(EMA_RATE), torch.no_grad():
            result["loss"] = held_out_loss(model, test_x, test_y)
            bits = bits_per_dim(process(LIKELIHOOD_STEPS), partial(model, y=test_y), test_x, noise_of)
        result["bits"] = bits.total.mean().item()
    keep(file, result)
    return file


Results = dict[str, dict[float, list[dict[str, Any]]]]
"""arm -> rate -> its runs, by seed"""


def gather(name: str, folder: Path, path: str | None) -> Results:
    """What the runs of a setting gave; those that are not there are run."""
    setting = SETTINGS[name]
    return {
        arm: {rate: [json.loads(run(Job(name, arm, rate, seed), folder, path).read_text())
                     for seed in range(setting.seeds)] for rate in rates}
        for arm, rates in setting.arms.items()
    }  # fmt: skip


def figure_of(result: dict[str, Any], figure: str) -> float:
    """A figure of one run: "loss", "bits", or "loss at 100", the held-out loss at that step."""
    if figure.startswith("loss at "):
        return float(result["looks"].get(figure.removeprefix("loss at "), math.nan))
    return float(result[figure])


def best_rate(rates: dict[float, list[dict[str, Any]]]) -> float:
    """The rate whose mean held-out loss at the end is lowest, of those at which no run broke."""
    means = {rate: statistics.fmean(r["loss"] for r in runs) for rate, runs in rates.items()}
    return min((rate for rate, mean in means.items() if math.isfinite(mean)), key=lambda rate: means[rate])


def steps_to(runs: list[dict[str, Any]], loss: float) -> list[float]:
    """At which step each run's held-out loss first fell to `loss`, on straight lines between looks; nan for never."""
    found = []
    for r in runs:
        looks = [(int(step), value) for step, value in r["looks"].items()]
        crossed = [
            a + (b - a) * (before - loss) / (before - after)
            for (a, before), (b, after) in pairwise(looks)
            if before > loss >= after
        ]
        found.append(crossed[0] if crossed else math.nan)
    return found


def comparisons_table(results: Results) -> str:
    """The comparisons, with Holm's correction for all of them: a difference counts where p is below 5% after that."""
    rows = []
    for comparison in [*COMPARISONS, *OF_TRANSFORMERS]:
        if not {comparison.better, comparison.worse} <= results.keys():
            continue
        values = []
        for arm in (comparison.better, comparison.worse):
            rate = comparison.rate or best_rate(results[arm])
            values.append([figure_of(r, comparison.figure) for r in results[arm].get(rate, [])])
        if len(values[0]) < 2 or len(values[0]) != len(values[1]) or not math.isfinite(sum(values[0] + values[1])):
            continue
        differences = [worse - better for better, worse in zip(*values, strict=True)]
        rows.append((comparison, statistics.fmean(values[0]), statistics.fmean(values[1]), *interval(differences),
                     p_value(differences)))  # fmt: skip
    corrected = holm([row[-1] for row in rows])
    heads = ["comparison", "figure", "the one said to be better", "the other",
             "difference, 95% interval", "p", "p, Holm", ""]  # fmt: skip
    lines = []
    for i, (comparison, better, worse, mean, half, p) in enumerate(rows):
        verdict = "no effect seen" if corrected[i] >= 0.05 else "holds" if mean > 0 else "the reverse"
        lines.append([comparison.says, comparison.figure, f"{better:.4f}", f"{worse:.4f}", f"{mean:+.4f} ± {half:.4f}",
                      f"{p:.2g}", f"{corrected[i]:.2g}", verdict])  # fmt: skip
    return table(heads, lines)


def arms_table(results: Results) -> str:
    first = next(iter(results))
    looks = [r["looks"] for r in results[first][best_rate(results[first])]]
    half_way = statistics.fmean(list(look.values())[len(look) // 2] for look in looks)
    heads = ["arm", "best rate", "held-out loss", "after 100 steps", f"steps to {half_way:.3f}, {first}'s at half time",
             "bits/dim", "largest rate at which every seed trains", "gradient norm at steps 0, 1, 10, before clipping",
             "largest of the first 20"]  # fmt: skip
    lines = []
    for arm, rates in results.items():
        best = best_rate(rates)
        runs = rates[best]
        cells = ["{:.4f} ± {:.4f}".format(*interval([figure_of(r, name) for r in runs]))
                 for name in ("loss", "loss at 100", "bits")]  # fmt: skip
        reached = steps_to(runs, half_way)
        cells.insert(2, "{:.0f} ± {:.0f}".format(*interval(reached)) if math.isfinite(sum(reached)) else "not by all")
        trains = [rate for rate, these in rates.items() if all(r["loss"] < TRAINS for r in these)]
        norms = ", ".join(f"{statistics.fmean(r['norms'][step] for r in runs):.2g}" for step in (0, 1, 10))
        largest = (f"{max(trains):g}" if trains else "none") if len(rates) == len(GRID) else ""
        spike = f"{statistics.fmean(max(r['norms'][:20]) for r in runs):.2g}"
        lines.append([arm, f"{best:g}", *cells, largest, norms, spike])
    return table(heads, lines)


def rates_table(results: Results) -> str:
    rates = list(next(iter(results.values())))
    lines = []
    for arm, by_rate in results.items():
        cells = []
        for rate in rates:
            losses = [r["loss"] for r in by_rate.get(rate, [])]
            broke = sum(not math.isfinite(loss) for loss in losses)
            if broke or not losses:
                cells.append(f"{broke} of {len(losses)} broke" if broke else "")
            else:
                cells.append("{:.4f} ± {:.4f}".format(*interval(losses)))
        lines.append([arm, *cells])
    return table(["arm", *(f"rate {rate:g}" for rate in rates)], lines)


def plot(results: Results, path: Path) -> None:
    """The held-out loss by rate, and along the way at each arm's best rate, with 95% intervals."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for i, (arm, rates) in enumerate(results.items()):
        if arm == "all_zero":  # it stays at 1
            continue
        style: dict[str, Any] = {"label": arm, "color": f"C{i}", "capsize": 3, "marker": "o", "markersize": 4,
                                 "linestyle": "--" if "no norm" in arm else "-"}  # fmt: skip
        whole = {rate: [r["loss"] for r in runs] for rate, runs in rates.items()}
        ends = {rate: interval(losses) for rate, losses in whole.items() if math.isfinite(sum(losses))}
        apart = 1.05 ** (i - len(results) / 2)  # side by side, since many lie on each other
        left.errorbar(
            [rate * apart for rate in ends], [e[0] for e in ends.values()], yerr=[e[1] for e in ends.values()], **style
        )
        runs = rates[best_rate(rates)]
        steps = [int(step) for step in runs[0]["looks"] if int(step)]
        looks = [interval([r["looks"][str(step)] for r in runs]) for step in steps]
        right.errorbar(steps, [look[0] for look in looks], yerr=[look[1] for look in looks], **style)
    bests = [statistics.fmean(r["loss"] for r in rates[best_rate(rates)]) for rates in results.values()]
    lowest, trained = min(bests), [best for best in bests if best < TRAINS]
    top = max(1.4 * lowest, 1.15 * max(trained))
    left.set(xscale="log", ylim=(0.96 * lowest, top), xlabel="learning rate (points moved apart)",
             ylabel="held-out loss at the end", title="no point at a rate: it broke, or is far above")  # fmt: skip
    rates_tried = list(next(iter(results.values())))
    left.set_xticks(rates_tried, [f"{rate:g}" for rate in rates_tried])
    left.minorticks_off()
    right.set(yscale="log", xlabel="step", ylabel="held-out loss on the way, best rate")
    right.legend(fontsize=8, loc="upper right")
    figure.savefig(path, dpi=120)


def report(all_results: dict[str, Results]) -> None:
    """Rewrite the tables of the document, and the figure beside it."""
    for name, results in all_results.items():
        tables = {"comparisons": comparisons_table, "arms": arms_table}
        if any(len(rates) > 1 for rates in results.values()):
            tables["rates"] = rates_table
        put_tables(DOCUMENT, {f"{name} {kind}": of(results) for kind, of in tables.items()})
        if len(results) > 2:  # two arms need no picture
            plot(results, DOCUMENT.with_name(f"zero-init-{name.replace(' ', '-')}.png"))
    print(f"{DOCUMENT} and its figures are written")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, choices=range(1, 257), metavar="N", default=2,
                        help="runs at a time, of one thread each")  # fmt: skip
    parser.add_argument("--mnist", help="the folder that holds MNIST/raw; not given: digits alone")
    parser.add_argument("--settings", nargs="*", choices=SETTINGS, default=list(SETTINGS), help="default: all")
    parser.add_argument("--results", type=Path, default=ROOT / "runs" / "studies" / "zero_init")
    args = parser.parse_args()
    names = [name for name in args.settings if not name.endswith("mnist") or args.mnist]
    todo = jobs(names)
    if args.mnist:
        data("mnist", args.mnist)  # or it would be missed after hours
    torch.set_num_threads(1)
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        started = [pool.submit(run, job, args.results, args.mnist) for job in todo]
        for future in tqdm(as_completed(started), total=len(started), unit="run"):
            future.result()
    report({name: gather(name, args.results, args.mnist) for name in names})


if __name__ == "__main__":
    sys.exit(exit_code(main))
