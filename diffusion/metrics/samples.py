"""Metrics of generated images against those of the data, in the features of a network (`--features`)."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from diffusion.data.decode import to_x_start
from diffusion.data.summary import evenly
from diffusion.errors import UsageError
from diffusion.metrics.base import Score, Subject
from diffusion.metrics.frechet import frechet_distance

FEW = 2048
"""Below so many images a Fréchet distance mostly measures their number."""
KID_SUBSET, NEIGHBOURS, ON_SHEET = 1000, 3, 16
MEMORISED = 1 / 3
"""A sample is counted as a copy if its nearest image is closer than this share of the distance to the second (Yoon et
al. 2023, "Diffusion probabilistic models generalize when they fail to memorize")."""


def frechet(subject: Subject) -> Score:
    """The Fréchet distance (Heusel et al. 2017, eq. 6). Only in Inception's features is it FID."""
    samples, real = subject.features[0], subject.reference.features
    value, least = frechet_distance(samples.numpy(), real.numpy()), max(FEW, samples.shape[1])
    notes = [f"{len(samples)} samples are few for a Fréchet distance in {samples.shape[1]} features: compare it with "
             f"the same number only, and take {least} or more to publish it"] * (len(samples) < least)  # fmt: skip
    network = subject.reference.extractor.name
    name = "FID" if network.startswith("inception") else f"Fréchet distance in the features of {network}"
    return Score({"frechet": value}, [f"{name}: {value:.4f}", *notes], best="frechet")


def kid(subject: Subject) -> Score:
    """The kernel Inception distance (Binkowski et al. 2018), in the features chosen, over subsets."""
    samples, real = subject.features[0].double(), subject.reference.features.double()
    size = min(KID_SUBSET, len(samples), len(real))
    found = _fidelity("kid").kid_features_to_metric(samples, real, kid_subsets=100, kid_subset_size=size, verbose=False)
    mean, std = (found[f"kernel_inception_distance_{name}"] for name in ("mean", "std"))
    return Score(
        {"kid": mean, "kid_std": std, "subset": size}, [f"KID: {mean:.6f} +- {std:.6f} in subsets of {size}"], "kid"
    )


def inception_score(subject: Subject) -> Score:
    """The Inception score (Salimans et al. 2016), with the classifier of the features chosen."""
    network, logits = subject.reference.extractor.name, subject.features[1]
    if logits is None:
        raise UsageError(
            f"inception_score needs a classifier, and {network} is none: --features inception or classifier"
        )
    found = _fidelity("isc").isc_features_to_metric(logits)
    mean, std = (found[f"inception_score_{name}"] for name in ("mean", "std"))
    line = f"Inception score: {mean:.4f} +- {std:.4f} over 10 parts"
    return Score({"inception_score": mean, "inception_score_std": std}, [line], "inception_score", higher=True)


def precision_recall(subject: Subject) -> Score:
    """Precision and recall (Kynkäänniemi et al. 2019) by 3 nearest neighbours, of as many real images as samples."""
    samples, real = subject.features[0].double(), subject.reference.features.double()
    real = real[evenly(len(real), len(samples))]
    if min(len(real), len(samples)) <= NEIGHBOURS:
        raise UsageError(f"precision_recall needs more than {NEIGHBOURS} samples and images: there are {len(samples)} "
                         f"and {len(real)}")  # fmt: skip
    precision, recall = _fidelity("prc").calculate_precision_recall_full(samples, real, NEIGHBOURS)
    return Score({"precision": precision, "recall": recall}, [f"precision {precision:.4f}, recall {recall:.4f}"],
                 "precision", higher=True)  # fmt: skip


def nearest(subject: Subject) -> Score:
    """The nearest image of the data to each sample, in pixels and in features: is it a copy?

    The sheet has a row for each of the most suspicious samples: the sample, the nearest in pixels, and in features.
    """
    samples, images = subject.samples, subject.reference.images
    ways = {"pixels": (to_x_start(samples).flatten(1), to_x_start(images).flatten(1)),
            "features": (subject.features[0], subject.reference.features)}  # fmt: skip
    figures, lines, found = dict[str, Any](), list[str](), dict[str, tuple[Tensor, Tensor]]()
    for name, (ours, theirs) in ways.items():
        parts = [torch.cdist(part, theirs).topk(min(2, len(theirs)), largest=False) for part in ours.split(256)]
        distance, index = torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])
        ratio = distance[:, 0] / distance[:, -1].clamp(min=1e-12)
        found[name] = ratio, index[:, 0]
        copies, mean = (ratio < MEMORISED).float().mean().item(), distance[:, 0].mean().item()
        figures |= {f"{name}_distance": mean, f"{name}_copies": copies}
        lines.append(f"nearest image by {name}: mean distance {mean:.4f}; {copies:.1%} of the samples are copies "
                     "(nearer than a third of the distance to the second nearest)")  # fmt: skip
    worst = found["pixels"][0].argsort()[:ON_SHEET]
    rows = [samples[worst], images[found["pixels"][1][worst]], images[found["features"][1][worst]]]
    sheet = rearrange(torch.stack(rows), "k n ... -> (n k) ...")
    return Score(figures, lines, "pixels_copies", sheet=sheet, headings=["sample", "pixels", "features"])


def _fidelity(name: str) -> Any:
    """A module of torch-fidelity. Raises UsageError if it is not installed."""
    try:
        return importlib.import_module(f"torch_fidelity.metric_{name}")
    except ImportError:
        raise UsageError("this metric needs a package: pip install torch-fidelity") from None
