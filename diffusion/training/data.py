"""The data of a run: opened, divided, and compared with those that the run began with."""

from __future__ import annotations

import dataclasses
import json
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from accelerate import Accelerator

from diffusion.config.schema import Config
from diffusion.data.base import DataSet, count_seen, hold_out, open_data
from diffusion.data.sources.folder import Folder
from diffusion.data.summary import describe_data
from diffusion.errors import UsageError
from diffusion.parallel.launchers import check_agreed
from diffusion.run.checkpoint import Checkpoint

COMPARED_BYTES = 2**30
"""Files of this size in all, or data in memory, are compared with what is held out of them when a run begins."""


class RunData(NamedTuple):
    """What a run trains on, what it holds out, if anything, both together, its classes, and a number that other data do
    not have."""

    dataset: DataSet
    held_out: DataSet | None
    whole: DataSet
    class_names: tuple[str, ...]
    fingerprint: str


def open_run_data(config: Config, saved: Checkpoint | None, out: Path, accelerator: Accelerator) -> RunData:
    """Open the data of a run.

    Raises UsageError if they are fewer than a batch, have no classes to condition on, or differ from those of the other
    processes or of the run to be continued.
    """
    if isinstance(config.data, Folder):
        config.data.check_outside(out, "--out")
    with accelerator.main_process_first():  # one process downloads, or makes an index; the others find it there
        whole = open_data(config.data)
        dataset, held_out = hold_out(whole, config.data.held_out, config.train.seed)
    if len(dataset) < config.train.batch_size:
        beside = f", beside {len(held_out)} held out" if held_out else ""
        fewer = f"fewer than train.batch_size {config.train.batch_size}: make it {len(dataset)} or less"
        raise UsageError(f"the data hold {len(dataset)} images{beside}, {fewer}")
    class_names = dataset.class_names if config.model.class_cond else ()
    if config.model.class_cond and not class_names:
        reason = getattr(getattr(dataset, "files", None) or dataset, "no_classes", "")
        why = f", since {reason}" if reason else ""
        hint = ", or put the images into one folder per class" if config.data.source == "folder" else ""
        raise UsageError(f"model.class_cond is true, but the data ({config.data.source}) have no classes{why}: set "
                         f"--model.class_cond false{hint}")  # fmt: skip
    if saved and saved.class_names != class_names:
        here, there = (", ".join(names) or "none" for names in (class_names, saved.class_names))
        raise UsageError(f"the data's classes are {here}, and {there} in {out}")
    fingerprint = dataset.fingerprint()
    newest, settings = saved.path.name if saved else "none", json.dumps(dataclasses.asdict(config))
    check_agreed(
        ("the newest checkpoint is", newest, f"--out {out} must be a folder that all machines share"),
        ("the data are", fingerprint, "they must be the same for all processes"),
        ("the configuration is", settings, "give all processes the same command"),
    )
    if saved and saved.data not in (None, fingerprint) and not config.data.allow_change:
        errors = dataset.left_out
        unread = f"; {len(errors)} cannot be read, the first is {errors[0]}" if errors else ""
        raise UsageError(
            f"the data are not those that the run in {out} began with ({saved.data} then, {fingerprint} now"
            f"{unread}): continue on these with --data.allow_change true, or begin another run with --out"
        )
    return RunData(dataset, held_out, whole, class_names, fingerprint)


def describe_run(config: Config, data: RunData) -> list[str]:
    """What was found in the data, and all that is done with them which changes what is learnt."""
    lines = describe_data(config.data, data.dataset)
    if data.dataset.class_names and not config.model.class_cond:
        lines.append("the classes are not learnt: --model.class_cond true learns them")
    if config.train.label_dropout:
        lines.append(f"{config.train.label_dropout:.0%} of the images are trained on without their class, for guidance")
    if config.data.low_res_size is not None:
        lines.append(f"the network is also given each image shrunk to {list(config.data.low_res_sizes)}")
    if config.diffusion.respacing:
        lines.append(f"only some of the timesteps are trained on (diffusion.respacing {config.diffusion.respacing})")
    if data.held_out is not None:
        lines.append(f"{len(data.held_out)} more images are held out{_seen(data, data.held_out)}")
    return lines


def _seen(data: RunData, held_out: DataSet) -> str:
    """How many held-out images are the same as images that are trained on."""
    files = getattr(data.whole, "container", None)  # of data that are not in memory
    if files is not None and files.sizes.sum() > COMPARED_BYTES:
        return ", not compared with those that are trained on (diffusion check-data does it)"
    seen = count_seen(held_out, data.dataset)
    return f", {seen} of which are also among those that are trained on" if seen else ""


def seen_before(saved: Checkpoint, data: RunData) -> list[str]:
    """What the run of other weights has seen of the images that are held out here, as messages."""
    if data.held_out is None:
        return []
    trained = None
    with suppress(UsageError):  # its share leaves none of these
        trained, _ = hold_out(data.whole, saved.config.data.held_out, saved.config.train.seed)
    if trained is None or trained.fingerprint() != saved.data or saved.origin is not None:
        return ["train.init_from: whether it was trained on images that are held out here is not known, since its data "
                "or first weights were others"]  # fmt: skip
    names = {trained.key_of(i) for i in range(len(trained))}
    seen = sum(data.held_out.key_of(i) in names for i in range(len(data.held_out)))
    return [f"train.init_from: it was trained on {seen} of the {len(data.held_out)} images held out here: take "
            "its data.held_out and train.seed"] if seen else []  # fmt: skip
