"""Metrics of generated images against those of the data, in the features of a network (`--features`)."""

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from diffusion.data.base import digest, part
from diffusion.data.values import to_x_start
from diffusion.errors import UsageError
from diffusion.metrics.base import Score, Subject
from diffusion.metrics.features import check_fidelity

FEW = 2048
"""With fewer samples, finite-sample bias dominates the Fréchet distance."""
KID_SUBSET, KID_PARTS = 1000, 10
"""Images of a subset: the published number, or a tenth of all. Larger subsets overlap, which understates the standard
deviation."""
SCORE_PARTS, NEIGHBOURS, ON_SHEET = 10, 3, 16
MEMORISED = 1 / 3
"""A sample counts as a copy if its nearest image is closer than this share of the distance to the second nearest (Yoon
et al. 2023, "Diffusion probabilistic models generalize when they fail to memorize")."""
CANDIDATES, DUPLICATE = 128, 4 / 127.5
"""How many of the nearest images are searched for the second nearest, and the root mean square difference (4 levels)
below which an image is a duplicate of the nearest."""


def frechet(subject: Subject) -> Score:
    """The Fréchet distance (Heusel et al. 2017, eq. 6). Only in Inception's features is it FID."""
    samples, real = subject.features[0], subject.reference.features
    value, dimension = frechet_distance(samples.numpy(), real.numpy()), real.shape[1]
    notes = _few(min(len(samples), len(real)), max(FEW, dimension), f"a Fréchet distance in {dimension} features")
    network = subject.reference.extractor.name.split(" of ")[0]
    name = "FID" if network.startswith("inception") else f"Fréchet distance in the features of {network}"
    return Score({"frechet": value}, [f"{name}: {value:.4f}"], best="frechet", notes=notes)


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The squared distance between the Gaussians fitted to two sets of features (N, D) (Heusel et al., eq. 6)."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # The product of two positive semi-definite matrices has real eigenvalues of at least 0, up to rounding.
    root = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).real.clip(0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * root)


def _few(n: int, least: int, what: str) -> list[str]:
    return [f"{n} images are few for {what}: use {least} or more"] if n < least else []


def kid(subject: Subject) -> Score:
    """The kernel Inception distance (Binkowski et al. 2018), in the features chosen, over subsets."""
    from torch_fidelity.metric_kid import kid_features_to_metric

    samples, real = subject.features[0].double(), subject.reference.features.double()
    size = min(KID_SUBSET, min(len(samples), len(real)) // KID_PARTS)
    result = kid_features_to_metric(samples, real, kid_subsets=100, kid_subset_size=size, verbose=False)
    mean, std = (result[f"kernel_inception_distance_{name}"] for name in ("mean", "std"))
    line = f"KID: {mean:.6f} +- {std:.6f} in subsets of {size}"
    return Score({"kid": mean, "kid_std": std, "subset": size}, [line], best="kid")


def inception_score(subject: Subject) -> Score:
    """The Inception score (Salimans et al. 2016), with the classifier of the features chosen."""
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = subject.features[1]
    assert logits is not None  # by `check_classifies`
    result = isc_features_to_metric(logits, splits=SCORE_PARTS)
    mean, std = (result[f"inception_score_{name}"] for name in ("mean", "std"))
    classes = logits.shape[1]
    notes = _few(len(logits), 10 * SCORE_PARTS * classes, f"an Inception score of {classes} classes")
    line = f"Inception score: {mean:.4f} +- {std:.4f} over {SCORE_PARTS} parts"
    figures = {"inception_score": mean, "inception_score_std": std}
    return Score(figures, [line], best="inception_score", higher=True, notes=notes)


def precision_recall(subject: Subject) -> Score:
    """Precision and recall (Kynkäänniemi et al. 2019) by 3 nearest neighbours, of as many real images as samples."""
    from torch_fidelity.metric_prc import calculate_precision_recall_part

    samples, real = subject.features[0].double(), subject.reference.features.double()
    samples, real = samples[part(len(samples), len(real))], real[part(len(real), len(samples))]
    precision, recall = calculate_precision_recall_part(samples, real, NEIGHBOURS)
    line = f"precision {precision:.4f}, recall {recall:.4f}, of {len(samples)} samples and as many images"
    figures = {"precision": precision, "recall": recall, "precision_recall_n": len(samples)}
    return Score(figures, [line], best="precision", higher=True)


def nearest(subject: Subject) -> Score:
    """The distance of each sample to the nearest image of the data, in pixels and in features, and the share of copies.

    A row of the sheet is a sample, its nearest image in pixels, and that in features, the likeliest copies first.
    """
    reference, samples = subject.reference, subject.samples
    images, features = reference.images, reference.features
    if reference.random_flip:
        features = torch.cat([features, reference.run(images.flip(-1))[0]])
        images = torch.cat([images, images.flip(-1)])
    distinct = sorted({digest(image.numpy()): i for i, image in enumerate(images)}.values())
    images, features = images[distinct], features[distinct]
    pixels = to_x_start(images).flatten(1)
    spaces = {"pixels": (to_x_start(samples).flatten(1), pixels), "features": (subject.features[0], features)}
    nearest = {name: _nearest(x, points, pixels) for name, (x, points) in spaces.items()}
    figures, lines = dict[str, float](), list[str]()
    for name, (distance, ratio, _) in nearest.items():
        mean, copies = distance.mean().item(), (ratio < MEMORISED).float().mean().item()
        figures |= {f"{name}_distance": mean, f"{name}_copies": copies}
        lines.append(f"nearest image by {name}: mean distance {mean:.4f}; {copies:.1%} of the samples are copies")
    worst = nearest["pixels"][1].argsort()[:ON_SHEET]
    rows = torch.stack([samples[worst], *(images[index[worst]] for _, _, index in nearest.values())])
    searched, total = len(reference.images), len(subject.dataset)
    notes = [f"only {searched} of {total} images are searched for copies"] if searched < total else []
    sheet = rearrange(rows, "k n ... -> (n k) ...")
    return Score(figures, lines, sheet=sheet, headings=["sample", "pixels", "features"], notes=notes)


def _nearest(x: Tensor, points: Tensor, pixels: Tensor) -> tuple[Tensor, ...]:
    """For each of `x` (n, D): the distance to the nearest of `points` (N, D), its ratio to the distance to the second
    nearest that is not a duplicate by its `pixels` (N, P), and the index of the nearest. Each is (n,)."""
    results, k = [], min(CANDIDATES, len(points))
    for batch in x.split(max(1, min(256, 2**25 // (k * pixels.shape[1])))):
        distance, index = torch.cdist(batch, points).topk(k, largest=False)
        distinct = (pixels[index] - pixels[index[:, :1]]).square().mean(-1) > DUPLICATE**2
        distinct[:, -1] = True
        second = torch.where(distinct, distance, torch.inf).amin(1)
        results.append((distance[:, 0], distance[:, 0] / second.clamp(min=1e-12), index[:, 0]))
    return tuple(torch.cat(column) for column in zip(*results, strict=True))


def check_classifies(subject: Subject) -> None:
    """Raise UsageError if the network of features is not a classifier, or the data have one class."""
    check_fidelity()
    reference = subject.reference
    if reference.run(reference.images[:1])[1] is None:
        raise UsageError(f"inception_score needs a classifier, and {reference.network} is not: --features classifier")
    if reference.network == "classifier" and len(np.unique(np.asarray(reference.dataset.labels))) < 2:
        raise UsageError("inception_score needs data of several classes, and these have one")
