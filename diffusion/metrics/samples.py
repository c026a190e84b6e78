"""Metrics of generated images against those of the data, in the features of a network (`--features`)."""

from __future__ import annotations

import hashlib
import importlib
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from diffusion.data.base import part
from diffusion.data.values import to_x_start
from diffusion.errors import UsageError
from diffusion.metrics.base import Reference, Score, Subject
from diffusion.metrics.frechet import frechet_distance

FEW = 2048
"""Below so many images a Fréchet distance mostly measures their number."""
KID_SUBSET, KID_PARTS = 1000, 10
"""Images of a subset: the published number, or a tenth of all. The spread of larger ones, which share images, would be
understated."""
SCORE_PARTS, NEIGHBOURS, ON_SHEET = 10, 3, 16
MEMORISED = 1 / 3
"""A sample is counted as a copy if its nearest image is closer than this share of the distance to the second (Yoon et
al. 2023, "Diffusion probabilistic models generalize when they fail to memorize")."""
LOOKED, SAME = 128, 4 / 127.5
"""How many of the nearest images are looked at for the second nearest that is no duplicate of the nearest, and the root
mean square difference, of 4 levels, below which images are duplicates."""


def frechet(subject: Subject) -> Score:
    """The Fréchet distance (Heusel et al. 2017, eq. 6). Only in Inception's features is it FID."""
    samples, real = subject.features[0], subject.reference.features
    value, least = frechet_distance(samples.numpy(), real.numpy()), max(FEW, samples.shape[1])
    few = min(len(samples), len(real))
    notes = [f"{few} images are few for a Fréchet distance in {samples.shape[1]} features: compare it only at equal "
             f"numbers, and take {least} or more samples and images to publish it"] * (few < least)  # fmt: skip
    network = subject.reference.extractor.name.split(" of ")[0]
    name = "FID" if network.startswith("inception") else f"Fréchet distance in the features of {network}"
    return Score({"frechet": value}, [f"{name}: {value:.4f}"], best="frechet", notes=notes)


