"""Initialising a run with the weights of another: what fits is copied, what does not is listed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from diffusion.config.fields import plain
from diffusion.config.schema import Config
from diffusion.errors import UsageError
from diffusion.models.unet import UNetModel
from diffusion.run.checkpoint import Checkpoint, Weights, open_weights
from diffusion.run.folder import check_is_run

CLASSES = "label_emb.weight"
MEANING = {
    "model": ("model_channels", "num_res_blocks", "channel_mult", "attention_resolutions", "num_heads",
              "num_heads_upsample", "num_head_channels", "use_new_attention_order", "use_norm", "use_scale_shift_norm",
              "conv_resample", "resblock_updown"),
    "diffusion": ("steps", "schedule", "zero_terminal_snr", "prediction", "variance", "rescale_timesteps"),
}  # fmt: skip
"""Settings that change the shape, place or meaning of weights."""


def start_from(
    path: Path, network: UNetModel, config: Config, class_names: Sequence[str]
) -> tuple[Checkpoint, list[str]]:
    """Copy the weights of a run, checkpoint or converted model (see `copy_weights`). Returns it, and messages."""
    check_is_run(path)
    source, weights = open_weights(path)
    return source, copy_weights(network, weights, source, config, class_names)


@torch.no_grad()
def copy_weights(
    network: UNetModel, weights: Weights, saved: Checkpoint, config: Config, class_names: Sequence[str]
) -> list[str]:
    """Copy those `weights` of `saved` into `network` whose name and shape fit.

    Class embeddings are copied by class name. Returns messages: what did not fit, and which settings change the meaning
    of the weights. Raises UsageError if nothing fits.
    """
    mine = network.state_dict()
    fit = {name for name, value in mine.items() if name in weights and weights[name].shape == value.shape} - {CLASSES}
    differ = [f"{section}.{name} was {plain(before)} and is {plain(after)}"
              for section, names in MEANING.items() for name in names
              if (before := getattr(getattr(saved.config, section), name))
              != (after := getattr(getattr(config, section), name))]  # fmt: skip
    if not any(mine[name].ndim > 1 for name in fit):
        file = saved.path / "config.yaml"
        raise UsageError(f"train.init_from is {saved.path}, and none of its weights fit this network "
                         f"({'; '.join(differ)}): take its settings too, with --config {file}")  # fmt: skip
    for name in fit:
        mine[name].copy_(weights[name])
    notes = []
    misfits = [f"{name} is {tuple(weights[name].shape) if name in weights else 'missing'} there and "
               f"{tuple(value.shape)} here" for name, value in mine.items() if name not in fit | {CLASSES}]  # fmt: skip
    if CLASSES in mine:
        notes += _copy_classes(mine[CLASSES], weights, saved.class_names, class_names)
    unused = sorted(weights.keys() - mine.keys())
    anew = sum(mine[name].numel() for name in mine.keys() - fit - {CLASSES})
    share = f" ({100 * anew / sum(value.numel() for value in mine.values()):.1f}% of the parameters)"
    for what, names in ((f"begin anew{share}", misfits), ("of it have no place here", unused)):
        if names:
            more = f"; and {len(names) - 3} more" if len(names) > 3 else ""
            notes.append(f"train.init_from: {len(names)} of {len(mine)} weights {what}: {'; '.join(names[:3])}{more}")
    if differ:
        notes.append(f"train.init_from: its weights were trained under other settings: {'; '.join(differ)}")
    rate = config.train.averages[0]
    if not config.train.ema_warmup and isinstance(rate, float) and rate > 0.99:
        notes.append(f"the average at {rate} follows the weights within some {round(1 / (1 - rate))} steps: until then "
                     "grids show the old network (--train.ema_warmup true follows at once)")  # fmt: skip
    return notes


def _copy_classes(table: torch.Tensor, weights: Weights, theirs: Sequence[str], names: Sequence[str]) -> list[str]:
    """Copy the embeddings of classes that both have."""
    there = weights.get(CLASSES)
    if there is None or there.shape[1:] != table.shape[1:]:
        return [f"train.init_from: the {len(names)} classes begin anew: there are no embeddings of them there"]
    numbers = list(theirs) == [str(i) for i in range(len(names))]  # a converted model, whose names are unknown
    rows = {name: theirs.index(name) for name in names if name in theirs}
    if numbers and set(names) != set(theirs):
        rows = {name: i for i, name in enumerate(names)}
    for i, name in enumerate(names):
        if name in rows:
            table[i].copy_(there[rows[name]])
    if len(rows) == len(names):
        unnamed = numbers and set(names) != set(theirs)
        return [f"train.init_from: {len(names)} classes are taken over by number, since it has no names"] * unnamed
    new = [name for name in names if name not in rows]
    more = f", and {len(new) - 10} more" if len(new) > 10 else ""
    return [f"train.init_from: {len(new)} of {len(names)} classes are new and begin anew: {', '.join(new[:10])}{more}"]


def origin_of(saved: Checkpoint) -> dict[str, object]:
    """The record of the weights that a run was initialised with."""
    name = str(saved.chosen())
    return {"path": str(saved.path.resolve()), "step": saved.step, "file": name, "sha256": saved.sums[name]}
