"""The data of a run: opened, divided, and compared with those that the run began with."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator

from diffusion.config.schema import Config
from diffusion.data.base import DataSet, count_seen, hold_out, open_data
from diffusion.data.conditions import Scale, conditioned
from diffusion.data.sources.folder import Folder
from diffusion.data.summary import describe_data
from diffusion.errors import UsageError
from diffusion.parallel.launchers import check_agreed
from diffusion.run.checkpoint import Checkpoint

COMPARED_BYTES = 2**30
"""Files of this size in all, or data in memory, are compared with what is held out of them when a run begins."""


class RunData(NamedTuple):
    """What a run trains on, what it holds out, if anything, both together, its classes, the scale of its condition
    vectors, and a hash of what it trains on."""

    dataset: DataSet
    held_out: DataSet | None
    whole: DataSet
    class_names: tuple[str, ...]
    vectors: Scale
    fingerprint: str


def open_run_data(
    config: Config, saved: Checkpoint | None, out: Path, accelerator: Accelerator, given: DataSet | None = None
) -> RunData:
    """Open the data of a run, or take those that are given.

    Raises UsageError if they are fewer than a batch, have no classes to condition on, or differ from those of the other
    processes or of the run to be continued.
    """
    if isinstance(config.data, Folder):
        config.data.check_outside(out, "--out")
    with accelerator.main_process_first():  # one process downloads, or makes an index; the others find it there
        whole = open_data(config.data) if given is None else conditioned(given, config.data)
        dataset, held_out = hold_out(whole, config.data.held_out, config.train.seed)
    if len(dataset) < config.train.batch_size:
        beside = f", beside {len(held_out)} held out" if held_out else ""
        fewer = f"fewer than train.batch_size {config.train.batch_size}: make it {len(dataset)} or less"
        raise UsageError(f"the data hold {len(dataset)} images{beside}, {fewer}")
    class_names = dataset.class_names if config.model.class_cond else ()
    if config.model.class_cond and not class_names:
        reason = getattr(getattr(dataset, "files", None) or dataset, "no_classes", "") or config.data.source
        raise UsageError(f"model.class_cond is true, but the data have no classes ({reason}): set it to false")
    vectors, fingerprint = Scale.of(dataset.vectors), dataset.fingerprint()
    if (dropout := config.train.label_dropout) and not (class_names or vectors.size or config.data.condition_channels):
        raise UsageError(f"train.label_dropout is {dropout}, and there are no classes and no conditions to drop")
    had: list[Any] = [saved.class_names, saved.vectors.widths] if saved else []
    for what, own, its in zip(("classes", "conditions"), (class_names, vectors.widths), had, strict=False):
        if own != its:
            here, there = (", ".join(names) or "none" for names in (own, its))
            raise UsageError(f"the data's {what} are {here}, and {there} in {out}")
    newest, settings = saved.path.name if saved else "none", json.dumps(config.flat())
    check_agreed(
        ("the newest checkpoint is", newest, f"--out {out} must be a folder that all machines share"),
        ("the data are", fingerprint, "they must be the same for all processes"),
        ("the configuration is", settings, "give all processes the same command"),
    )
    if saved and saved.data not in (None, fingerprint) and not config.data.allow_change:
        unread = "".join(f"; unreadable: {error}" for error in dataset.left_out[:1])
        hint = f"({saved.data} then, {fingerprint} now{unread}): --data.allow_change true continues on these"
        raise UsageError(f"the data are not those that the run in {out} began with {hint}")
    return RunData(dataset, held_out, whole, class_names, saved.vectors if saved else vectors, fingerprint)


def describe_run(config: Config, data: RunData) -> list[str]:
    """What was found in the data, and all that is done with them which changes what is learnt."""
    unlearnt = bool(data.dataset.class_names) and not config.model.class_cond
    dropout, size, respacing = config.train.label_dropout, config.data.low_res_size, config.diffusion.respacing
    base, width = config.train.lr_base_width, getattr(config.model, config.model.width_field or "", None)
    notes = {
        f"a width of {width}: weights whose inputs grow from {base} learn at {base}/{width} of train.lr": bool(base),
        "the classes are not learnt: --model.class_cond true learns them": unlearnt,
        f"{dropout:.0%} of the images are trained on without class and conditions, for guidance": dropout > 0,
        f"the network is also given each image shrunk to {size}": size is not None,
        f"only some of the timesteps are trained on (diffusion.respacing {respacing})": bool(respacing),
    }
    lines = describe_data(config.data, data.dataset) + [note for note, holds in notes.items() if holds]
    if data.held_out is None:
        return lines
    files, held_out = getattr(data.whole, "container", None), f"{len(data.held_out)} more images are held out"
    if files is not None and files.sizes.sum() > COMPARED_BYTES:  # they are not in memory
        return [*lines, f"{held_out}, not compared with those that are trained on (diffusion check-data does it)"]
    seen = count_seen(data.held_out, data.dataset)
    return [*lines, held_out + (f", {seen} of which are also among those that are trained on" if seen else "")]


def seen_before(saved: Checkpoint, data: RunData) -> list[str]:
    """What the run of other weights has seen of the images that are held out here, as messages."""
    if data.held_out is None:
        return []
    trained = None
    with suppress(UsageError):  # its share leaves none of these
        trained, _ = hold_out(data.whole, saved.config.data.held_out, saved.config.train.seed)
    if trained is None or trained.fingerprint() != saved.data or saved.origin is not None:
        return ["train.init_from: it is not known whether images that are held out here were trained on there"]
    names = {trained.key_of(i) for i in range(len(trained))}
    seen = sum(data.held_out.key_of(i) in names for i in range(len(data.held_out)))
    of = f"{seen} of the {len(data.held_out)} images held out here"
    return [f"train.init_from: it was trained on {of}: take its data.held_out and train.seed"] if seen else []
