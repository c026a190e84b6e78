"""`diffusion sample`: generate images with a trained model."""

import argparse
import math
import sys
from collections.abc import Mapping
from contextlib import closing, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion.commands import terminal
from diffusion.config.files import parse_value
from diffusion.config.schema import all_settings
from diffusion.data.base import digest, load
from diffusion.data.conditions import check_columns, read_columns
from diffusion.data.sources.arrays import Arrays
from diffusion.data.sources.folder import Folder
from diffusion.data.values import to_x_start
from diffusion.errors import UsageError, options_of, prefixed
from diffusion.parallel.compilation import compile_network
from diffusion.parallel.launchers import accelerate_starts, check_launcher, launcher, on_cpu
from diffusion.parallel.signals import SamplingInterrupted, StopSignals
from diffusion.run.folder import is_checkpoint, is_run, run_of
from diffusion.run.loaded import Run, as_rows
from diffusion.run.samples import GridStore, SampleStore, Taken, numbered
from diffusion.samplers import SAMPLERS
from diffusion.sampling import batches, check_finite

Store = SampleStore | GridStore
MAX_IN_GRID = 10_000
SUFFIXES = {None: ".png", "images": "", "npz": ".npz"}
OPTIONS = dict.fromkeys(name for sampler in SAMPLERS.values() for name in options_of(sampler.run))


def parse(argv: list[str]) -> argparse.Namespace:
    parser = terminal.Parser(description="Generate images with a trained model.", allow_abbrev=False)
    add, path = parser.add_argument, terminal.non_empty_path
    add("--ckpt", type=path, required=True, help="a run's folder (its newest checkpoint), or a checkpoint's")
    add("--n", type=terminal.number_from(1), help="how many images (default: as in the run's grids)")
    add("--classes", help="class numbers or names, separated by commas, in turn (default: all, or those of --low_res)")
    text = "NAME=NUMBER,..., taken in turn; NAME=LOW:HIGH or LOW:HIGH:COUNT; NAME=FILE.npy; image=IMAGES; or FILE.csv"
    add("--condition", action="append", default=[], metavar="NAME=VALUE", help=f"{text} (default: the data's)")
    terminal.add_sampling(parser)
    text = "a count, sections like 10,15,20, ddim50, logsnr10, karras10, or a list like [0, 250, 999] (default: grids')"
    add("--steps", type=terminal.steps, help=text)
    for option in OPTIONS:
        setting = all_settings()[f"sample.{option}"]
        add(f"--{option}", help=f"{next(iter(setting.texts))} (default: the grids' or {', '.join(setting.defaults)})")
    add("--seed", type=terminal.number_from(0), default=0, help="image i of a seed is the same at any --n (default: 0)")
    text = "for an upsampler: a folder or .npz of small images, or a run that generates them (default: shrunk data)"
    add("--low_res", type=path, help=text)
    add("--batch_size", type=terminal.number_from(1), default=64, help="images generated at once (default: 64)")
    add("--ema", help="moving average: a rate, length0.07 (see train.ema_lengths), or none (default: the run's first)")
    add("--out", type=path, help="where to write (default: RUN/samples/...)")
    add("--captions", action="store_true", help="write classes and conditions under the images of a grid")
    add("--compile", action="store_true", help="compile the network: for many images, since it takes half a minute")
    form = parser.add_mutually_exclusive_group()
    text = "a folder with a PNG each (.npy of what PNG cannot hold)"
    form.add_argument("--images", dest="form", action="store_const", const="images", help=text)
    text = "arr_0 (N, *sizes, C) as data.range says; arr_1, the classes"
    form.add_argument("--npz", dest="form", action="store_const", const="npz", help=text)
    parser.epilog = "With --images and --npz, the same command continues after an interruption."
    return parser.parse_args(argv)


