"""Training from Python, without a file of settings."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffusion.config.files import find_config, read_yaml
from diffusion.config.schema import by_section, config_of, override
from diffusion.data.base import ArrayDataset
from diffusion.data.conditions import NO_VECTORS, vectors_of
from diffusion.data.values import to_x_start
from diffusion.errors import UsageError
from diffusion.training.trainer import Trainer


def trainer_for(data: Any, out: str | Path, settings: Mapping[str, Any], config: str | Path | None) -> Trainer:
    """A run on images from Python (see `diffusion.train`)."""
    if not out:
        raise UsageError("out is empty: name the run's folder")
    base: dict[str, dict[str, Any]] = {} if config is None else read_yaml(find_config(str(config)))
    sections: dict[str, dict[str, Any]] = {"data": {}, "model": {}, **by_section(settings)}
    dataset = None if isinstance(data, str | Path) else images_of(data)
    if dataset is None:
        sections["data"] = {"source": "folder", "path": str(data)} | sections["data"]
        sections["model"].setdefault("class_cond", base.get("model", {}).get("class_cond", False))
    else:
        shape = dataset.images.shape
        found = {"source": "memory", "image_size": shape[2:], "condition_channels": dataset.condition_channels}
        found["channels"] = shape[1] - dataset.condition_channels
        if shape[1:] == (shape[-1],) * 2:
            what = f"data is {tuple(shape)}, signals of {shape[1]} channels; grey images are (N, 1, height, width)"
            warnings.warn(what, stacklevel=3)
        if dataset.vectors.widths and "conditions" in sections["data"]:
            raise UsageError("data.conditions names a file, and data from Python have columns, too: leave one out")
        if same := found.keys() & sections["data"].keys():
            raise UsageError(f"data.{min(same)} is that of the images, which are {tuple(shape)}: leave it out")
        sections["data"] |= found
        sections["model"].setdefault("class_cond", bool(dataset.class_names))
    override(base, sections)
    return Trainer(config_of(base).resolved(), Path(out), warnings.warn, dataset)


def images_of(data: Any) -> ArrayDataset:
    """Images in memory: of a tensor (N, C, *sizes), a pair of it and labels (N,), a map-style data set of pairs, or a
    mapping of `images`, and if any `labels`, condition images as `image`, and columns of condition vectors.

    Raises UsageError if they are something else."""
    columns, extra = dict[str, Any](), 0
    try:
        if isinstance(data, Mapping):
            given = {name: values for name, values in data.items() if name not in ("images", "labels", "image")}
            columns = {name: np.atleast_1d(torch.as_tensor(values).detach()) for name, values in given.items()}
            parts = [torch.as_tensor(data[name]) for name in ("images", "image") if name in data]
            extra = parts[1].shape[1] if "image" in data else 0
            parts = parts if len({part.dtype for part in parts}) == 1 else [to_x_start(part) for part in parts]
            data = torch.cat(parts, dim=1), data.get("labels")
        if not isinstance(data, tuple | torch.Tensor | np.ndarray):  # a data set
            items = [data[i] for i in range(len(data))]
            data = torch.stack([torch.as_tensor(image) for image, _ in items]), [label for _, label in items]
        images, labels = data if isinstance(data, tuple) else (data, None)
        images = torch.as_tensor(images).detach()
        numbers = torch.zeros(len(images)) if labels is None else torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError, LookupError) as error:
        raise UsageError(f"data is not images (N, C, *sizes), or pairs of an image and a label: {error}") from None
    within = images.dtype == torch.uint8 or (images.is_floating_point() and (images.abs() <= 1).all())
    if images.ndim < 3 or not images.numel() or not within or numbers.shape != images.shape[:1]:
        what = f"{images.dtype} {tuple(images.shape)} with labels {tuple(numbers.shape)}"
        raise UsageError(f"data is {what}; it must be (N, C, *sizes), uint8 or float in [-1, 1], and labels (N,)")
    values, index = torch.unique(numbers, return_inverse=True)
    names = () if labels is None else tuple(map(str, values.tolist()))
    vectors = vectors_of(columns, "data", [f"number {i}" for i in range(len(images))]) if columns else NO_VECTORS
    images, about = images if images.dtype == torch.uint8 else images.float(), dict[str, Any](vectors=vectors)
    return ArrayDataset(images, index, names, **about, condition_channels=extra)
