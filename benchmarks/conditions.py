"""Whether conditions are obeyed, and what guidance is worth.

    pip install -e '.[studies]' torch-fidelity
    python benchmarks/conditions.py angle half --mnist FOLDER_THAT_HOLDS_MNIST
    python benchmarks/conditions.py guide --ckpt RUN [RUN ...] --out docs/guidance-mnist

angle: MNIST at 16x16, rotated by a recorded angle, is trained on without four bands of 15 degrees. Samples are asked
for angles of these bands, and a network that was trained on other real images, with their classes, estimates theirs.
half: the left half is the condition; a classifier of real images says whether samples are of the digit that the half is
from. Both train in runs/conditions/, in a few minutes on two cores; what is there is not trained again.

guide: each run, of one data set and several seeds, is scored without guidance, by classifier-free guidance, and guided
by its own checkpoint at a quarter of its steps, everywhere and between two noise levels: Fréchet distances, precision
and recall of --sets sets of --n samples, means over runs and sets with 95% intervals over all, and the difference of
the same run and set to no guidance. Results are kept in OUT.json after each set.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.datasets import MNIST
from torchvision.transforms.functional import rotate

sys.path.append(str(Path(__file__).parents[1] / "studies"))
from tables import interval, keep, table

import diffusion
from diffusion.data.base import open_data
from diffusion.data.loader import batch_indices
from diffusion.metrics import METRICS
from diffusion.metrics.base import Reference, Subject
from diffusion.metrics.features import fit_classifier
from diffusion.run.checkpoint import folders, step_of
from diffusion.run.folder import is_run
from diffusion.run.loaded import Run

ROOT = Path(__file__).parents[1]
RUNS, IMAGES, DRAWN = ROOT / "runs" / "conditions", 20_000, 1000
LEFT_OUT = ((-75, -60), (-30, -15), (15, 30), (60, 75))
"""The bands of angles, in degrees from -90 to 90, that are not trained on."""
NETWORK = ["--model.channel_mult", "[1,2]", "--model.attention_resolutions", "[2]", "--train.steps", "1500"]
INSIDE = (0.3, 5.0)
"""The noise levels sigma / alpha of guidance in an interval."""
ARMS: dict[str, tuple[float, bool, bool]] = {
    "none": (1.0, False, False),
    "classes dropped, 1.5": (1.5, False, False),
    "classes dropped, 1.5, in the interval": (1.5, False, True),
    "its own past, 1.5": (1.5, True, False),
    "its own past, 2": (2.0, True, False),
    "its own past, 2, in the interval": (2.0, True, True),
}
"""The scale, whether an earlier checkpoint guides, and whether in the interval only."""


def digits(mnist: Path, train: bool = True) -> tuple[Tensor, Tensor]:
    """MNIST padded to 32x32: (N, 1, 32, 32) in [0, 1], and labels."""
    data = MNIST(mnist, train=train)
    return F.pad(data.data[:, None].float() / 255, (2, 2, 2, 2)), data.targets


def rotated(images: Tensor, angles: Tensor) -> Tensor:
    """Images of 32x32 turned by angles in degrees, at 16x16: (N, 1, 16, 16) in [0, 1]."""
    turned = [rotate(image, float(angle), expand=False) for image, angle in zip(images, angles, strict=True)]
    return F.avg_pool2d(torch.stack(turned), 2)


def is_left_out(angles: Tensor) -> Tensor:
    return torch.stack([(low <= angles) & (angles < high) for low, high in LEFT_OUT]).any(0)


def trained(name: str, arrays: dict[str, Any], *flags: str) -> Run:
    """The run on these arrays, trained as a user would, if it is not there."""
    RUNS.mkdir(parents=True, exist_ok=True)
    data, out = RUNS / f"{name}.npz", RUNS / name
    if not (out / "report.html").exists():
        np.savez(data, **arrays)
        source = ["--data.source", "arrays", "--data.path", str(data), "--data.channels", "1", *NETWORK, *flags]
        subprocess.run([sys.executable, "train.py", "--out", str(out), *source], cwd=ROOT, check=True)
    return diffusion.load(out)


def estimator(images: Tensor, angles: Tensor, labels: Tensor) -> nn.Module:
    """A network that estimates the angle of an image, in units of 90 degrees, for each class that it may have."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 128), nn.ReLU(),
        nn.Linear(128, 10),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    for step in range(4000):
        chosen = batch_indices(len(images), 128, 0, step)
        F.mse_loss(net(images[chosen])[torch.arange(128), labels[chosen]], angles[chosen] / 90).backward()
        optimizer.step()
        optimizer.zero_grad()
    return net.eval().requires_grad_(False)


def correlation(a: Tensor, b: Tensor) -> float:
    return torch.corrcoef(torch.stack([a, b]))[0, 1].item()


