"""The gap between a network's loss and the optimal one: the least that any network can have on its training set.

The optimal loss has a closed form: the best prediction of x_0 at x_t is its mean over the training set, given x_t. A
network that reaches it copies training images. The loss of images that were not trained on says how near is too near.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffusion.data.base import DataSet, load, part
from diffusion.errors import UsageError
from diffusion.losses import training_losses
from diffusion.metrics.base import Score, Subject
from diffusion.parallel.cores import CORES
from diffusion.process import GaussianDiffusion
from diffusion.randomness import image_noise
from diffusion.run.checkpoint import folders, step_of
from diffusion.run.folder import run_of
from diffusion.run.loaded import Run, load_run
from diffusion.sampling import batches

LEVELS, IMAGES, VALUES = 20, 300, 2**27
"""Timesteps, evenly spaced; images of each kind, by default; and the most values of all noisy images together."""
SHARES = 0.2, 0.4, 0.6, 0.8
"""The shares of the steps after which a checkpoint is compared with those before."""
CERTAIN = 3.3
"""Standard errors of a finding that is looked for at all levels and checkpoints: 95% after Bonferroni's correction."""
FEW, FEWEST = 10, 20
"""Images of the same conditions, below which the optimal loss says little; and of a kind, below which there is no
verdict."""
COVERED = "mse", "rescaled_mse"


class Losses(NamedTuple):
    """The losses of a checkpoint on images that it was trained on, (n, levels), and on held-out ones, (m, levels)."""

    step: int
    train: Tensor
    held_out: Tensor = torch.empty(0, 0)


def check_gap(subject: Subject) -> None:
    """Raise UsageError if the optimal loss has no closed form, or the images are not those that were trained on."""
    run, loss, shapes = subject.run, subject.run.config.diffusion.loss, subject.run.config.data.condition_shapes
    wrong = None
    if loss not in COVERED:
        wrong = f"is defined for the losses {' and '.join(COVERED)}, and diffusion.loss is {loss}"
    elif shapes:
        wrong = f"is not defined with condition images ({', '.join(shapes)}), each of one answer"
    elif subject.dataset.fingerprint() != run.saved.data:
        hint = "leave out --split, --classes and --data" if run.saved.data else "nothing is known of its data"
        wrong = f"needs the images that {run.path} was trained on, all and no others: {hint}"
    if wrong:
        raise UsageError(f"--metric gap {wrong}")


def groups(run: Run, dataset: DataSet) -> Tensor:
    """Numbers (N,) that are equal for images of the same class and condition vector, as far as the network has any."""
    columns = [np.zeros((len(dataset), 1))] + [np.asarray(dataset.labels)[:, None]] * bool(run.class_names)
    table = np.column_stack(columns + [dataset.vectors.rows] * bool(run.vectors.size))
    return torch.from_numpy(np.unique(table, axis=0, return_inverse=True)[1].reshape(-1))


def posterior_means(
    x_t: Tensor, alpha: Tensor, sigma: Tensor, groups: Tensor, images: Iterable[tuple[Tensor, Tensor]]
) -> Tensor:
    """E[x_0 | x_t], (Q, D), for x_0 that is any image of a group with equal probability, in one pass over the images.

    Args:
        x_t: (Q, D), each at its own `alpha` and `sigma` (Q,), and of its own group, one of `groups` (Q,).
        images: parts of all images, (n, D), and their groups (n,).
    """
    peak = torch.full_like(alpha, torch.finfo(alpha.dtype).min)
    total, mean = torch.zeros_like(alpha), torch.zeros_like(x_t)
    for x_start, groups_of in images:
        for group in groups_of.unique():
            candidates = x_start[groups_of == group]
            for rows in (groups == group).nonzero().flatten().split(2048):
                a, variance = alpha[rows, None], sigma[rows, None] ** 2
                # log q(x_t | x_0), without what is the same for all x_0; its softmax goes on from part to part.
                log_q = (a * (x_t[rows] @ candidates.T) - a**2 / 2 * candidates.square().sum(1)) / variance
                highest = torch.maximum(peak[rows], log_q.amax(1))
                weights, before = (log_q - highest[:, None]).exp(), (peak[rows] - highest).exp()
                total[rows] = total[rows] * before + weights.sum(1)
                mean[rows] = mean[rows] * before[:, None] + weights @ candidates
                peak[rows] = highest
    return mean / total[:, None]


