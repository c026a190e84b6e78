"""Does zero initialisation make the best learning rate transfer over depth and width?

    pip install -e '.[studies]'
    python studies/learning_rate.py --mnist FOLDER    (the folder that holds MNIST/raw)

Whoever enlarges a network searches the learning rate anew. The largest stable rate is said to fall with the depth to
the power -3/2, the depth being the shortest path (2602.07494), and muP to keep the best one over width. Branches that
end in zeros are on no path at the start, and leave muP no scale to set. So zero may let the rate transfer, over depth
at the least; or not, since it protects the start and not the first updates (at 1,000 blocks they throw it far back).

Networks of growing depth (residual blocks a level, blocks of the transformer) and width are trained at a grid of
rates, with the default recipe (prediction v, warm-up, linear decay), 300 steps of 32 images, and scored on held-out
images. Runs of one seed share images, timesteps and noise. All that follows, to the end of the list, was fixed before
the first run:

- The figures of a seed and size: the *best* rate, the vertex of a parabola through the logarithm of the held-out loss
  over that of the rate, at the lowest loss and up to two rates to each side; and the largest *stable* rate, at and
  below which the loss ends below 0.5. Then their slopes: log2 of the rate per doubling of the size, by least squares.
- `COMPARISONS` of slopes of the best rate: t-tests over seeds against 0 or against another arm's, with Holm's
  correction.
- A rate *transfers* if the 95% interval of its slope lies within 1/3 of 0: a factor of two over eight times the size.
- What it would mean. Zero transfers over blocks and default does not: keep the rate when deepening, since the branches
  are off the path. Both or neither: zero has no part in it. muP's rates transfer over width and the standard ones do
  not: a setting that scales the rates follows. Neither: the rate is to be searched, and the document says how.

Left out, for more than six hours on two cores, since the question is of zero: Fixup with muP's rates and with Muon,
the transformer with either, all but zero and default with AdamW on MNIST; and a width of 16, which the network's groups
of 32 channels do not allow. A U-Net of width 128 has four rates in the middle, and so no largest one. A size at which
nothing trains with one seed counts with none.

Added when the first seed's runs had been seen, before any run of their own, and outside of the comparisons: Muon and
the transformer with muP's rates, and a network that is both wider and deeper, on which nothing was chosen. Amended
then: the best rate lies within half a step of the lowest loss's, since of default weights with 8 blocks the rates above
diverged, and the parabola through those below had its vertex far among these. (At a width of 128 it then is no lower
than 7e-4, which can only flatten slopes that fall.) The tables show slopes and comparisons by both rules, and the best
rates and the figure those by the amended one.

Results are kept in runs/studies/learning_rate/, one file a run: what is there already is not run again. At the end the
tables in docs/learning-rate.md and the figures beside it are rewritten, from the seeds of which all runs are there.
Every run is one thread.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
import zero_init
from accelerate import Accelerator
from tables import holm, interval, keep, p_value, put_tables, table
from torch import Tensor
from tqdm import tqdm

from diffusion import GaussianDiffusion, Schedule, UNetModel
from diffusion.commands.terminal import exit_code
from diffusion.config.schema import TrainConfig
from diffusion.data.loader import batch_indices
from diffusion.models.dit import DiT
from diffusion.models.initialisation import InitName, initialise
from diffusion.optimizers import OPTIMIZERS
from diffusion.randomness import generator_for, seed_for
from diffusion.training.build import learning_rate, parameter_groups
from diffusion.training.step import TrainingStep

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "learning-rate.md"
T, STEPS, BATCH_SIZE, SEEDS, EMA_RATE, STABLE, TRANSFERS = 1000, 300, 32, 4, 0.99, 0.5, 1 / 3
RATES = tuple(5e-4 * 2**k for k in range(7))


class Arm(NamedTuple):
    init: InitName
    optimizer: Literal["adamw", "muon"] = "adamw"
    network: Literal["unet", "dit"] = "unet"
    mup: bool = False
    """whether a weight's rate falls with its inputs from a width of 32 on, as in muP"""


