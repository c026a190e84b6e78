"""`diffusion evaluate`: score a trained model."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from functools import partial
from pathlib import Path

from diffusion.commands.terminal import (
    Parser,
    advance,
    check_counts,
    check_writable,
    non_empty_path,
    open_run,
    print_line,
    progress_bar,
)  # fmt: skip
from diffusion.config import shared_fields
from diffusion.data.base import DataConfig, hold_out, open_data
from diffusion.data.sources import SOURCES
from diffusion.distributed import accelerate_starts, check_launcher, on_cpu
from diffusion.errors import UsageError, prefixed
from diffusion.files import check_no_dangling_link, replace_text
from diffusion.metrics import METRICS, Subject
from diffusion.samplers import Progress
from diffusion.training.run_folder import check_writable_file


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(allow_abbrev=False, description="Score a trained model.")
    add = parser.add_argument
    add("--ckpt", type=non_empty_path, required=True, help="a run's folder (its newest checkpoint), or a checkpoint's")
    add("--metric", choices=METRICS, default="bits_per_dim", help="what to compute (default: bits_per_dim)")
    add("--data.source", dest="source", choices=SOURCES, help="which data set (default: the run's)")
    add("--data.path", dest="path", help="where the data lie (default: where the run had them)")
    add("--split", choices=["train", "test", "held_out"], default="train",
        help="images: what a run trains on, the test part of a data set that has one, or what the run held out by "
        "data.held_out (default: train)")  # fmt: skip
    add("--n", type=int, help="how many images of the data, or generated ones (default: as many as the data have)")
    add("--steps", default="", help="steps: a count, or sections like 10,15,20 (default: all; to sample, the grids')")
    add("--ema", help="a moving average's rate, or none for the weights in training (default: the run's first)")
    add("--seed", type=int, default=0, help="of the noise, which for an image depends on nothing else (default: 0)")
    add("--batch_size", type=int, default=64, help="images scored at once (default: 64)")
    add("--out", type=non_empty_path, help="write the figures to this JSON file too")
    return parser.parse_args(argv)


def choose_data(trained: DataConfig, source: str | None, path: str | None, split: str) -> DataConfig:
    """The data to score. Raises UsageError if they are not images that the model can have."""
    data = trained
    if source not in (None, trained.source):
        kind = SOURCES[source]
        if not kind.any_size and (native := kind().shape) != trained.shape:  # type: ignore[call-arg]
            raise UsageError(f"--data.source is {source}, whose images are of (channels, height, width) {native}; the "
                             f"model's are {trained.shape}")  # fmt: skip
        data = kind(**shared_fields(trained, kind))
    if path is not None:
        if not hasattr(data, "path"):
            raise UsageError(
                f"--data.path is {path}, but data.source is {data.source}, which has no path: add --data.source"
            )
        data = dataclasses.replace(data, path=path)  # type: ignore[call-arg]
    if split == "held_out" and not data.held_out:
        raise UsageError("--split is held_out, and the run held nothing out: data.held_out is 0")
    if split not in (*data.splits, "held_out"):
        raise UsageError(f"--split is {split}, but {data.source} has no such part: use another folder with --data.path")
    if data.on_error != "fail":  # each image is scored once, so none may replace another
        data = dataclasses.replace(data, on_error="fail")  # type: ignore[call-arg]
    return data


def check_out(out: Path) -> None:
    """Raise UsageError if `--out` may not be written."""
    check_writable_file(out)
    if out.is_dir():
        raise UsageError(f"--out {out} is a folder: name a .json file")
    check_no_dangling_link(out)
    if out.is_file():
        try:
            found = json.loads(out.read_bytes())
            ours = isinstance(found, dict) and found.get("metric") in METRICS
        except (ValueError, TypeError, RecursionError):
            ours = False
        if not ours:
            raise UsageError(f"--out {out} is there already, and holds no figures of this command: name another")
    check_writable(out.parent, f"--out {out}")


def main() -> None:
    args = parse(sys.argv[1:])
    check_launcher()
    check_counts(args)
    saved, weights = open_run(args.ckpt, args.ema)
    data = choose_data(saved.config.data, args.source, args.path, args.split)
    with prefixed("--steps: "):
        saved.config.diffusion.process(args.steps)
    if args.out is not None:
        check_out(args.out)
    dataset = open_data(data, "test" if args.split == "test" else "train")
    if args.split != "test":
        trained, held_out = hold_out(dataset, data.held_out, saved.config.train.seed)
        dataset = held_out if args.split == "held_out" and held_out else trained
    if saved.class_names and not saved.fits_classes(dataset.class_names):
        given = ", ".join(dataset.class_names) or "none"
        raise UsageError(f"the data's classes are {given}, and {', '.join(saved.class_names)} in {saved.path}")
    from accelerate import PartialState

    with accelerate_starts():
        state = PartialState(cpu=on_cpu())
    network = saved.network(weights).eval().to(state.device)
    subject = Subject(saved, network, dataset, state, args.n, args.steps, args.seed, args.batch_size)
    with progress_bar(0, state.is_main_process) as bar:

        def wrap(total: int) -> Progress:
            bar.reset(total)
            return partial(advance, bar)

        subject.bar = wrap
        score = METRICS[args.metric](subject)
    if not state.is_main_process:
        return
    failed = None
    if args.out:  # before anything that a closed terminal could end
        try:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            replace_text(args.out, json.dumps({"metric": args.metric} | score.figures, allow_nan=False))
        except OSError as error:
            failed = UsageError(f"--out {args.out} cannot be written: {error.strerror}")
    for line in score.lines:
        print_line(line)
    if failed:
        raise failed
