"""`diffusion evaluate`: score a trained model."""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from diffusion.commands import terminal
from diffusion.commands.command_line import parse_settings
from diffusion.commands.report import write_report
from diffusion.config.schema import config_of, override
from diffusion.data.base import DataConfig, DataSet, hold_out, open_data, with_classes
from diffusion.data.image_files import FileDataset
from diffusion.data.sources import SOURCES
from diffusion.errors import UsageError, check_name, one_line, prefixed
from diffusion.files.atomic import replace_text, written_by
from diffusion.metrics import METRICS
from diffusion.metrics.base import Reference, Score, Subject, over_sets
from diffusion.metrics.features import FEATURES
from diffusion.parallel.launchers import accelerate_starts, check_launcher, on_cpu
from diffusion.run.checkpoint import folders
from diffusion.run.folder import SCORES, append_line, run_of
from diffusion.run.grids import PNG_MARK, save_grid
from diffusion.run.loaded import Run
from diffusion.samplers import Progress

ELSEWHERE = {"fid": "frechet, with --features inception", "is": "inception_score", "bpd": "bits_per_dim"}
"""Names that other tools give to metrics."""
SHEET = written_by(PNG_MARK.format("evaluate"))
UNUSED = "--data.low_res_size", "--data.random_flip"
"""Settings of the data that belong to the model."""

Scored = tuple[Run, dict[str, Score]]
"""A model, and its scores by metric."""


def parse(argv: list[str]) -> argparse.Namespace:
    usage = "%(prog)s --ckpt RUN [--metric METRIC,...] [--data.KEY VALUE ...] [...]"
    what = "Score a trained model on its data, or on others, which the flags --data.KEY of train.py choose."
    parser = terminal.Parser(allow_abbrev=False, usage=usage, description=what)
    add, path = parser.add_argument, terminal.non_empty_path
    add("--ckpt", type=path, required=True, help="a run's folder (its newest checkpoint), or a checkpoint's")
    text = f"one or more of {', '.join(METRICS)} (default: bits_per_dim)"
    add("--metric", default="bits_per_dim", metavar="METRIC,...", help=text)
    add("--features", choices=FEATURES, help="network of the features (default: classifier, without classes pixels)")
    add("--features_weights", type=path, help="file of Inception's weights (default: downloaded)")
    add("--every", action="store_true", help="score every checkpoint and average of the run, and say which is best")
    add("--sheet", type=path, help="where nearest writes its sheet (default: RUN/samples/nearest_....png)")
    add("--split", choices=["train", "test", "held_out"], default="train", help="part of the data (default: train)")
    add("--n", type=terminal.number_from(1), help="images of the data, or generated ones (default: all; of gap, 300)")
    add("--sets", type=int, default=1, choices=range(1, 11), metavar="SETS", help="sets of samples, for 95%% intervals")
    add("--classes", help="score these classes alone, by number or name, separated by commas (default: all)")
    add("--steps", type=terminal.steps, default="", help="see sample.py (default: all; to sample, as in the grids)")
    add("--ema", help="a moving average's rate, or none for the weights in training (default: the run's first)")
    terminal.add_sampling(parser)
    add("--seed", type=terminal.number_from(0), default=0, help="of the noise (default: 0)")
    add("--batch_size", type=terminal.number_from(1), default=64, help="images scored at once (default: 64)")
    add("--out", type=path, help="write the figures and all that they depend on to this new JSON file, too")
    args, rest = parser.parse_known_args(argv)
    args.settings = parse_settings(rest)[1]
    for word in rest:
        if word.startswith(UNUSED) or (word.startswith("--") and not word.startswith("--data.")):
            parser.error(f"unrecognized arguments: {word}")
    args.metric = list(dict.fromkeys(args.metric.split(",")))
    for name in args.metric:
        if name in ELSEWHERE:
            raise UsageError(f"--metric {name} is here {ELSEWHERE[name]}")
        check_name("--metric", name, METRICS)
    args.draws = any(METRICS[name].draws for name in args.metric)
    return args