UNETS: tuple[InitName, ...] = ("zero", "default", "fixup")
ARMS = {init: Arm(init) for init in UNETS} | {f"{init}, muP": Arm(init, mup=True) for init in UNETS[:2]}
ARMS |= {f"{init}, Muon": Arm(init, "muon") for init in UNETS[:2]} | {"zero, Muon, muP": Arm("zero", "muon", mup=True)}
ARMS |= {f"dit {init}": Arm(init, "adamw", "dit") for init in UNETS[:2]}
ARMS["dit zero, muP"] = Arm("zero", "adamw", "dit", mup=True)


class Size(NamedTuple):
    width: int
    blocks: int

    def along(self, axis: str) -> int:
        """What grows along an axis."""
        return self.width if "width" in axis else self.blocks


AXES = {
    "blocks": (Size(32, 1), Size(32, 2), Size(32, 4), Size(32, 8)),
    "width": (Size(32, 1), Size(64, 1), Size(128, 1)),
    "width and blocks": (Size(32, 1), Size(96, 4)),
    "dit blocks": (Size(64, 2), Size(64, 4), Size(64, 8), Size(64, 16)),
    "dit width": (Size(32, 4), Size(64, 4), Size(128, 4)),
}


class Job(NamedTuple):
    data: str
    arm: str
    size: Size
    rate: float
    seed: int

    def path(self, folder: Path) -> Path:
        width, blocks = self.size
        return folder / self.data / f"{self.arm} {width} {blocks} {self.rate:g} {self.seed}.json"


class Line(NamedTuple):
    """An arm along an axis, on a data set."""

    data: str
    arm: str
    axis: str

    def sizes(self) -> dict[Size, tuple[float, ...]]:
        """The sizes, each with its rates; on MNIST, whose runs take twice as long, without the largest."""
        sizes = AXES[self.axis][: -1 if self.data == "mnist" else None]
        return {size: RATES[1:5] if size == Size(128, 1) else RATES for size in sizes}

    def jobs(self, seed: int) -> list[Job]:
        """Its runs of a seed."""
        return [Job(self.data, self.arm, size, rate, seed) for size, rates in self.sizes().items() for rate in rates]


def lines(data: str, axes: str, *arms: str) -> list[Line]:
    return [Line(data, arm, axis) for axis in axes.split(", ") for arm in arms]


LINES = [
    *lines("digits", "blocks, width", "zero", "default", "fixup", "zero, Muon", "default, Muon"),
    *lines("digits", "width", "zero, muP", "default, muP"),
    *lines("digits", "dit blocks, dit width", "dit zero", "dit default"),
    *lines("mnist", "blocks, width", "zero", "default"),
]
ADDED = [*lines("digits", "width", "zero, Muon, muP"), *lines("digits", "dit width", "dit zero, muP"),
         *lines("digits", "width and blocks", "zero", "zero, muP")]  # fmt: skip
COMPARISONS: list[tuple[Line, str | None]] = [
    *((line, None) for line in LINES),
    *((line, line.arm.replace("zero", "default")) for line in LINES if line.arm in ("zero", "zero, Muon", "dit zero")),
    *((line, "zero") for line in lines("digits", "width", "zero, muP")),
]
"""That the slope of a line is not 0, or not that of another arm's."""


def jobs(mnist: bool) -> list[Job]:
    """All runs, seed by seed, so that whatever is done is balanced. (Axes share their smallest size.)"""
    chosen = [line for line in (*LINES, *ADDED) if mnist or line.data != "mnist"]
    return list(dict.fromkeys(job for seed in range(SEEDS) for line in chosen for job in line.jobs(seed)))


def network(arm: Arm, size: Size, pixels: int, seed: int) -> Any:
    torch.manual_seed(seed_for(seed, "weights"))
    if arm.network == "dit":
        model: Any = DiT(pixels, 2, 1, hidden_size=size.width, depth=size.blocks, num_heads=4, num_classes=10)
    else:
        model = UNetModel(1, size.width, 2, size.blocks, (), channel_mult=(1, 1), num_heads=2, num_classes=10,
                          use_scale_shift_norm=True, use_norm=arm.init != "fixup")  # fmt: skip
    initialise(model, arm.init)
    return model


