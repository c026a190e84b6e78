"""`diffusion evaluate`: score a trained model."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from diffusion.commands import terminal
from diffusion.config.schema import shared_fields
from diffusion.data.base import DataConfig, DataSet, hold_out, open_data, with_classes
from diffusion.data.image_files import FileDataset
from diffusion.data.sources import SOURCES
from diffusion.errors import UsageError, one_line, one_of, prefixed
from diffusion.files.atomic import replace_text, written_by
from diffusion.metrics import METRICS
from diffusion.metrics.base import Reference, Score, Subject, over_sets
from diffusion.metrics.bits_per_dim import check_levels
from diffusion.metrics.features import FEATURES
from diffusion.parallel.launchers import accelerate_starts, check_launcher, on_cpu
from diffusion.run.checkpoint import Checkpoint, folders
from diffusion.run.folder import locate
from diffusion.run.grids import PNG_MARK, save_grid
from diffusion.samplers import Progress

ELSEWHERE = {"fid": "frechet, with --features inception", "is": "inception_score", "bpd": "bits_per_dim",
             "nll": "bits_per_dim", "precision": "precision_recall", "recall": "precision_recall"}  # fmt: skip
"""Names that other tools give to metrics."""
SHEET = written_by(PNG_MARK.format("evaluate"))
Row = tuple[Checkpoint, str, dict[str, Score]]
"""A checkpoint, which of its weights were scored, and what came out by metric."""


def parse(argv: list[str]) -> argparse.Namespace:
    parser = terminal.Parser(allow_abbrev=False, description="Score a trained model.")
    add, path = parser.add_argument, terminal.non_empty_path
    add("--ckpt", type=path, required=True, help="a run's folder (its newest checkpoint), or a checkpoint's")
    add("--metric", type=metrics, default=["bits_per_dim"], metavar="METRIC,...",
        help=f"what to compute, one or more of {', '.join(METRICS)} (default: bits_per_dim)")  # fmt: skip
    add("--features", choices=FEATURES, help="network of the features: classifier, trained on the data (the default), "
        "pixels, averaged to 8 along an axis (without classes), efficientnet_lite0, or inception (FID)")  # fmt: skip
    add("--features_weights", type=path, help="file of Inception's weights (default: downloaded)")
    add("--every", action="store_true", help="score every checkpoint and average of the run, and say which is best")
    add("--against", type=path, help="compare with the figures in this JSON file, if made with the same settings")
    add("--sheet", type=path, help="where nearest writes its sheet (default: RUN/samples/nearest_....png)")
    add("--data.source", dest="source", choices=SOURCES, help="which data set (default: the run's)")
    add("--data.path", dest="path", help="where the data lie (default: where the run had them)")
    add("--split", choices=["train", "test", "held_out"], default="train",
        help="images that the run trained on, the test part, or those of data.held_out (default: train)")  # fmt: skip
    add("--n", type=int, help="how many images of the data, spread over all, or generated ones (default: all)")
    add("--sets", type=int, default=1, choices=range(1, 11), metavar="SETS", help="sets of samples, for 95%% intervals")
    add("--classes", help="score these classes alone, by number or name, separated by commas (default: all)")
    add("--steps", default="", help="steps: a count, or sections like 10,15,20 (default: all; to sample, the grids')")
    add("--ema", help="a moving average's rate, or none for the weights in training (default: the run's first)")
    add("--seed", type=int, default=0, help="of the noise, which for an image depends on nothing else (default: 0)")
    add("--batch_size", type=int, default=64, help="images scored at once (default: 64)")
    add("--out", type=path, help="write the figures to this JSON file too")
    return parser.parse_args(argv)


def metrics(text: str) -> list[str]:
    """An argparse type: names of metrics."""
    for name in (names := text.split(",")):
        if name not in METRICS:
            hint = f"which is here {ELSEWHERE[name]}" if name in ELSEWHERE else f"and must be {one_of(name, METRICS)}"
            raise argparse.ArgumentTypeError(f"it is {name!r}, {hint}")
    return list(dict.fromkeys(names))


def choose_data(trained: DataConfig, source: str | None, path: str | None, split: str) -> DataConfig:
    """The data to score. Raises UsageError if they are not images that the model can have."""
    data = trained
    if source not in (None, trained.source):
        kind = SOURCES[source]
        if not kind.any_size and (native := kind().shape) != trained.shape:  # type: ignore[call-arg]
            raise UsageError(f"--data.source is {source}, whose images are {native}; the model's are {trained.shape}")
        data = kind(**shared_fields(trained, kind))
    if path is not None:
        if not hasattr(data, "path"):
            raise UsageError(f"--data.path is {path}, but data.source is {data.source}, which has no path")
        data = dataclasses.replace(data, path=path)  # type: ignore[call-arg]
    if split == "held_out" and not data.held_out:
        raise UsageError("--split is held_out, and the run held nothing out: data.held_out is 0")
    if split not in (*data.splits, "held_out"):
        raise UsageError(f"--split is {split}, but {data.source} has no such part: use another folder with --data.path")
    return data


def open_scored(args: argparse.Namespace, saved: Checkpoint, data: DataConfig) -> tuple[DataSet, DataSet]:
    """The images to score, and those of all classes. Raises UsageError if they do not fit the model or the metrics."""
    dataset = open_data(data, "test" if args.split == "test" else "train")
    if isinstance(dataset, FileDataset):  # each image is scored once, so none may replace another
        dataset.on_error = "fail"
    if dataset.left_out:
        left_out = f"{len(dataset.left_out)} files are left out, since they cannot be read: {dataset.left_out[0]}"
        terminal.print_line(left_out, error=True)
    if args.split != "test":
        trained, held_out = hold_out(dataset, data.held_out, saved.config.train.seed)
        if held_out is not None and trained.fingerprint() != saved.data:
            if args.split == "held_out":
                raise UsageError("--split is held_out, and these data are not those that the run held some out of")
            terminal.print_line("evaluate: these are not the run's data: nothing of them is held out", error=True)
        elif held_out is not None:
            dataset = held_out if args.split == "held_out" else trained
    names, numbers = saved.class_names, tuple(map(str, range(len(dataset.class_names))))
    if names != dataset.class_names and set(names) == set(dataset.class_names):
        dataset = with_classes(dataset, names)
    elif names not in ((), dataset.class_names) and not (saved.step == 0 and names == numbers):  # of a converted model
        given = ", ".join(dataset.class_names) or "none"
        raise UsageError(f"the data's classes are {given}, and {', '.join(saved.class_names)} in {saved.path}")
    whole = dataset
    if args.classes is not None:
        chosen = np.isin(np.asarray(dataset.labels), terminal.choose_labels(saved, args.classes) or [])
        dataset = dataset.select(np.flatnonzero(chosen))
    for name in args.metric:
        count, least = min(args.n or len(dataset), len(dataset)), METRICS[name].least
        if count < least:
            needs = f"{name} needs at least {least} samples and images of the data"
            raise UsageError(f"{needs}: --n is {args.n or len(dataset)}, and there are {len(dataset)} images")
    if "bits_per_dim" in args.metric:
        check_levels(dataset)
    return dataset, whole


def main() -> None:
    args = parse(sys.argv[1:])
    check_launcher()
    terminal.check_counts(args)
    saved, weights = terminal.open_run(args.ckpt, args.ema)
    data = choose_data(saved.config.data, args.source, args.path, args.split)
    check_flags(args, saved, data)
    against = None if args.against is None else read_figures(args.against)
    dataset, whole = open_scored(args, saved, data)
    from accelerate import PartialState

    with accelerate_starts():
        state = PartialState(cpu=on_cpu())
    reference = Reference(dataset, state.device, args.features or ("classifier" if dataset.class_names else "pixels"),
                          args.features_weights, saved.config.data.random_flip, whole)  # fmt: skip
    if reference.network == "classifier" and set(args.metric) != {"bits_per_dim"} and state.is_main_process:
        terminal.print_line("evaluate: training a small classifier on the data, for its features", error=True)
    for name in args.metric:
        METRICS[name].check(reference)
    with terminal.progress_bar(0, state.is_main_process) as bar:

        def wrap(total: int) -> Progress:
            bar.reset(total)
            return partial(terminal.advance, bar)

        def subject(scored: Checkpoint, network: Any, number: int) -> Subject:
            return Subject(scored, network, dataset, state, reference, args.n, args.steps, args.seed + number,
                           args.batch_size, wrap)  # fmt: skip

        settings = subject(saved, None, 0).settings(args.metric, args.sets)
        if against is not None:
            check_comparable(args.against, against, settings, args.metric)
        rows, failed = list[Row](), list[str]()
        for scored, its_weights, ema in models(args, saved, weights):
            network = scored.network(its_weights).eval().to(state.device)
            sets = [subject(scored, network, number) for number in range(args.sets)]
            scores = score(sets, args.metric, f"of {scored.path.name}, {scored.name_of(ema)}", failed)
            if scores:
                rows.append((scored, scored.name_of(ema), scores))
            if state.is_main_process and scores:
                done = {} if sets[0].evaluations is None else {"evaluations": sets[0].evaluations}
                failed += write(args, settings | done, rows)
    if state.is_main_process:
        report(args, rows, against)
    if failed:
        raise UsageError("; ".join(failed))


def check_flags(args: argparse.Namespace, saved: Checkpoint, data: DataConfig) -> None:
    """Raise UsageError for flags that do not fit the model or each other."""
    with prefixed("--steps: "):
        saved.config.diffusion.process(args.steps)
    for name, value in (("sheet", args.sheet), ("against", args.against), ("ema", args.ema)):
        if value is not None and args.every:
            raise UsageError(f"--{name} is {value}, which is for one checkpoint, and --every scores all: leave one out")
    if args.sets > 1 and set(args.metric) == {"bits_per_dim"}:
        raise UsageError(f"--sets is {args.sets}, which is of samples, and bits_per_dim draws none: leave it out")
    if "nearest" in args.metric and args.split != "train":
        raise UsageError(f"--split is {args.split}, and nearest looks for copies of what was trained on: leave it out")
    if data.low_res_size is not None and set(args.metric) != {"bits_per_dim"}:
        raise UsageError(f"--metric is {','.join(args.metric)}, and {saved.path} is an upsampler, of which no samples "
                         "are generated here: bits_per_dim is its metric")  # fmt: skip
    if args.out is not None:
        terminal.check_output(args.out, "--out")
    if args.sheet is not None:
        terminal.check_output(args.sheet, "--sheet", ".png", SHEET)


def score(sets: Sequence[Subject], names: Sequence[str], where: str, failed: list[str]) -> dict[str, Score]:
    """The scores of a model by metric. One that fails is appended to `failed`, and costs none of the others."""
    scores = {}
    for name in names:
        try:
            used = sets if name != "bits_per_dim" else sets[:1]
            scores[name] = over_sets([METRICS[name].score(subject) for subject in used])
        except (ValueError, RuntimeError, MemoryError) as error:  # UsageError is a ValueError
            failed.append(f"{name} {where}: {one_line(error)}")
    return scores


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
            try:
                yield *terminal.open_run(path, ema), ema
            except UsageError as error:
                terminal.print_line(f"evaluate: left out: {error}", error=True)


def write(args: argparse.Namespace, settings: dict[str, Any], rows: Sequence[Row]) -> list[str]:
    """Write the figures so far, and the sheet of the last model. Returns what could not be written."""
    table = [{"checkpoint": saved.path.name, "ema": ema, "weights": saved.fingerprint(ema)}
             | {name: None if isinstance(value, float) and not math.isfinite(value) else value
                for score in scores.values() for name, value in score.figures.items()}
             for saved, ema, scores in rows]  # fmt: skip
    figures: dict[str, Any] = {"metric": ",".join(args.metric), "settings": settings}
    figures |= {"every": table} if args.every else table[0]
    failed = []
    if args.out:
        try:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            replace_text(args.out, json.dumps(figures, allow_nan=False))
        except OSError as error:
            failed = [f"--out {args.out} cannot be written: {one_line(error)}"]
    saved, ema, scores = rows[-1]
    for score in scores.values():
        if score.sheet is not None:
            name = f"nearest_{saved.path.name}_{ema}.png"
            out = args.sheet or (locate(saved.path).run or Path()) / "samples" / name
            try:
                terminal.check_output(out, "--sheet", ".png", SHEET)
                captions = score.headings * (len(score.sheet) // len(score.headings))
                save_grid(score.sheet, out, columns=len(score.headings), captions=captions, by="evaluate")
                terminal.print_line(f"samples, nearest by pixels, and by features: {out.resolve()}")
            except (OSError, UsageError) as error:
                failed.append(f"the sheet {out} cannot be written: {one_line(error)}")
    return failed


def report(args: argparse.Namespace, rows: Sequence[Row], against: dict[str, Any] | None) -> None:
    """Print the figures, the best of several models, and the difference to other figures."""
    for saved, ema, scores in rows:
        for score in scores.values():
            for line in score.lines[:1] if args.every else score.lines:
                terminal.print_line(f"{saved.path.name}, {ema}: {line}" if args.every else line)
    for note in dict.fromkeys(note for _, _, scores in rows for score in scores.values() for note in score.notes):
        terminal.print_line(note)
    for name in args.metric if args.every else ():
        scored = {f"{saved.path.name}, {ema}": scores[name] for saved, ema, scores in rows if name in scores}
        if scored and (key := next(iter(scored.values())).best):
            terminal.print_line(best_of(scored, key))
    if against is not None and rows:
        compare(
            args.against,
            against,
            {name: value for score in rows[0][2].values() for name, value in score.figures.items()},
        )


def best_of(scored: dict[str, Score], key: str) -> str:
    """The best model by a figure, and how many others are not worse by more than chance."""
    values = {where: score.figures[key] for where, score in scored.items()}
    best = (max if next(iter(scored.values())).higher else min)(values, key=lambda where: values[where])
    half = [score.figures.get(f"{key}_interval", math.nan) for score in scored.values()]
    own = scored[best].figures.get(f"{key}_interval")
    if own is None:
        return f"best by {key}: {best} ({values[best]:.4f}); --sets 3 tells which differences are significant"
    near = sum(abs(value - values[best]) <= own + other for value, other in zip(values.values(), half, strict=True)) - 1
    others = f"{near} of the {len(values) - 1} others are within the intervals"
    return f"best by {key}: {best} ({values[best]:.4f} +- {own:.4f}); {others}"


def read_figures(path: Path) -> dict[str, Any]:
    """The figures that `--out` wrote. Raises UsageError if they are something else."""
    try:
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict) or not isinstance(found["settings"], dict) or "every" in found:
            raise ValueError("it has no settings, or is of --every")
        return found
    except (OSError, ValueError, LookupError, RecursionError) as error:
        raise UsageError(f"--against {path} holds no figures of this command ({one_line(error)})") from None


def check_comparable(path: Path, there: dict[str, Any], here: dict[str, Any], metrics: Sequence[str]) -> None:
    """Raise UsageError if other figures were made with other settings, or of other metrics."""
    differ = [f"{key} {there['settings'].get(key)} there, {value} here" for key, value in here.items()
              if there["settings"].get(key) != value]  # fmt: skip
    if not set(metrics) & set(str(there.get("metric")).split(",")):
        differ.append("it has other metrics")
    if differ:
        raise UsageError(f"--against {path} cannot be compared: {'; '.join(differ)}")


def compare(path: Path, theirs: dict[str, Any], mine: dict[str, Any]) -> None:
    """Print the difference to other figures, and whether it lies within the intervals of both."""
    for key in [key for key in mine if isinstance(mine[key], float) and isinstance(theirs.get(key), float)]:
        if not key.endswith(("_interval", "_std", "standard_error")):
            half = mine.get(f"{key}_interval", math.nan) + theirs.get(f"{key}_interval", math.nan)
            difference = mine[key] - theirs[key]
            says = "" if math.isnan(half) else f", {'within' if abs(difference) <= half else 'beyond'} the intervals"
            terminal.print_line(f"{key}: {mine[key]:.4f}, {difference:+.4f} against {path}{says}")
