"""How a run starts: what a continued one may change, and the weights of another that a new one copies."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.config.fields import shown
from diffusion.config.schema import Config
from diffusion.errors import UsageError, name_some, options_of
from diffusion.optimizers import LR_SCHEDULES
from diffusion.run.checkpoint import Checkpoint, misfits, newest
from diffusion.run.folder import check_is_run

RESUMABLE = {f"data.{name}" for name in ("path", "conditions", "condition_images", "workers", "allow_change")}
RESUMABLE |= {f"train.{name}" for name in ("steps", "gradient_accumulation", "lr", "lr_schedule", "scalar_lr_factor")}
RESUMABLE |= {f"train.{name}" for name in ("warmup_steps", "weight_decay", "grad_clip", "precision", "compile")}
RESUMABLE |= {f"train.{name}" for name in ("ema_warmup", "log_every", "log_with", "max_skipped")}
RESUMABLE |= {f"train.{option}" for schedule in LR_SCHEDULES.values() for option in options_of(schedule)}
RESUMABLE |= {"data.on_error", "model.use_checkpoint"}
"""Settings that a continued run may change, beside those of the sections sample and checkpoint. Any other would make it
a different run."""
CLASSES = {"label_emb.weight", "y_embedder.embedding_table.weight"}
"""The tables of classes."""
PROCESS = "steps", "schedule", "zero_terminal_snr", "prediction", "variance", "rescale_timesteps", "s_max"
"""Settings of the process that change the meaning of weights."""


def continued_config(saved: Checkpoint, now: Config, out: Path) -> Config:
    """The configuration to continue with. Raises UsageError if it would make `out` a different run."""
    if saved.step == 0:
        raise UsageError(f"--out {out} is a converted model: begin with --train.init_from {out} --out NEW")
    if now.train.init_from is None:  # it matters no more
        now = dataclasses.replace(now, train=dataclasses.replace(now.train, init_from=saved.config.train.init_from))
    if now.train.steps < saved.step:
        raise UsageError(f"train.steps is {now.train.steps}, and {out} has done {saved.step}")
    for key, change in _differences(saved.config.flat(), now.flat()).items():
        if key not in RESUMABLE and not key.startswith(("sample.", "checkpoint.")):
            raise UsageError(f"{change}, in the run {out}: set it back, or --train.init_from {out} --out NEW")
    return now


def changes(saved: Checkpoint, now: Config, environment: Mapping[str, Any]) -> list[str]:
    """Messages about what has changed since `saved` was written: settings, and what rounding depends on."""
    before = {"precision": saved.config.train.precision or "no", **saved.environment}
    settings, rounding = _differences(saved.config.flat(), now.flat()), _differences(before, environment)
    messages = {f"changed since step {saved.step}": settings, "the run continues with other rounding": rounding}
    return [f"{what}: {'; '.join(changed.values())}" for what, changed in messages.items() if changed]


def _differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, str]:
    """What has changed, in words, of each value that differs."""
    changed = [key for key, value in after.items() if before.get(key) != value]
    return {key: f"{key} was {shown(before.get(key))} and is {shown(after[key])}" for key in changed}


@torch.no_grad()
def start_from(path: Path, network: nn.Module, config: Config, classes: Sequence[str]) -> tuple[Checkpoint, list[str]]:
    """Copy those weights of a run, checkpoint or converted model into `network` whose name and shape fit.

    Class embeddings are copied by class name. Returns the checkpoint, and messages: what did not fit, and which
    settings change the meaning of the weights. Raises UsageError if nothing fits.
    """
    check_is_run(path)
    source, weights = newest(path, Checkpoint.weights)
    own, differ = network.state_dict(), misfits(network, weights)
    matter = {f"model.{name}" for name in vars(config.model)} | {f"diffusion.{name}" for name in PROCESS}
    matter -= {f"model.{name}" for name in (*config.model.compute_only, "class_cond")}
    if source.config.model.network != config.model.network:  # the settings of each are nothing to the other
        matter = {key for key in matter if not key.startswith("model.")} | {"model.network"}
    changed = _differences(source.config.flat(), config.flat())
    settings = "; ".join(change for key, change in changed.items() if key in matter)
    fit = own.keys() - differ.keys() - CLASSES
    if not any(own[name].ndim > 1 for name in fit):
        hint = f"take its settings too, with --config {source.path / 'config.yaml'}"
        raise UsageError(f"train.init_from: no weight of {source.path} fits ({settings}): {hint}")
    done, steps = source.step, source.config.train.steps
    unfinished = f"it has done {done} of {steps} steps" if 0 < done < steps else ""
    if config.is_consistency_model and (why := unfinished or settings or "; ".join(differ.values())):
        right = "a consistency run goes on from a finished run of the same network and process"
        raise UsageError(f"train.init_from is {source.path}, and {right}: {why}")
    for name in fit:
        own[name].copy_(weights[name])
    tables = {name: (own[name], weights.get(name)) for name in CLASSES & own.keys()}
    notes = [note for pair in tables.values() for note in _copy_classes(*pair, source.class_names, classes)]
    if fresh := [name for name in own if name in differ and name not in CLASSES]:
        share = sum(own[name].numel() for name in fresh) / sum(value.numel() for value in own.values())
        texts = [differ[name] for name in fresh]
        notes.append(name_some(texts, f"of {len(own)} weights begin anew ({share:.1%} of the parameters)"))
    if unused := sorted(weights.keys() - own.keys()):
        notes.append(name_some(unused, f"of its {len(weights)} weights are unused"))
    if settings:
        notes.append(f"its weights were trained under other settings: {settings}")
    return source, [f"train.init_from: {note}" for note in notes]


def _copy_classes(table: Tensor, source: Tensor | None, known: Sequence[str], names: Sequence[str]) -> list[str]:
    """Copy the embeddings of classes that both have, and of no class, if both have a row for it."""
    if source is None or source.shape[1:] != table.shape[1:]:
        return [f"the {len(names)} classes begin anew: its weights have no embeddings of them"]
    if len(table) > len(names) and len(source) > len(known):
        table[-1].copy_(source[-1])
    # Of a converted model, the names are unknown.
    by_number = list(known) == [str(i) for i in range(len(names))] and set(names) != set(known)
    known = names if by_number else known
    for i, name in enumerate(names):
        if name in known:
            table[i].copy_(source[known.index(name)])
    if new := [name for name in names if name not in known]:
        return [name_some(new, f"of {len(names)} classes are new and begin anew")]
    return [f"{len(names)} classes are taken over by number, since it has no names"] if by_number else []


def origin_of(saved: Checkpoint) -> dict[str, object]:
    """The record of the weights that a run was initialised with."""
    name = str(saved.chosen())
    return {"path": str(saved.path.resolve()), "step": saved.step, "file": name, "sha256": saved.sums[name]}