def step_of(arm: Arm, size: Size, pixels: int, seed: int, rate: float) -> TrainingStep:
    """The training step of a size of an arm."""
    narrow = network(arm, size._replace(width=32), pixels, seed) if arm.mup else None
    model = network(arm, size, pixels, seed)
    groups = [{**group, "lr": rate * group["factor"]} for group in parameter_groups(model, narrow=narrow)]
    optimizer = OPTIMIZERS[arm.optimizer](model, groups, rate)
    process = GaussianDiffusion(Schedule.named("cosine", T), "v")
    return TrainingStep(model, process, optimizer, ema_rates=[EMA_RATE], seed=seed, accelerator=Accelerator(cpu=True))


def run(job: Job, folder: Path, path: str | None) -> None:
    """Train and score one size of an arm with one rate and seed, unless its file is there."""
    file, began = job.path(folder), time.process_time()
    if file.exists():
        return
    torch.set_num_threads(1)
    x_start, y, test_x, test_y = zero_init.data(job.data, path)
    step, train = step_of(ARMS[job.arm], job.size, x_start.shape[-1], job.seed, job.rate), TrainConfig(steps=STEPS)
    loss = math.nan
    for i in range(STEPS):
        for group in step.optimizer.param_groups:
            group["lr"] = learning_rate(train, i) / train.lr * job.rate * group["factor"]
        batch = batch_indices(len(x_start), BATCH_SIZE, job.seed, i)
        if step(x_start[batch], y[batch]).skipped:
            break
    else:
        with step.ema.in_place(EMA_RATE):
            loss = zero_init.held_out_loss(step.network.eval(), test_x, test_y, step.process)
    keep(file, job._asdict() | {"loss": loss, "seconds": time.process_time() - began})


Losses = dict[Size, list[dict[float, float]]]
"""size -> of each seed, rate -> the held-out loss"""


def gather(line: Line, folder: Path) -> Losses:
    """What the runs of a line gave, of the first seeds, as many as are whole: seeds are paired by their place."""
    found: Losses = {size: [] for size in line.sizes()}
    for whole in takewhile(lambda seed: all(job.path(folder).exists() for job in seed), map(line.jobs, range(SEEDS))):
        read = {job: float(json.loads(job.path(folder).read_text())["loss"]) for job in whole}
        for size in found:
            found[size].append({job.rate: loss for job, loss in read.items() if job.size == size})
    return found


def best(losses: dict[float, float], reach: float = math.inf) -> float:
    """log2 of the best rate: the vertex of a parabola through the lowest loss and up to two rates to each side; the
    lowest's own rate where it does not open upwards, at most a step beyond the grid, and `reach` from the lowest's."""
    if not (rates := [rate for rate, loss in losses.items() if loss < STABLE]):
        return math.nan
    lowest = rates.index(min(rates, key=lambda rate: losses[rate]))
    beside = rates[max(0, lowest - 2) : lowest + 3]
    fit = np.polyfit(np.log2(beside), np.log([losses[rate] for rate in beside]), 2) if len(beside) > 2 else (0.0, 0.0)
    centre = math.log2(rates[lowest])
    vertex = np.clip(-fit[1] / (2 * fit[0]) if fit[0] > 0 else centre, centre - reach, centre + reach)
    return float(np.clip(vertex, math.log2(min(losses)) - 1, math.log2(max(losses)) + 1))


near = partial(best, reach=0.5)
"""By the amended rule: within half a step of the lowest loss's."""


def stable(losses: dict[float, float]) -> float:
    """log2 of the largest rate at and below which all of a seed's runs train; not of the few rates of a large width."""
    broken = min((rate for rate, loss in losses.items() if not loss < STABLE), default=math.inf)
    known = [rate for rate in losses if rate < broken] if len(losses) == len(RATES) else []
    return math.log2(max(known)) if known else math.nan


