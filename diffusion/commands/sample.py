"""`diffusion sample`: generate images with a trained model."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion.commands import terminal
from diffusion.config.files import parse_value
from diffusion.config.schema import all_settings
from diffusion.data.base import DataSet, digest, load
from diffusion.data.conditions import read_arrays, read_table
from diffusion.data.sources.arrays import Arrays
from diffusion.data.sources.folder import Folder
from diffusion.data.values import to_x_start
from diffusion.errors import UsageError, options_of, prefixed
from diffusion.parallel.compilation import compile_network
from diffusion.parallel.launchers import accelerate_starts, check_launcher, launcher, on_cpu
from diffusion.parallel.signals import SamplingInterrupted, StopSignals
from diffusion.run.folder import is_checkpoint, is_run, run_of
from diffusion.run.loaded import Run
from diffusion.run.samples import GridStore, SampleStore, Taken, numbered
from diffusion.samplers import SAMPLERS
from diffusion.sampling import batches, check_finite

MAX_IN_GRID = 10_000
SUFFIXES = {None: ".png", "images": "", "npz": ".npz"}
OPTIONS = dict.fromkeys(name for sampler in SAMPLERS.values() for name in options_of(sampler.run))


def parse(argv: list[str]) -> argparse.Namespace:
    parser = terminal.Parser(description="Generate images with a trained model.", allow_abbrev=False)
    add, path = parser.add_argument, terminal.non_empty_path
    add("--ckpt", type=path, required=True, help="a run's folder (its newest checkpoint), or a checkpoint's")
    add("--n", type=terminal.number_from(1), help="how many images (default: as in the run's grids)")
    add("--classes", help="class numbers or names, separated by commas, in turn (default: all, or those of --low_res)")
    text = (
        "NAME=NUMBER, or several in turn; NAME=LOW:HIGH, a range; NAME=FILE.npy; image=IMAGES; or FILE.csv of columns"
    )
    text += " (default: conditions of the run's data)"
    add("--condition", action="append", default=[], metavar="NAME=VALUE", help=text)
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
    run = terminal.open_run(args.ckpt, args.ema)
    run = terminal.sampling_as(run, args, steps=args.steps, **options)
    low_res, labels = open_low_res(run, args.low_res, args.classes)
    conditions, image, ranges = parse_conditions(args.condition, run)
    n = choose_n(args, run, low_res, image)
    side = max(1, round((n / len(run.labels(args.classes) or [0])) ** (1 / max(1, len(ranges)))))
    for k, (name, (low, high)) in enumerate(ranges.items()):  # the first changes fastest, after the classes
        number = np.arange(n) // len(run.labels(args.classes) or [0]) // side**k
        conditions[name] = np.linspace(low, high, side)[number % side]
    given = run.chosen(n, args.classes, conditions, image, low_res)
    if labels is not None:
        given["y"] = torch.tensor(labels)

    from accelerate import PartialState

    with accelerate_starts():
        state = PartialState(cpu=on_cpu())
    run = run.to(state.device)
    given |= {"low_res": low_res.to(state.device)} if isinstance(low_res, Run) else {}
    store = open_store(args, run, n, given, state, columns=side if len(ranges) > 1 else 0)
    if args.compile and (reason := compile_network(run.network, state.device)) and state.is_main_process:
        terminal.print_line(f"sample.py: --compile: nothing is compiled: {reason}", error=True)
    todo, signals = batches(range(n), args.batch_size), StopSignals(1, launcher())
    mine = [batch for batch in todo[state.process_index :: state.num_processes] if not store.is_done(batch)]
    passes = sum(one.config.sampling_process().num_timesteps for one in (run, *given.values()) if isinstance(one, Run))
    bar = terminal.progress_bar(len(mine) * passes, state.is_main_process and bool(mine))
    common: dict[str, Any] = {"seed": args.seed}
    common["progress"] = lambda steps: signals.interruptible(terminal.advance(bar, steps))
    with closing(store), bar, signals:
        try:
            for batch, images in run.generate(mine, given, **common):
                store.write(batch, check_finite(images))
        except SamplingInterrupted:
            done = sum(len(batch) for batch in todo if store.is_done(batch))
            raise signals.stopped(f"with {done} of {n} images done: the same command continues") from None
        state.wait_for_everyone()
        store.finish(todo, state.is_main_process)
    if state.is_main_process:
        terminal.print_line(f"{n} images: {store.out.resolve()}")


def choose_n(args: argparse.Namespace, run: Run, low_res: Tensor | Run | None, image: Tensor | None) -> int:
    """How many images to generate. Raises UsageError if they are too many."""
    counts = [len(images) for images in (low_res, image) if isinstance(images, Tensor)]
    n: int = args.n or (counts[0] if counts else run.config.sample.n)
    if isinstance(low_res, Tensor) and n > len(low_res):
        raise UsageError(f"--n is {n}, and --low_res {args.low_res} holds {len(low_res)} images")
    if args.form is None and n > MAX_IN_GRID:
        raise UsageError(f"--n is {n}, and a grid shows up to {MAX_IN_GRID}: add --images or --npz")
    return n


def parse_conditions(words: Sequence[str], run: Run) -> tuple[dict[str, Any], Tensor | None, dict[str, list[float]]]:
    """What `--condition` names: values by column, condition images, and the ends of ranges by column. Raises UsageError
    for what cannot be read."""
    values, ranges, image, data = dict[str, Any](), dict[str, list[float]](), None, run.config.data
    for word in words:
        name, equals, text = word.partition("=")
        with prefixed(f"--condition {word}: "):
            if not equals:
                values |= read_table(Path(word), list(run.vectors.widths))
            elif name == "image" and data.condition_channels:
                options = dict(channels=data.condition_channels, range=getattr(data, "condition_range", None))
                shown = open_images(Path(text), data.sizes, **options)
                image = to_x_start(load(shown, range(len(shown))).images)
            elif text.endswith(".npy"):
                values[name] = read_arrays(Path(text))[Path(text).stem]
            else:
                try:
                    numbers = [float(number) for number in text.replace(":", ",").split(",")]
                except ValueError:
                    right = "NAME=NUMBER, NAME=LOW:HIGH, NAME=FILE.npy, image=IMAGES or FILE.csv"
                    raise UsageError(f"it must be {right}") from None
                (ranges if ":" in text else values)[name] = numbers
                if ":" in text and len(numbers) != 2:
                    raise UsageError("a range has two ends, such as angle=-45:45")
    return values, image, ranges


def open_images(path: Path, sizes: tuple[int, ...], **options: Any) -> DataSet:
    """The images in a folder, archive or array, resized to `sizes`."""
    source = Arrays if path.suffix in (".npy", ".npz") else Folder
    return source(path=str(path), image_size=sizes, **options).open()


def open_low_res(run: Run, path: Path | None, classes: str | None) -> tuple[Tensor | Run | None, list[int] | None]:
    """What `--low_res` names, and the classes that it says, where they are needed. Raises UsageError if it does not
    fit."""
    data, names = run.config.data, run.class_names
    if path is None or data.low_res_size is None:
        run.check_low_res(None if path is None else torch.empty(0))
        return None, None
    if not path.exists() or is_run(path) or is_checkpoint(path):
        base = terminal.open_run(path)
        run.check_low_res(base)
        return base, None
    options: dict[str, Any] = dict(channels=data.channels, range=data.range)
    sizes = (
        data.low_res_sizes if path.is_dir() else Arrays(path=str(path), **options).found_sizes()
    )  # files are resized
    small = open_images(path, sizes, **options)
    images, y, *_ = load(small, range(len(small)))
    run.check_low_res(images)
    if not names or classes is not None:
        return to_x_start(images), None
    if not small.class_names:
        raise UsageError(f"--low_res {path} does not say the classes, which {run.path} needs: add --classes")
    with prefixed(f"--low_res {path}: "):
        numbers = run.labels(small.class_names) or []
    return to_x_start(images), [numbers[i] for i in y]


def open_store(
    args: argparse.Namespace, run: Run, n: int, given: Mapping[str, Any], state: Any, columns: int
) -> SampleStore | GridStore:
    """The store that all processes write to, begun or continued. Raises UsageError if it cannot be written."""
    from accelerate.utils import broadcast_object_list

    form, config, sample = args.form, run.config, run.config.sample
    settings = weights_of(run) | {"sampler": sample.sampler, "options": sample.options, "guidance": sample.guidance}
    settings |= {"steps": config.sample_steps(), "seed": args.seed, "batch_size": args.batch_size}
    settings |= {"device": state.device.type, "guide_between": sample.guide_between}
    for name, value in (dict(given) | {"guide": run.guide}).items():
        if name != "y" and value is not None:
            settings[name] = weights_of(value) if isinstance(value, Run) else digest(value.cpu().numpy())
    labels = given["y"].tolist() if "y" in given else None

    def at(out: Path) -> SampleStore | GridStore:
        if form is None:
            return GridStore(out, columns or len(labels or ()), captions_of(run, given, n) if args.captions else ())
        return SampleStore(out, form, n, config.data.shape, labels, settings, config.data.range)

    guided = f"_guidance{sample.guidance:g}" if sample.guidance != 1 else ""
    name = f"{run.path.name}_{sample.sampler}{config.sampling_process().num_timesteps}_seed{args.seed}{guided}"
    default = (run_of(run.path) or Path()) / "samples" / (name + SUFFIXES[form])
    where = [args.out]
    if state.is_main_process:
        terminal.check_writable((args.out or default).parent, f"--out {args.out or default}")
        for path in numbered(args.out or default):
            store = at(path)
            try:
                store.begin()
                break
            except Taken:
                if args.out:
                    raise
        where = [store.out]
    broadcast_object_list(where)
    return store if state.is_main_process else at(where[0])


def captions_of(run: Run, given: Mapping[str, Any], n: int) -> list[str]:
    """The class and the numbers that each image is generated from; none for a run without."""
    texts, start = [""] * n, 0
    if run.class_names:
        texts = [run.class_names[label] for label in np.resize(given["y"].cpu().numpy(), n)]
    for name, width in run.vectors.widths.items():
        if width == 1:
            values = given["vector"][:, start].tolist()
            texts = [f"{text} {name} {value:.3g}".strip() for text, value in zip(texts, values, strict=True)]
        start += width
    return texts if any(texts) else []


def weights_of(run: Run) -> dict[str, Any]:
    """What distinguishes a run's weights from others."""
    return {"checkpoint": run.path.name, "weights": run.saved.fingerprint(run.ema)}
