"""`diffusion evaluate`: score a trained model."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from diffusion.checkpoint import Checkpoint, folders
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
from diffusion.data.base import DataConfig, DataSet, hold_out, open_data
from diffusion.data.image_files import FileDataset
from diffusion.data.sources import SOURCES
from diffusion.distributed import accelerate_starts, check_launcher, on_cpu
from diffusion.errors import UsageError, one_line, one_of, prefixed
from diffusion.files import check_no_dangling_link, replace_text
from diffusion.images import save_grid
from diffusion.metrics import METRICS, Score, Subject
from diffusion.metrics.base import Reference
from diffusion.metrics.bits_per_dim import check_levels
from diffusion.metrics.features import FEATURES
from diffusion.samplers import Progress
from diffusion.training.run_folder import check_writable_file, locate


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(allow_abbrev=False, description="Score a trained model.")
    add = parser.add_argument
    add("--ckpt", type=non_empty_path, required=True, help="a run's folder (its newest checkpoint), or a checkpoint's")
    add("--metric", type=metrics, default=["bits_per_dim"], metavar="METRIC,...",
        help=f"what to compute, one or more of {', '.join(METRICS)} (default: bits_per_dim)")  # fmt: skip
    add("--features", choices=FEATURES, help="network in whose features samples are compared (default: classifier, a "
        "small one that is trained on the data, or pixels where there are no classes; inception: FID)")  # fmt: skip
    add("--features_weights", type=non_empty_path, help="file of Inception's weights (default: downloaded)")
    add("--every", action="store_true", help="score every checkpoint and average of the run, and say which is best")
    add("--against", type=non_empty_path, help="compare with the figures in this JSON file; refused if they were made "
        "with other settings")  # fmt: skip
    add("--sheet", type=non_empty_path, help="where nearest writes its sheet (default: RUN/samples/nearest_....png)")
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


def metrics(text: str) -> list[str]:
    """An argparse type: names of metrics."""
    for name in (names := text.split(",")):
        if name not in METRICS:
            raise argparse.ArgumentTypeError(f"it is {name!r}; it must be {one_of(name, METRICS)}")
    return list(dict.fromkeys(names))


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
            ours = isinstance(found, dict) and set(str(found.get("metric")).split(",")) <= METRICS.keys()
        except (ValueError, TypeError, RecursionError):
            ours = False
        if not ours:
            raise UsageError(f"--out {out} is there already, and holds no figures of this command: name another")
    check_writable(out.parent, f"--out {out}")


def open_scored(args: argparse.Namespace, saved: Checkpoint, data: DataConfig) -> DataSet:
    """The images to score. Raises UsageError if they do not fit the model or the metrics."""
    dataset = open_data(data, "test" if args.split == "test" else "train")
    if isinstance(dataset, FileDataset):  # each image is scored once, so none may replace another
        dataset.on_error = "fail"
    if dataset.left_out:
        print_line(
            f"{len(dataset.left_out)} files are left out, since they cannot be read: {dataset.left_out[0]}", error=True
        )
    if args.split != "test":
        trained, held_out = hold_out(dataset, data.held_out, saved.config.train.seed)
        dataset = held_out if args.split == "held_out" and held_out else trained
    if saved.class_names and not saved.fits_classes(dataset.class_names):
        given = ", ".join(dataset.class_names) or "none"
        raise UsageError(f"the data's classes are {given}, and {', '.join(saved.class_names)} in {saved.path}")
    if "bits_per_dim" in args.metric:
        check_levels(dataset)
    return dataset


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
    if args.against is not None:  # not after hours of scoring
        read_figures(args.against)
    if data.low_res_size is not None and set(args.metric) != {"bits_per_dim"}:
        raise UsageError(f"--metric is {','.join(args.metric)}, and {saved.path} is an upsampler, of which no samples "
                         "are generated here: bits_per_dim is its metric")  # fmt: skip
    dataset = open_scored(args, saved, data)
    from accelerate import PartialState

    with accelerate_starts():
        state = PartialState(cpu=on_cpu())
    reference = Reference(dataset, state.device, args.features or ("classifier" if dataset.class_names else "pixels"),
                          args.features_weights)  # fmt: skip
    if reference.network == "classifier" and set(args.metric) != {"bits_per_dim"} and state.is_main_process:
        print_line(
            "evaluate: training a small classifier on the data, in whose features images are compared", error=True
        )
    scores: dict[str, dict[str, Score]] = {}
    with progress_bar(0, state.is_main_process) as bar:

        def wrap(total: int) -> Progress:
            bar.reset(total)
            return partial(advance, bar)

        for scored, its_weights, ema in models(args, saved, weights):
            network = scored.network(its_weights).eval().to(state.device)
            subject = Subject(scored, network, dataset, state, reference, args.n, args.steps, args.seed,
                              args.batch_size, wrap)  # fmt: skip
            where = f"{scored.path.name}, {ema or scored.config.train.averages[0]}"
            scores[where] = {name: METRICS[name](subject) for name in args.metric}
            sheet = next((score for score in scores[where].values() if score.sheet is not None), None)
            if state.is_main_process and sheet is not None and sheet.sheet is not None:
                out = args.sheet or (locate(scored.path).run or Path()) / "samples" / f"nearest_{scored.path.name}.png"
                save_grid(
                    sheet.sheet,
                    out,
                    columns=len(sheet.headings),
                    captions=sheet.headings * (len(sheet.sheet) // len(sheet.headings)),
                )
                print_line(f"samples, nearest by pixels, and by features: {out.resolve()}")
    if state.is_main_process:
        report(args, subject, scores)


def models(
    args: argparse.Namespace, saved: Checkpoint, weights: dict[str, Tensor]
) -> Iterator[tuple[Checkpoint, dict[str, Tensor], str | None]]:
    """The checkpoints, and averages of each, to score: the opened one, or every one of its run."""
    if not args.every:
        yield saved, weights, args.ema
        return
    found = folders(args.ckpt)
    if not found:
        raise UsageError(f"--every is set, and --ckpt {args.ckpt} is no run that has saved a checkpoint")
    for path in reversed(found):
        for ema in [*map(str, saved.config.train.averages), "none"]:
            yield *open_run(path, ema), ema


def report(args: argparse.Namespace, subject: Subject, scores: dict[str, dict[str, Score]]) -> None:
    """Write the figures, and print them."""
    settings = subject.settings() if set(args.metric) - {"bits_per_dim"} else {}
    rows = [{"checkpoint": where.split(", ")[0], "ema": where.split(", ")[1]}
            | {name: value for score in found.values() for name, value in score.figures.items()}
            for where, found in scores.items()]  # fmt: skip
    figures: dict[str, Any] = {"metric": ",".join(args.metric), "settings": settings}
    figures |= {"every": rows} if args.every else rows[0]
    failed = None
    if args.out:  # before anything that a closed terminal could end
        try:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            replace_text(args.out, json.dumps(figures, allow_nan=False))
        except OSError as error:
            failed = UsageError(f"--out {args.out} cannot be written: {error.strerror}")
    for where, found in scores.items():
        for score in found.values():
            for line in score.lines if not args.every else score.lines[:1]:
                print_line(f"{where}: {line}" if args.every else line)
    for name in args.metric if args.every else ():
        score = next(iter(scores.values()))[name]
        values = {where: found[name].figures[score.best] for where, found in scores.items() if score.best}
        best = (max if score.higher else min)(values, key=lambda where: values[where])
        print_line(f"best by {score.best}: {best} ({values[best]:.4f})")
    if args.against:
        compare(args.against, figures)
    if failed:
        raise failed


def read_figures(path: Path) -> dict[str, Any]:
    """The figures that `--out` wrote. Raises UsageError if they are something else."""
    try:
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict) or not isinstance(found["settings"], dict):
            raise ValueError("it has no settings")
        return found
    except (OSError, ValueError, LookupError, RecursionError) as error:
        raise UsageError(f"--against {path} holds no figures of this command ({one_line(error)})") from None


def compare(path: Path, mine: dict[str, Any]) -> None:
    """Print the difference to other figures. Raises UsageError if they were made with other settings."""
    theirs = read_figures(path)
    fixed = {key: theirs[key] for key in mine.keys() & theirs.keys() if isinstance(mine[key], int | dict)}
    numbers = [key for key in mine.keys() & theirs.keys() if isinstance(mine[key], float)]
    there = theirs["settings"] | fixed
    here = mine["settings"] | {key: mine[key] for key in fixed}
    differ = [f"{key} {there.get(key)} there, {value} here" for key, value in here.items()
              if key != "settings" and there.get(key) != value]  # fmt: skip
    if differ or not numbers:
        raise UsageError(f"--against {path} cannot be compared: {'; '.join(differ) or 'it has other metrics'}")
    for key in sorted(numbers):
        print_line(f"{key}: {mine[key]:.4f}, {mine[key] - theirs[key]:+.4f} against {path}")