def choose_data(args: argparse.Namespace, run: Run) -> DataConfig:
    """The data to score. Raises UsageError if they are not images that the model can have."""
    trained, sections = run.config.data, run.config.sections()
    override(sections, args.settings)
    data = config_of(sections).resolved().data
    native: Any = SOURCES[data.source]
    shape = data.shape if data.any_size or data.source == trained.source else native().shape
    if shape != trained.shape:
        raise UsageError(f"data.source is {data.source} of {shape}; the model's images are {trained.shape}")
    if data.condition_shapes != trained.condition_shapes:
        raise UsageError(f"the condition images are {data.condition_shapes}, the model's {trained.condition_shapes}")
    if args.split == "held_out" and not data.held_out:
        raise UsageError("--split is held_out, and the run held nothing out: data.held_out is 0")
    if args.split not in (*data.splits, "held_out"):
        raise UsageError(f"--split is {args.split}; {data.source} has no such part")
    return data


def open_scored(args: argparse.Namespace, run: Run, data: DataConfig) -> tuple[DataSet, DataSet, DataSet | None]:
    """The images to score, those of all classes, and those that the run held out, or the data's test images. Raises
    UsageError if they do not fit the model or the metrics."""
    saved, dataset, held_out = run.saved, open_data(data, "test" if args.split == "test" else "train"), None
    if isinstance(dataset, FileDataset):  # each image is scored once, so none may replace another
        dataset.on_error = "fail"
    if left := dataset.left_out:
        terminal.print_line(f"{len(left)} files that cannot be read are left out: {left[0]}", error=True)
    if args.split != "test":
        trained, held_out = hold_out(dataset, data.held_out, run.config.train.seed)
        if held_out is not None and trained.fingerprint() != saved.data:
            if args.split == "held_out":
                raise UsageError("--split is held_out, and these data are not those that the run held some out of")
            terminal.print_line("evaluate: these are not the run's data: nothing of them is held out", error=True)
        elif held_out is not None:
            dataset = held_out if args.split == "held_out" else trained
    names, numbers = saved.class_names, tuple(map(str, range(len(dataset.class_names))))
    if held_out is None and "gap" in args.metric and "test" in data.splits:
        with suppress(UsageError):
            test = open_data(data, "test")
            held_out = test if test.class_names == dataset.class_names else None
    if names != dataset.class_names and set(names) == set(dataset.class_names):
        dataset, held_out = with_classes(dataset, names), held_out and with_classes(held_out, names)
    elif names not in ((), dataset.class_names) and not (saved.step == 0 and names == numbers):  # of a converted model
        raise UsageError(f"the data's classes are {dataset.class_names}; those of {saved.path} are {names}")
    if dataset.vectors.widths != run.vectors.widths:
        its, own = (", ".join(one.widths) or "none" for one in (dataset.vectors, run.vectors))
        raise UsageError(f"the data's conditions are {its}; those of {saved.path} are {own}")
    whole = dataset
    if args.classes is not None:
        dataset = dataset.select(np.flatnonzero(np.isin(np.asarray(dataset.labels), run.labels(args.classes) or [])))
    wanted, images = args.n or len(dataset), len(dataset)
    for name in args.metric:
        if (least := METRICS[name].least) > min(wanted, images):
            counts = f"--n is {wanted}, and there are {images} images"
            raise UsageError(f"{name} needs at least {least} samples and images of the data: {counts}")
    return dataset, whole, held_out