def slopes(line: Line, losses: Losses, figure: Any = best) -> list[float]:
    """By how many doublings the rate grows for a doubling of the size, of each seed."""
    rates = {size.along(line.axis): [figure(seed) for seed in seeds] for size, seeds in losses.items()}
    found = {size: logs for size, logs in rates.items() if np.isfinite(logs).all()}
    if len(found) < 2 or not all(len(rates) > 1 for rates in found.values()):
        return []
    return np.polyfit(np.log2(list(found)), list(found.values()), 1)[0].tolist()


def shown(values: list[float]) -> str:
    return "{:+.2f} ± {:.2f}".format(*interval(values)) if values else ""


def judged(found: list[float]) -> str:
    """What the slopes of a line say of its rate."""
    mean, half = interval(found) if found else (math.nan, math.nan)
    verdicts = {"transfers": abs(mean) + half < TRANSFERS, "falls": mean + half < 0, "rises": mean - half > 0}
    return next((verdict for verdict, holds in verdicts.items() if holds), "not told" if found else "")


def lines_table(results: dict[Line, Losses]) -> str:
    rows = []
    for line, losses in results.items():
        found = [slopes(line, losses, figure) for figure in (best, near)]
        cells = [line.data, line.arm, line.axis, *(text for one in found for text in (shown(one), judged(one)))]
        for figure in (near, stable):
            means = {size.along(line.axis): 2 ** statistics.fmean(map(figure, seeds)) for size, seeds in losses.items()}
            cells.append(", ".join(f"{size}: {value:.1e}" for size, value in means.items() if math.isfinite(value)))
        rows.append([*cells, shown(slopes(line, losses, stable))])
    return table(["data", "arm", "over", "slope", "", "amended", "", "best rates", "largest stable", "slope"], rows)


def comparisons_table(results: dict[Line, Losses], figure: Any) -> str:
    """The comparisons, with Holm's correction for all of them, those without runs included."""
    rows = []
    for line, other in COMPARISONS:
        values, against = slopes(line, results.get(line, {}), figure), line._replace(arm=other or line.arm)
        others = slopes(against, results.get(against, {}), figure) if other else [0.0] * len(values)
        if len(differences := [a - b for a, b in zip(values, others, strict=False)]) > 1:
            what = f"{line.arm}, less {other}" if other else line.arm
            rows.append((f"{line.data}, {line.axis}: {what}", shown(differences), p_value(differences)))
    corrected = holm([p for _, _, p in rows] + [1.0] * (len(COMPARISONS) - len(rows)))
    cells = [[says, difference, f"{p:.2g}", f"{raised:.2g}", "beyond chance" if raised < 0.05 else "not told"]
             for (says, difference, p), raised in zip(rows, corrected, strict=False)]  # fmt: skip
    return table(["slope of", "difference, 95% interval", "p", "p, Holm", ""], cells)


def panels(count: int, columns: int) -> tuple[Any, list[Any]]:
    """A figure of so many panels, with logarithmic axes."""
    rows = math.ceil(count / columns)
    figure = plt.figure(figsize=(3.2 * columns, 2.8 * rows), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, i + 1, xscale="log", yscale="log") for i in range(count)]


def finish(axis: Any, title: str, ticks: Any) -> None:
    axis.set_title(title, fontsize=9)
    axis.legend(fontsize=6, framealpha=0.3)
    axis.set_xticks(list(ticks), labels=map(str, ticks))
    axis.minorticks_off()


