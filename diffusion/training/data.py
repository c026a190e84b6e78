"""The data of a run: opened, divided, and compared with those that the run began with."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

from accelerate import Accelerator

from diffusion.checkpoint import Checkpoint
from diffusion.config import Config
from diffusion.data.base import DataSet, hold_out, open_data
from diffusion.distributed import check_agreed
from diffusion.errors import UsageError


class RunData(NamedTuple):
    """What a run trains on, what it holds out, if anything, its classes, and a number that other data do not have."""

    dataset: DataSet
    held_out: DataSet | None
    class_names: tuple[str, ...]
    fingerprint: str


def open_run_data(config: Config, saved: Checkpoint | None, out: Path, accelerator: Accelerator) -> RunData:
    """Open the data of a run.

    Raises UsageError if they are fewer than a batch, have no classes to condition on, or differ from those of the other
    processes or of the run to be continued.
    """
    with accelerator.main_process_first():  # one process downloads, or makes an index; the others find it there
        dataset, held_out = hold_out(open_data(config.data), config.data.held_out, config.train.seed)
    if len(dataset) < config.train.batch_size:
        beside = f", beside {len(held_out)} held out" if held_out else ""
        raise UsageError(f"the data hold {len(dataset)} images{beside}, fewer than train.batch_size "
                         f"{config.train.batch_size}: make it {len(dataset)} or less")  # fmt: skip
    class_names = dataset.class_names if config.model.class_cond else ()
    if config.model.class_cond and not class_names:
        reason = getattr(getattr(dataset, "files", None) or dataset, "no_classes", "")
        raise UsageError(
            f"model.class_cond is true, but the data ({config.data.source}) have no classes"
            + (f", since {reason}" if reason else "")
            + ": set --model.class_cond false"
            + (", or put the images into one folder per class" if config.data.source == "folder" else "")
        )
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
    return RunData(dataset, held_out, class_names, fingerprint)