def check_flags(args: argparse.Namespace, run: Run) -> None:
    """Raise UsageError for flags that do not fit the model or each other."""
    if args.draws:
        with prefixed("--"):
            run.with_sampling(steps=None if args.steps == "" else args.steps)
    if args.every and (args.sheet or args.ema):
        raise UsageError("--every scores all checkpoints and averages: leave out --sheet and --ema")
    flags = {"sets": args.sets > 1 or None, "steps": args.steps or None if args.metric == ["gap"] else None}
    names = "sampler", "guidance", "guide", "guide_ema", "guide_between", "features", "sheet"
    flags |= {name: getattr(args, name) for name in names}
    given = [name for name, value in flags.items() if value is not None]
    if given and not args.draws:
        raise UsageError(f"--{given[0]} is of samples, and {args.metric[0]} draws none: leave it out")
    if "nearest" in args.metric and args.split != "train":
        raise UsageError(f"--split is {args.split}, and nearest looks for copies of what was trained on: leave it out")
    if args.out is not None:
        terminal.check_output(args.out, "--out", ".json")
    if args.sheet is not None:
        terminal.check_output(args.sheet, "--sheet", ".png", SHEET)


def main() -> None:
    args = parse(sys.argv[1:])
    check_launcher()
    run = terminal.sampling_as(terminal.open_run(args.ckpt, args.ema), args)
    data = choose_data(args, run)
    check_flags(args, run)
    dataset, whole, held_out = open_scored(args, run, data)
    from accelerate import PartialState

    with accelerate_starts():
        state = PartialState(cpu=on_cpu())
    features = args.features or ("classifier" if dataset.class_names else "pixels")
    reference = Reference(dataset, state.device, features, args.features_weights, run.config.data.random_flip, whole)
    if reference.network == "classifier" and args.draws and state.is_main_process:
        terminal.print_line("evaluate: training a small classifier on the data, for its features", error=True)
    common = dataset, state, reference, args.n, args.steps
    for name in sorted(args.metric, key=[*METRICS].index):  # those that train a classifier last
        METRICS[name].check(Subject(run, *common))
    rows, failed = list[Scored](), list[str]()
    with terminal.progress_bar(0, state.is_main_process) as bar:

        def wrap(total: int) -> Progress:
            bar.reset(total)
            return partial(terminal.advance, bar)

        for scored in models(args, run):
            given = args.batch_size, wrap, held_out
            sets = [Subject(scored.to(state.device), *common, args.seed + i, *given) for i in range(args.sets)]
            if scores := score(sets, args.metric, f"of {title(scored)}", failed):
                rows.append((scored, scores))
                if state.is_main_process:
                    settings = sets[0].settings(args.metric, args.draws, args.sets)
                    settings |= {"evaluations": sets[0].evaluations, "split": args.split}
                    write(args, settings, rows, failed)
    if state.is_main_process:
        if (out := run_of(run.path)) and (out / "metrics.jsonl").exists():
            try:
                write_report([out], out / "report.html")
                terminal.print_line(f"the run's page shows it: {(out / 'report.html').resolve()}", error=True)
            except Exception as error:  # of any type: the figures are there, and it can be written later
                terminal.print_line(f"evaluate: the run's page is left as it is: {one_line(error)}", error=True)
        report(args, rows)
    if failed:
        raise UsageError("; ".join(failed))


def models(args: argparse.Namespace, run: Run) -> Iterator[Run]:
    """The checkpoints, and averages of each, to score: the opened one, or every one of its run."""
    if not args.every:
        yield run
        return
    if not folders(args.ckpt):
        raise UsageError(f"--every is set, and --ckpt {args.ckpt} is not a run that has saved a checkpoint")
    for path in reversed(folders(args.ckpt)):
        for ema in [*map(str, run.config.train.averages), "none"]:
            try:
                yield terminal.sampling_as(terminal.open_run(path, ema), args)
            except UsageError as error:
                terminal.print_line(f"evaluate: left out: {error}", error=True)


def score(sets: Sequence[Subject], names: Sequence[str], where: str, failed: list[str]) -> dict[str, Score]:
    """The scores of a model by metric. One that fails is appended to `failed`, and costs none of the others."""
    scores = {}
    for name in names:
        try:
            used = sets if METRICS[name].draws else sets[:1]
            scores[name] = over_sets([METRICS[name].score(subject) for subject in used])
        except (ValueError, RuntimeError, MemoryError) as error:  # UsageError is a ValueError
            failed.append(f"{name} {where}: {one_line(error)}")
    return scores