def kid(subject: Subject) -> Score:
    """The kernel Inception distance (Binkowski et al. 2018), in the features chosen, over subsets."""
    samples, real = subject.features[0].double(), subject.reference.features.double()
    size = min(KID_SUBSET, min(len(samples), len(real)) // KID_PARTS)
    found = _fidelity("kid").kid_features_to_metric(samples, real, kid_subsets=100, kid_subset_size=size, verbose=False)
    mean, std = (found[f"kernel_inception_distance_{name}"] for name in ("mean", "std"))
    return Score(
        {"kid": mean, "kid_std": std, "subset": size}, [f"KID: {mean:.6f} +- {std:.6f} in subsets of {size}"], "kid"
    )


def inception_score(subject: Subject) -> Score:
    """The Inception score (Salimans et al. 2016), with the classifier of the features chosen."""
    logits = subject.features[1]
    assert logits is not None
    found = _fidelity("isc").isc_features_to_metric(logits, splits=SCORE_PARTS)
    mean, std = (found[f"inception_score_{name}"] for name in ("mean", "std"))
    size, classes = len(logits) // SCORE_PARTS, logits.shape[1]
    notes = [f"parts of {size} samples are few for a score of {classes} classes, which cannot exceed {size}: take "
             f"{10 * SCORE_PARTS * classes} or more to publish it"] * (size < 10 * classes)  # fmt: skip
    line = f"Inception score: {mean:.4f} +- {std:.4f} over {SCORE_PARTS} parts"
    figures = {"inception_score": mean, "inception_score_std": std}
    return Score(figures, [line], "inception_score", higher=True, notes=notes)


def check_classifies(reference: Reference) -> None:
    """Raise UsageError if the network of features is no classifier."""
    check_fidelity(reference)
    if reference.run(reference.images[:1])[1] is None:
        raise UsageError(f"inception_score needs a classifier, and {reference.network} is none: --features classifier")
    if reference.network == "classifier" and len(np.unique(np.asarray(reference.dataset.labels))) < 2:
        raise UsageError("inception_score is how well classes are told apart, and the data have one: leave it out")


def precision_recall(subject: Subject) -> Score:
    """Precision and recall (Kynkäänniemi et al. 2019) by 3 nearest neighbours, of as many real images as samples."""
    samples, real = subject.features[0].double(), subject.reference.features.double()
    samples, real = samples[part(len(samples), len(real))], real[part(len(real), len(samples))]
    precision, recall = _fidelity("prc").calculate_precision_recall_part(samples, real, NEIGHBOURS)
    line = f"precision {precision:.4f}, recall {recall:.4f}, of {len(samples)} samples and as many images"
    figures = {"precision": precision, "recall": recall, "precision_recall_n": len(samples)}
    return Score(figures, [line], "precision", higher=True)


def nearest(subject: Subject) -> Score:
    """The nearest image of the data to each sample, in pixels and in features: is it a copy?

    The sheet has a row for each of the most suspicious samples: the sample, the nearest in pixels, and in features.
    """
    samples, images, features = subject.samples, subject.reference.images, subject.reference.features
    if subject.reference.random_flip:
        features = torch.cat([features, subject.reference.run(images.flip(-1))[0]])
        images = torch.cat([images, images.flip(-1)])
    once = sorted({hashlib.blake2b(image.numpy().tobytes()).digest(): i for i, image in enumerate(images)}.values())
    images, features = images[once], features[once]
    pixels = to_x_start(images).flatten(1)
    ways = {"pixels": (to_x_start(samples).flatten(1), pixels), "features": (subject.features[0], features)}
    figures, lines, found = dict[str, Any](), list[str](), dict[str, tuple[Tensor, Tensor]]()
    for name, (ours, theirs) in ways.items():
        distance, ratio, index = _nearest(ours, theirs, pixels)
        found[name] = ratio, index
        copies, mean = (ratio < MEMORISED).float().mean().item(), distance.mean().item()
        figures |= {f"{name}_distance": mean, f"{name}_copies": copies}
        lines.append(f"nearest image by {name}: mean distance {mean:.4f}; {copies:.1%} of the samples are copies "
                     "(nearer than a third of the distance to the second nearest)")  # fmt: skip
    worst = found["pixels"][0].argsort()[:ON_SHEET]
    rows = [samples[worst], images[found["pixels"][1][worst]], images[found["features"][1][worst]]]
    sheet = rearrange(torch.stack(rows), "k n ... -> (n k) ...")
    used, there = len(subject.reference.images), len(subject.dataset)
    notes = [f"only {used} of the {there} images of the data are searched for copies"] * (used < there)
    return Score(figures, lines, sheet=sheet, headings=["sample", "pixels", "features"], notes=notes)


def _nearest(ours: Tensor, theirs: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each of `ours` (n, D), the distance to the nearest of `theirs` (N, D), its ratio to that to the second
    which is no duplicate of the nearest by its `pixels` (N, P), and the number of the nearest. Each (n,)."""
    found, most = [], min(LOOKED, len(theirs))
    for x in ours.split(max(1, min(256, 2**25 // (most * pixels.shape[1])))):
        distance, index = torch.cdist(x, theirs).topk(most, largest=False)
        other = (pixels[index] - pixels[index[:, :1]]).square().mean(-1) > SAME**2
        other[:, -1] = True
        second = torch.where(other, distance, torch.inf).amin(1)
        found.append((distance[:, 0], distance[:, 0] / second.clamp(min=1e-12), index[:, 0]))
    distances, ratios, indices = (torch.cat(column) for column in zip(*found, strict=True))
    return distances, ratios, indices


def check_fidelity(reference: Reference) -> None:
    """Raise UsageError if torch-fidelity is not installed."""
    _fidelity("kid")


def _fidelity(name: str) -> Any:
    """A module of torch-fidelity. Raises UsageError if it is not installed."""
    try:
        return importlib.import_module(f"torch_fidelity.metric_{name}")
    except ImportError:
        raise UsageError("this metric needs a package: pip install torch-fidelity") from None