def angle(mnist: Path) -> Iterator[str]:
    images, labels = digits(mnist)
    angles = torch.rand(len(images), generator=torch.Generator().manual_seed(0)) * 180 - 90
    own = torch.arange(IMAGES)[~is_left_out(angles[:IMAGES])]
    arrays = dict(
        arr_0=(rotated(images[own], angles[own])[:, 0] * 255).round().byte().numpy(), arr_1=labels[own].numpy()
    )
    data = str(RUNS / "angle.npz")
    flags = "--data.conditions", data, "--train.label_dropout", "0.1", "--train.steps", "2500"
    run = trained("angle", arrays | {"angle": angles[own].numpy()}, *flags)
    others = slice(IMAGES, 3 * IMAGES)
    net = estimator(rotated(images[others], angles[others]) * 2 - 1, angles[others], labels[others])
    test, test_labels = digits(mnist, train=False)
    asked = torch.rand(DRAWN, generator=torch.Generator().manual_seed(1)) * 15
    asked += torch.tensor([low for low, _ in LEFT_OUT])[torch.arange(DRAWN) % len(LEFT_OUT)]
    shown = {"real images": rotated(test[:DRAWN], asked) * 2 - 1}
    for guidance in (1.0, 1.5, 2.0):
        drawn = run.sample(DRAWN, classes=test_labels[:DRAWN], conditions={"angle": asked}, guidance=guidance)
        shown[f"samples of guidance {guidance:g}"] = drawn
    for name, x in shown.items():
        seen = net(x)[torch.arange(DRAWN), test_labels[:DRAWN]] * 90
        error = (seen - asked).abs().mean()
        yield f"angles left out: {name} correlate {correlation(seen, asked):.3f}, mean error {error:.1f} degrees"


def half(mnist: Path) -> Iterator[str]:
    (images, labels), (test, test_labels) = digits(mnist), digits(mnist, train=False)
    images, test = F.avg_pool2d(images, 2), F.avg_pool2d(test, 2)
    left = torch.arange(16) < 8
    pairs = (torch.cat([images[:IMAGES], images[:IMAGES] * left], 1) * 255).round().byte().movedim(1, -1)
    run = trained("half", {"arr_0": pairs.numpy()}, "--data.condition_channels", "1", "--model.class_cond", "false")
    net = fit_classifier(images[IMAGES:] * 2 - 1, labels[IMAGES:], 10, 64, 3000)
    given = test[:DRAWN] * left * 2 - 1
    drawn = run.sample(DRAWN, conditions={"image": given})
    joined = torch.where(left, given, drawn.roll(1, 0))
    for name, x in (("samples", drawn), ("real images", test[:DRAWN] * 2 - 1), ("halves of others", joined)):
        right = (net(x).argmax(1) == test_labels[:DRAWN]).float().mean()
        yield f"left half given: the digit is seen in {right:.1%} of {name}"
    error = ((drawn - given)[..., left] ** 2).mean().sqrt() / 2
    yield f"left half given: samples repeat it up to {error:.3f} of the range (root mean square)"


def guide(ckpts: list[Path], out: Path, n: int, sets: int) -> str:
    from accelerate import PartialState

    state, kept = PartialState(cpu=True), out.with_suffix(".json")
    results: dict[str, list[dict[str, float]]] = json.loads(kept.read_text()) if kept.exists() else {}
    dataset = open_data(diffusion.load(ckpts[0]).config.data)
    reference = Reference(dataset, state.device, "classifier")
    for arm, (scale, past, inside) in ARMS.items():
        for number, (seed, ckpt) in enumerate((seed, ckpt) for seed in range(sets) for ckpt in ckpts):
            if number < len(results.get(arm, [])):
                continue
            run = diffusion.load(ckpt)
            saved = folders(ckpt if is_run(ckpt) else ckpt.parent.parent)
            quarter = min(saved, key=lambda path: abs(step_of(path) - run.saved.step / 4))
            flags: dict[str, Any] = {"guide": diffusion.load(quarter)} if past else {}
            run = run.with_sampling(guidance=scale, **flags, guide_between=INSIDE if inside else None)
            subject = Subject(run, dataset, state, reference, n, seed=seed)
            scores = [METRICS[name].score(subject).figures for name in ("frechet", "precision_recall")]
            found = {name: value for figures in scores for name, value in figures.items()}
            results.setdefault(arm, []).append(found | {"evaluations": subject.evaluations or 0})
            keep(kept, results)
            print(arm, ckpt, seed, found, flush=True)
    rows, heads = (
        [],
        ["guided by", "Fréchet distance", "recall", "precision", "evaluations", "sets", "distance less none"],
    )
    for arm, scores in results.items():
        cells = ["{:.3f} ± {:.3f}".format(*interval([score[name] for score in scores]))
                 for name in ("frechet", "recall", "precision")]  # fmt: skip
        less = [score["frechet"] - other["frechet"] for score, other in zip(scores, results["none"], strict=False)]
        paired = "{:+.3f} ± {:.3f}".format(*interval(less)) if arm != "none" else ""
        evaluations = f"{np.mean([score['evaluations'] for score in scores]):.0f}"
        rows.append([arm, *cells, evaluations, str(len(scores)), paired])
    text = table(heads, rows)
    out.with_suffix(".md").write_text(text + "\n")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=["angle", "half", "guide"])
    parser.add_argument("--mnist", type=Path, default=Path("data"), help="the folder that holds MNIST")
    parser.add_argument("--ckpt", type=Path, nargs="+", help="guide: runs of one data set")
    parser.add_argument("--out", type=Path, default=RUNS / "guide", help="guide: where results are kept")
    parser.add_argument("--n", type=int, default=1000, help="guide: samples of a set")
    parser.add_argument("--sets", type=int, default=3)
    args = parser.parse_args()
    for what in args.what:
        if what == "guide":
            print(guide(args.ckpt, args.out, args.n, args.sets))
            continue
        for line in {"angle": angle, "half": half}[what](args.mnist):
            print(line, flush=True)


if __name__ == "__main__":
    main()