def write(args: argparse.Namespace, settings: dict[str, Any], rows: Sequence[Scored], failed: list[str]) -> None:
    """Write the figures so far, and the sheet of the last model. What cannot be written is appended to `failed`."""
    table = [figures_of(*row) for row in rows]
    result = {"metric": ",".join(args.metric), "settings": settings} | ({"every": table} if args.every else table[0])
    if args.out:
        try:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            replace_text(args.out, json.dumps(result, allow_nan=False, indent=1))
        except OSError as error:
            failed.append(f"--out {args.out} cannot be written: {one_line(error)}")
    (run, scores), owner = rows[-1], run_of(rows[-1][0].path)
    if owner:
        with suppress(OSError):  # of somebody else
            for name, score in scores.items():
                about = {"metric": name, "lines": score.lines, "settings": settings}
                append_line(owner / SCORES, about | figures_of(run, {name: score}))
    name = f"samples/nearest_{run.path.name}_{run.saved.name_of(run.ema)}.png"
    out = args.sheet or (owner or Path()) / name
    for sheet, headings in [(score.sheet, score.headings) for score in scores.values() if score.sheet is not None]:
        try:
            terminal.check_output(out, "--sheet", ".png", SHEET)
            captions = headings * (len(sheet) // len(headings))
            save_grid(sheet, out, columns=len(headings), captions=captions, by="evaluate")
            terminal.print_line(f"samples, nearest by pixels, and by features: {out.resolve()}")
        except (OSError, UsageError) as error:
            failed.append(f"the sheet {out} cannot be written: {one_line(error)}")


def title(run: Run) -> str:
    """The checkpoint, and which of its weights."""
    return f"{run.path.name}, {run.saved.name_of(run.ema)}"


def figures_of(run: Run, scores: dict[str, Score]) -> dict[str, Any]:
    """The names of a model, and its figures, of which those that are not finite are None."""
    names = {"checkpoint": run.path.name, "ema": run.saved.name_of(run.ema), "weights": run.saved.fingerprint(run.ema)}
    figures = {name: value for score in scores.values() for name, value in score.figures.items()}
    broken = [name for name, value in figures.items() if isinstance(value, float) and not math.isfinite(value)]
    return names | figures | dict.fromkeys(broken)


def report(args: argparse.Namespace, rows: Sequence[Scored]) -> None:
    """Print the figures, and the best of several models."""
    for run, scores in rows:
        for line in [line for score in scores.values() for line in (score.lines[:1] if args.every else score.lines)]:
            terminal.print_line(f"{title(run)}: {line}" if args.every else line)
    for note in dict.fromkeys(note for _, scores in rows for score in scores.values() for note in score.notes):
        terminal.print_line(note)
    for name in args.metric if args.every else ():
        scored = {title(run): scores[name] for run, scores in rows if name in scores}
        if scored and (key := next(iter(scored.values())).best):
            terminal.print_line(best_of(scored, key))


def best_of(scored: dict[str, Score], key: str) -> str:
    """The best model by a figure, and how many others are not worse by more than chance."""
    values = {title: (score.figures[key], score.figures.get(f"{key}_interval")) for title, score in scored.items()}
    best = (max if next(iter(scored.values())).higher else min)(values, key=lambda title: values[title][0])
    value, half = values[best]
    if half is None:
        return f"best by {key}: {best} ({value:.4f}); --sets 3 tells which differences are significant"
    near = sum(abs(other - value) <= half + its for other, its in values.values()) - 1
    others = f"{near} of the {len(values) - 1} others are within the intervals"
    return f"best by {key}: {best} ({value:.4f} +- {half:.4f}); {others}"