def main() -> None:
    args = parse(sys.argv[1:])
    check_launcher()
    if args.out is not None and args.form != "images":
        terminal.check_output(args.out, "--out", SUFFIXES[args.form])
    texts = {name: text for name, text in vars(args).items() if name in OPTIONS and text is not None}
    options = {name: parse_value(text, f"--{name}") for name, text in texts.items()}
    if empty := [name for name, value in options.items() if value is None]:
        raise UsageError(f"--{empty[0]} is empty")
    run = terminal.sampling_as(terminal.open_run(args.ckpt, args.ema), args, steps=args.steps, **options)
    n, given, columns = choose_conditions(args, run)
    if args.form is None and n > MAX_IN_GRID:
        raise UsageError(f"--n is {n}, and a grid shows up to {MAX_IN_GRID}: add --images or --npz")

    from accelerate import PartialState

    with accelerate_starts():
        state = PartialState(cpu=on_cpu())
    run = run.to(state.device)
    given |= {name: value.to(state.device) for name, value in given.items() if isinstance(value, Run)}
    store = open_store(args, run, n, given, columns, state)
    if args.compile and (reason := compile_network(run.network, state.device)) and state.is_main_process:
        terminal.print_line(f"sample.py: --compile: nothing is compiled: {reason}", error=True)
    todo, signals = batches(range(n), args.batch_size), StopSignals(1, launcher())
    mine = [batch for batch in todo[state.process_index :: state.num_processes] if not store.is_done(batch)]
    passes = sum(one.config.sampling_process().num_timesteps for one in (run, *given.values()) if isinstance(one, Run))
    bar = terminal.progress_bar(len(mine) * passes, state.is_main_process and bool(mine))
    progress = lambda steps: signals.interruptible(terminal.advance(bar, steps))  # noqa: E731
    with closing(store), bar, signals:
        try:
            for batch, images in run.generate(mine, given, seed=args.seed, progress=progress):
                store.write(batch, check_finite(images))
        except SamplingInterrupted:
            done = sum(len(batch) for batch in todo if store.is_done(batch))
            raise signals.stopped(f"with {done} of {n} images done: the same command continues") from None
        state.wait_for_everyone()
        store.finish(todo, state.is_main_process)
    if state.is_main_process:
        terminal.print_line(f"{n} images: {store.out.resolve()}")


