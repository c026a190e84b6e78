"""How good a model is: bits per dimension of held-out images, and a Fréchet distance of samples to the training images.

The distance looks through a small classifier that is trained here on the same images, so it compares models of one data
set with each other and is no FID. Every tenth image is held out of everything but the scores.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.config.schema import Config
from diffusion.data.base import load, open_data
from diffusion.data.values import to_uint8, to_x_start
from diffusion.losses import training_losses
from diffusion.metrics.features import fit_classifier
from diffusion.metrics.samples import frechet_distance
from diffusion.run.loaded import Run

HELD_OUT_EVERY, DRAWS, BATCH = 10, 2880, 250


class Judge:
    """Images of a configuration's data set, split, and a classifier of them.

    Attributes:
        train, held_out: images (N, C, *sizes) in [-1, 1] and their labels.
        accuracy: of the classifier, on held-out images.
    """

    def __init__(self, config: Config, limit: int = 60_000):
        dataset = open_data(config.data)
        images, labels, *_ = load(dataset, range(min(len(dataset), limit)))
        x, out = to_x_start(images), torch.arange(len(images)) % HELD_OUT_EVERY == 0
        self.classes = len(dataset.class_names)
        self.train, self.held_out = (x[~out], labels[~out]), (x[out], labels[out])
        self.net, self.accuracy = self._classifier()
        self.real = self._features(self.train[0])

    def _classifier(self) -> tuple[nn.Sequential, float]:
        (x, y), (held_x, held_y) = self.train, self.held_out
        net = fit_classifier(x, y, self.classes, 32, max(1000, 3 * len(x) // 64))
        right = [net(part).argmax(1) == labels for part, labels in zip(held_x.split(BATCH), held_y.split(BATCH),
                                                                       strict=True)]  # fmt: skip
        return net[:-1], torch.cat(right).float().mean().item()

    def _features(self, x: Tensor) -> Tensor:
        return torch.cat([self.net(part) for part in x.split(BATCH)])

    def distance(self, x: Tensor) -> float:
        """The Fréchet distance of images (N, C, *sizes) in [-1, 1], as they are in 8 bits, to the training images."""
        scale = self.real.std()
        mine = self._features(to_x_start(to_uint8(x)))
        return frechet_distance((mine / scale).numpy(), (self.real / scale).numpy())

    def bits_per_dim(self, config: Config, network: nn.Module) -> float:
        """The variational bound on held-out images, without its constant end: a mean over `DRAWS` timesteps, evenly
        spaced, each with an image and noise that are the same for every model."""
        process, (x, y) = config.diffusion.process(), self.held_out
        generator = torch.Generator().manual_seed(0)
        t = (torch.arange(DRAWS) * process.num_timesteps // DRAWS)[torch.randperm(DRAWS, generator=generator)]
        terms = []
        for part in torch.arange(DRAWS).split(BATCH):
            images = x[part % len(x)]
            noise = torch.randn(images.shape, generator=generator)
            denoiser = partial(network, y=y[part % len(x)]) if config.model.class_cond else network
            with torch.no_grad():
                terms.append(training_losses(process, denoiser, images, t[part], noise, "rescaled_kl")["loss"])
        return torch.cat(terms).mean().item()

    def samples(self, config: Config, network: nn.Module, n: int, seed: int = 0, **sample: Any) -> Tensor:
        """`n` images of a model, with the settings `sample` in place of its own."""
        names = tuple(map(str, range(self.classes))) if config.model.class_cond else ()
        return Run(config, network, names).sample(n, batch_size=BATCH, seed=seed, **sample)