def plot(results: dict[Line, Losses], path: Path) -> None:
    """The best rate (by the amended rule) over the size, for each data set and axis; and in another figure the loss
    over the rate, for each line."""
    places = list(dict.fromkeys((line.data, line.axis) for line in results))
    (rates, rate_axes), (losses_figure, loss_axes) = panels(len(places), 4), panels(len(results), 6)
    for axis, (line, losses) in zip(loss_axes, results.items(), strict=True):
        lowest = min(loss for seeds in losses.values() for seed in seeds for loss in (*seed.values(), STABLE))
        for size, seeds in losses.items():
            means = {rate: statistics.fmean(seed[rate] for seed in seeds) for rate in seeds[0]}
            axis.plot(list(means), list(means.values()), ".-", label=f"width {size.width}, blocks {size.blocks}")
        axis.set(yscale="linear", ylim=(0.97 * lowest, 1.5 * lowest))
        finish(axis, f"{line.data}, {line.arm}, {line.axis}", RATES[::2])
        bests = {size.along(line.axis): [2 ** near(seed) for seed in seeds] for size, seeds in losses.items()}
        above = rate_axes[places.index((line.data, line.axis))]
        [drawn] = above.plot(list(bests), list(map(statistics.geometric_mean, bests.values())), "-", label=line.arm)
        above.plot(list(bests), list(bests.values()), ".", color=drawn.get_color())
        above.set_ylim(RATES[0] / 2, 2 * RATES[-1])
        finish(above, f"{line.data}: best rate over {line.axis}", bests)
    rates.savefig(path, dpi=100)
    losses_figure.savefig(path.with_stem(f"{path.stem}-losses"), dpi=90)


def movements(arm: Arm, size: Size, rate: float, steps: int = 8, pixels: int = 8) -> list[float]:
    """A coordinate check: by how much what the output layers are given, before their normalisation, has moved after
    each of the first steps at a constant rate, as root mean square relative to its own at the start."""
    step, seen = step_of(arm, size, pixels, 0, rate), list[Tensor]()
    x = torch.randn(32, 1, pixels, pixels, generator=generator_for("cpu", 0, "movements")).clamp(-1, 1)
    y, last = torch.arange(32) % 10, step.network.get_submodule("final_layer" if arm.network == "dit" else "out")
    last.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    looks = []
    for _ in range(steps + 1):
        with torch.no_grad():
            step.network(x, torch.full((32,), 500.0), y=y)
        looks.append(seen[-1])
        step(x, y)
    return [((look - looks[0]).square().mean() / looks[0].square().mean()).sqrt().item() for look in looks[1:]]


def plot_movements(path: Path, rate: float = 1e-3) -> None:
    """The coordinate checks over each axis."""
    figure, axes = panels(len(AXES), 5)
    for axis, (name, sizes) in zip(axes, AXES.items(), strict=True):
        for arm in dict.fromkeys(line.arm for line in (*LINES, *ADDED) if line.axis == name):
            ends = [movements(ARMS[arm], size, rate)[-1] for size in sizes]
            axis.plot([size.along(name) for size in sizes], ends, ".-", label=arm)
        finish(axis, f"moved after 8 steps, over {name}", [size.along(name) for size in sizes])
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, of one thread each")
    parser.add_argument("--mnist", help="the folder that holds MNIST/raw; not given: digits alone")
    parser.add_argument("--tables", action="store_true", help="run nothing, rewrite tables and figures")
    parser.add_argument("--results", type=Path, default=ROOT / "runs" / "studies" / "learning_rate")
    args = parser.parse_args()
    if args.mnist:
        zero_init.data("mnist", args.mnist)  # or it would be missed after hours
    with ProcessPoolExecutor(args.workers, mp_context=torch.multiprocessing.get_context("spawn")) as pool:
        started = [pool.submit(run, job, args.results, args.mnist) for job in jobs(bool(args.mnist)) if not args.tables]
        for future in tqdm(as_completed(started), total=len(started), unit="run"):
            future.result()
    # of which a seed is there
    results = {line: found for line in (*LINES, *ADDED) if all((found := gather(line, args.results)).values())}
    tables = {"comparisons": comparisons_table(results, best), "amended": comparisons_table(results, near)}
    put_tables(DOCUMENT, {"slopes": lines_table(results)} | tables)
    plot(results, DOCUMENT.with_name("learning-rate.png"))
    plot_movements(DOCUMENT.with_name("learning-rate-movements.png"))
    print(f"{DOCUMENT} and its figures are written")


if __name__ == "__main__":
    sys.exit(exit_code(main))
