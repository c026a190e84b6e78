"""Networks that compute the features of images, by name."""

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion.data.base import DataSet, load, part
from diffusion.data.loader import batch_indices
from diffusion.data.values import to_uint8, to_x_start
from diffusion.errors import UsageError, refusing
from diffusion.files.atomic import sha256

CLASSIFIER_IMAGES, CLASSIFIER_STEPS = 20_000, 500
"""The most images that the classifier is trained on, and its optimizer steps."""


class Extractor(NamedTuple):
    """A function from images (N, C, *sizes) in [-1, 1] to features (N, D) and, if it classifies, logits (N, K)."""

    name: str
    run: Callable[[Tensor], tuple[Tensor, Tensor | None]]


def check_fidelity(subject: object = None) -> None:
    """Raise UsageError if torch-fidelity is not installed."""
    if importlib.util.find_spec("torch_fidelity") is None:
        raise UsageError("the package torch-fidelity is not installed: pip install torch-fidelity")


def pixels(dataset: DataSet, device: torch.device, weights: Path | None) -> Extractor:
    """The pixels, averaged until an image has at most 8 values along an axis."""

    def run(x: Tensor) -> tuple[Tensor, None]:
        return F.interpolate(x, [min(8, size) for size in x.shape[2:]], mode="area").flatten(1), None

    return Extractor("pixels (at most 8 an axis)", run)


def classifier(dataset: DataSet, device: torch.device, weights: Path | None) -> Extractor:
    """A small classifier, trained on the data and their classes. Equal data give equal weights."""
    if not dataset.class_names or load(dataset, [0]).images.ndim != 4:
        raise UsageError("--features is classifier, which needs images with classes: use pixels or inception")
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:CLASSIFIER_IMAGES]
    batch, classes = load(dataset, order.tolist()), len(dataset.class_names)
    net = fit_classifier(to_x_start(batch.images), batch.labels, classes, 64, CLASSIFIER_STEPS).to(device)
    spread = net[:-1](to_x_start(load(dataset, part(len(dataset), 1000).tolist()).images).to(device)).std()

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        features = net[:-1](x)
        return features / spread, net[-1](features)

    return Extractor(f"classifier of {dataset.fingerprint()}", run)


def fit_classifier(x: Tensor, y: Tensor, classes: int, features: int, steps: int) -> nn.Sequential:
    """A convolutional classifier of about 100,000 weights, fitted to images `x` (N, C, H, W) and classes `y` (N,).

    Its last layer maps `features` values to the logits.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers, width, sizes = [nn.Conv2d(x.shape[1], 32, 3, padding=1), nn.ReLU()], 32, list(x.shape[2:])
        while max(sizes) > 4:
            layers += [nn.Conv2d(width, 64, 3, stride=2, padding=1), nn.ReLU()]
            width, sizes = 64, [math.ceil(size / 2) for size in sizes]
        layers += [nn.Flatten(), nn.Linear(width * math.prod(sizes), features), nn.ReLU()]
        net = nn.Sequential(*layers, nn.Linear(features, classes))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    for step in range(steps):
        batch = batch_indices(len(x), 64, 0, step)
        F.cross_entropy(net(x[batch]), y[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return net.eval().requires_grad_(False)


def inception(dataset: DataSet, device: torch.device, weights: Path | None) -> Extractor:
    """The Inception network of FID, through torch-fidelity. Grey images become RGB."""
    check_fidelity()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    where = "downloaded: add --features_weights FILE" if weights is None else f"read from {weights}"
    with refusing(lambda reason: f"Inception's weights cannot be {where} ({reason})"):
        if weights is not None:
            torch.load(weights, weights_only=True, map_location="meta")  # torch-fidelity would run code in the file
        net = FeatureExtractorInceptionV3("", ["2048", "logits_unbiased"], weights and str(weights)).to(device)

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        if x.ndim != 4 or x.shape[1] not in (1, 3):
            raise UsageError(f"images of {tuple(x.shape[1:])} are neither grey nor RGB: use --features pixels")
        return net(to_uint8(x).expand(-1, 3, -1, -1))

    return Extractor("inception" if weights is None else f"inception of {sha256(weights)[:16]}", run)


FEATURES: dict[str, Callable[..., Extractor]] = {"classifier": classifier, "pixels": pixels, "inception": inception}