def levels_of(process: GaussianDiffusion) -> list[int]:
    """The timesteps at which losses are compared."""
    return sorted({(2 * level + 1) * process.num_timesteps // (2 * LEVELS) for level in range(LEVELS)})


def weighting(run: Run) -> Tensor:
    """The weights of the loss at each level, (levels,), float64."""
    return torch.from_numpy(run.config.diffusion.component("weighting")(run.process)[levels_of(run.process)])


def at_levels(subject: Subject, batch: range, x_start: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The timesteps (B,) and the noise of a batch of images at each level."""
    for t in levels_of(subject.run.process):
        noise = image_noise(batch, x_start.shape[1:], x_start.device, subject.seed, f"gap {t}")
        yield torch.full((len(x_start),), t, device=x_start.device), noise


@torch.no_grad()
def losses(subject: Subject, run: Run, dataset: DataSet, n: int) -> Tensor:
    """The loss of the network of `run` on n images at each level, (n, levels), as it is weighted in training."""
    from accelerate.utils import gather_object  # takes long to import

    rows = list[Tensor]()
    for batch, indices in subject.data_batches(dataset, n):
        x_start, inputs = run.given(load(dataset, indices))
        with CORES.followed(run.network) as network:
            given = run.process, partial(network, **inputs), x_start
            columns = [training_losses(*given, *drawn, "mse")["mse"] for drawn in at_levels(subject, batch, x_start)]
        rows.append(torch.stack(columns, 1).cpu().double() * weighting(run))
    found = torch.cat(gather_object(rows))
    if not found.isfinite().all():
        raise UsageError(f"the loss of {run.path} is not finite at all noise levels: its weights are broken")
    return found


@torch.no_grad()
def optimal_losses(subject: Subject, n: int) -> Tensor:
    """The least loss that any network can have on n of the training images at each level, (n, levels)."""
    run, dataset, process = subject.run, subject.dataset, subject.run.process
    every = groups(run, dataset)
    levels, size, chosen = levels_of(process), math.prod(run.config.data.shape), part(len(dataset), n)
    x_start = run.raw(load(dataset, chosen.tolist()))[0]
    noisy = [process.q_sample(x_start, *drawn) for drawn in at_levels(subject, range(n), x_start)]

    def parts() -> Iterator[tuple[Tensor, Tensor]]:
        """All that is trained on, in parts of bounded size."""
        for rows in batches(range(len(dataset)), min(1024, max(1, 2**24 // size))):
            images = run.raw(load(dataset, rows))[0]
            for shown in (images, images.flip(-1)) if run.config.data.random_flip else (images,):
                yield shown.flatten(1).cpu().double(), every[rows]

    # In double precision: where there is little noise, small differences of large numbers decide.
    x_t, own = torch.stack(noisy, 1).cpu().double().flatten(2), every[chosen].repeat_interleave(len(levels))
    alpha, sigma = (torch.from_numpy(process.tables[name][levels]).repeat(n) for name in ("alpha", "sigma"))
    mean = posterior_means(x_t.flatten(0, 1), alpha, sigma, own, parts()).view_as(x_t)
    error = (mean - x_start.cpu().double().flatten(1)[:, None]).square().mean(2)
    return error * torch.from_numpy(process.squared_error(process.prediction)[levels]) * weighting(run)


def earlier(run: Run) -> Iterator[Run]:
    """The run at earlier checkpoints of the same data, with the same average: the last before each of `SHARES`."""
    owner, now = run_of(run.path), run.saved.step
    paths = [path for path in reversed(folders(owner)) if step_of(path) < now] if owner else []
    before = [[path for path in paths if step_of(path) <= share * now] or paths[:1] for share in SHARES if paths]
    for path in sorted({some[-1] for some in before}, key=step_of):
        with suppress(UsageError):  # damaged, or of another average
            one = load_run(path, run.ema)
            if one.saved.data == run.saved.data:
                yield one.to(run.device)


def gap(subject: Subject) -> Score:
    """The mean loss above the least that any network can have, and what follows from it and the held-out loss.

    Held-out images are those of the run or, if it has none, the test images of the data, if they have any.
    """
    check_gap(subject)  # with --every, of each checkpoint
    kept, runs = subject.reference.kept, [*earlier(subject.run), subject.run]
    most = min(subject.n or IMAGES, max(2, VALUES // (LEVELS * math.prod(subject.run.config.data.shape))))
    both = subject.dataset, subject.held_out
    sets = [(images, min(most, len(images))) for images in both if images and len(images) > 1]
    keys = [one.saved.fingerprint(one.ema) for one in runs]
    if "optimal" not in kept:
        kept["optimal"] = optimal_losses(subject, sets[0][1])
    for i in subject.bar(len(runs))(range(len(runs))):
        if keys[i] not in kept:
            kept[keys[i]] = Losses(runs[i].saved.step, *(losses(subject, runs[i], *images) for images in sets))
    result = score([kept[key] for key in keys], kept["optimal"], subject.run.process)
    if (each := len(subject.dataset) / len(groups(subject.run, subject.dataset).unique())) < FEW:
        result.notes.append(f"{each:.1f} images share a class and condition vector on average: little is left to guess")
    return result


def score(history: Sequence[Losses], optimal: Tensor, process: GaussianDiffusion) -> Score:
    """The figures of the last checkpoint of `history`, and in words what follows from all of them."""
    now, log_snr = history[-1], np.log(process.tables["snr"][levels_of(process)].clip(1e-9))  # not infinite
    curves = {"optimal": optimal, "training": now.train} | ({"held-out": now.held_out} if len(now.held_out) else {})
    figures: dict[str, Any] = {"gap_images": [len(now.train), len(now.held_out)], "log_snr": log_snr.tolist()}
    figures["curves"] = {name: values.mean(0).tolist() for name, values in curves.items()}
    for name, values in {"gap": now.train - optimal, **{f"{name} loss": x for name, x in curves.items()}}.items():
        key = name.replace(" ", "_").replace("-", "_")
        figures |= {key: values.mean().item(), f"{key}_interval": 1.96 * error_of(values.mean(1)).item()}
    figures |= found(history, optimal, log_snr)
    losses = ", ".join(f"{name} loss {values.mean():.4f}" for name, values in curves.items())
    line = f"gap {figures['gap']:.4f} +- {figures['gap_interval']:.4f}: {losses}"
    line += f", copied {figures['copied']:.0%}" if "copied" in figures else ""
    line += f"; of {' and '.join(str(len(x)) for x in now[1:] if len(x))} images"
    return Score(figures, [line, figures["advice"]], best="held_out_loss" if len(now.held_out) else None)


def error_of(values: Tensor) -> Tensor:
    """The standard error of the mean over the first axis."""
    return values.std(0) / math.sqrt(len(values))


def found(history: Sequence[Losses], optimal: Tensor, log_snr: np.ndarray) -> dict[str, Any]:
    """What follows for the last checkpoint of `history`: a verdict, advice, and the figures that they rest on."""
    before, now, held_out = history[-2:][0], history[-1], torch.stack([one.held_out for one in history])
    if not held_out.numel():
        return {"verdict": None, "advice": "nothing is held out, which would tell learning from copying: data.held_out"}
    # What held-out images allow: at each level, the losses of the checkpoint where their mean is the lowest.
    allowed = held_out[held_out.mean(1).argmin(0), :, torch.arange(len(log_snr))].T
    share = (allowed.mean() - now.train.mean()) / (allowed.mean() - optimal.mean())
    copied = [is_copied(one.train, allowed, optimal) for one in history]
    best, verdict, since = history[int(held_out.mean((1, 2)).argmin())], None, None
    (fall, certainly), (rise, beyond) = change(before, now), change(best, now)
    if (few := min(len(now.train), len(now.held_out))) < FEWEST:
        words = f"{few} images are too few for a verdict, which needs {FEWEST}"
    elif copied[-1].any():
        verdict, where = "copying", log_snr[copied[-1].numpy()]
        since = next(one.step for one, there in zip(history, copied, strict=True) if there.any())
        words = (
            f"at log SNR {min(where):.1f} to {max(where):.1f}, the training loss is nearer to the optimal one, that of"
        )
        words += f" a copy, than to the lowest held-out loss (since step {since}, of {len(history)} checkpoints)"
        words += f": train on more images{f', or take step {best.step}' if best is not now else ''}"
    elif before is now:
        words = "there is no earlier checkpoint to compare with, so whether it still learns is not known"
    elif fall < 0 and certainly:
        verdict, pace = "still learning", -fall / math.log2(now.step / max(before.step, 1))
        words = f"the held-out loss fell by {-fall:.1%} since step {before.step}; at this pace, twice the steps bring"
        words += f" {pace:.1%} at best: train longer (--train.steps)"
    else:
        verdict = "as good as held-out images allow"
        words = (
            f"risen by {rise:.1%} since step {best.step}"
            if beyond
            else f"not fallen beyond chance since step {before.step}"
        )
        words = f"the held-out loss has {words}: more steps do not help; more images, or another network, may"
    figures: dict[str, Any] = {"copied": share.item(), "copying_since": since, "best_step": best.step}
    return figures | {"verdict": verdict, "advice": f"{verdict}: {words}" if verdict else words}


def change(before: Losses, after: Losses) -> tuple[float, bool]:
    """The relative change of the held-out loss, and whether it is beyond chance. The images and noise are the same."""
    each = (after.held_out - before.held_out).mean(1)
    return (each.mean() / before.held_out.mean()).item(), bool(each.mean().abs() > 1.96 * error_of(each))


def is_copied(train: Tensor, allowed: Tensor, optimal: Tensor) -> Tensor:
    """Levels at which the training loss is nearer to the optimal one than to what held-out images allow, and these
    are apart."""
    ours, theirs = train - optimal / 2, allowed / 2
    error = (error_of(ours) ** 2 + error_of(theirs) ** 2).sqrt()
    return (ours.mean(0) - theirs.mean(0) < -CERTAIN * error) & (optimal.mean(0) < theirs.mean(0))