def choose_conditions(args: argparse.Namespace, run: Run) -> tuple[int, dict[str, Any], int]:
    """How many images to generate, from what, and the columns of their grid, 0 where no two ranges span it. Raises
    UsageError for what cannot be read or does not fit the run."""
    values, ranges, labels = dict[str, Any](), dict[str, Any](), None
    for word in args.condition + ([] if args.low_res is None else [f"low_res={args.low_res}"]):
        name, equals, text = word.partition("=")
        if twice := {name, *(() if equals else run.vectors.widths)} & {*values, *ranges}:
            raise UsageError(f"--condition {word}: {min(twice)} is given twice")
        if not equals and run.vectors.widths:
            table = read_columns(Path(word))
            check_columns(word, [*run.vectors.widths], table)
            values |= {column: table[column] for column in run.vectors.widths}
        elif name in run.config.data.condition_shapes:
            with prefixed(f"{name} {text}: "):
                values[name], labels = open_images(run, name, Path(text), args.classes)
        elif text.endswith(".npy"):
            [values[name]] = read_columns(Path(text)).values()
        elif ":" in text:
            low, high, *count = text.split(":", 2)
            ends = as_rows(name, [low, high], 1, 2).flatten().tolist()
            ranges[name] = np.linspace(ends[0], ends[1], int(as_rows(name, count, 1, 1))) if count else ends
        else:
            values[name] = text.split(",") if equals else None
    rows = [name for name in values if run.vectors.widths.get(name) == 1 or np.ndim(values[name]) > 1]
    several = [len(values[name]) for name in rows if len(values[name]) > 1 or isinstance(values[name], Tensor)]
    n: int = args.n or max(several, default=run.config.sample.n)
    chosen = args.classes or (list(run.class_names) if ranges and run.class_names else None)
    each = len(run.labels(chosen) or [0]) if ranges else 1
    side = max(2, round((n / each) ** (1 / max(1, len(ranges)))))
    grids = {name: np.linspace(x[0], x[1], side) if isinstance(x, list) else x for name, x in ranges.items()}
    n = args.n or (each * math.prod(map(len, grids.values())) if grids else n)
    for name, grid in grids.items():  # after the classes, the first one changes fastest
        values[name], each = grid[np.arange(n) // each % len(grid), None], each * len(grid)
    given = run.chosen(n, chosen, values) | ({} if labels is None else {"y": labels})
    return n, given, len(next(iter(grids.values()))) if len(grids) > 1 else 0


def open_images(run: Run, name: str, path: Path, classes: str | None) -> tuple[Tensor | Run, Tensor | None]:
    """Condition images, or a run that generates them; and their classes, if they are needed. Raises UsageError."""
    data, (channels, *sizes) = run.config.data, run.config.data.condition_shapes[name]
    if name == "low_res" and (not path.exists() or is_run(path) or is_checkpoint(path)):
        return terminal.open_run(path), None
    options: dict[str, Any] = dict(path=str(path), channels=channels)
    options["range"] = data.range if name == "low_res" else getattr(data, "condition_range", None)
    if path.suffix in (".npy", ".npz"):
        images = Arrays(image_size=Arrays(**options).found_sizes(), **options).open()
    else:
        images = Folder(image_size=tuple(sizes), **options).open()
    batch = load(images, range(len(images)))
    if not run.class_names or classes is not None:
        return to_x_start(batch.images), None
    if not images.class_names:
        raise UsageError(f"it does not say the classes, which {run.path} needs: add --classes")
    return to_x_start(batch.images), torch.tensor(run.labels(images.class_names))[batch.labels]


def open_store(args: argparse.Namespace, run: Run, n: int, given: Mapping[str, Any], columns: int, state: Any) -> Store:
    """The store that all processes write to, begun or continued. Raises UsageError if it cannot be written."""
    from accelerate.utils import broadcast_object_list

    form, config, sample = args.form, run.config, run.config.sample
    settings = weights_of(run) | run.drawn | {"steps": config.sample_steps(), "seed": args.seed}
    settings |= {"device": state.device.type, "batch_size": args.batch_size}
    for name, value in (dict(given) | {"guide": run.guide}).items():
        if name != "y" and value is not None:
            settings[name] = weights_of(value) if isinstance(value, Run) else digest(value.cpu().numpy())
    labels = given["y"].tolist() if "y" in given else None

    def at(out: Path) -> Store:
        if form is None:
            captions = captions_of(run, given, n) if args.captions else ()
            return GridStore(out, columns or len(labels or ()), captions, given.get("image"))
        vectors = run.vectors.columns(given["vector"]) if "vector" in given else {}
        return SampleStore(out, form, n, config.data.shape, labels, settings, config.data.range, vectors)

    guided = f"_guidance{sample.guidance:g}" if sample.guidance != 1 else ""
    name = f"{run.path.name}_{sample.sampler}{config.sampling_process().num_timesteps}_seed{args.seed}{guided}"
    default = (run_of(run.path) or Path()) / "samples" / (name + SUFFIXES[form])
    where = [args.out]
    if state.is_main_process:
        terminal.check_writable((args.out or default).parent, f"--out {args.out or default}")
        for path in numbered(args.out or default):
            store = at(path)
            with nullcontext() if args.out else suppress(Taken):
                store.begin()
                break
        where = [store.out]
    broadcast_object_list(where)
    return store if state.is_main_process else at(where[0])


def captions_of(run: Run, given: Mapping[str, Any], n: int) -> list[str]:
    """The class and the numbers that each image is generated from, in lines; none for a run without."""
    lines = [[run.class_names[label] for label in np.resize(given["y"].cpu(), n)]] if "y" in given else []
    lines += [captions] if (captions := run.vectors.captions(given["vector"]) if "vector" in given else []) else []
    return ["\n".join(words) for words in zip(*lines, strict=True)]


def weights_of(run: Run) -> dict[str, Any]:
    """What distinguishes a run's weights from others."""
    return {"checkpoint": run.path.name, "weights": run.saved.fingerprint(run.ema)}
