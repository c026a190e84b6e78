"""`diffusion sample`: generate images with a trained model."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import sys
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffusion.commands import terminal
from diffusion.commands.command_line import OPTIONS
from diffusion.config.fields import plain
from diffusion.config.files import parse_value
from diffusion.config.schema import Config
from diffusion.data.base import load
from diffusion.data.decode import scale
from diffusion.data.sources.folder import Folder
from diffusion.data.values import to_uint8, to_x_start
from diffusion.errors import UsageError, prefixed
from diffusion.files.atomic import check_no_dangling_link
from diffusion.parallel.compilation import compile_network
from diffusion.parallel.launchers import accelerate_starts, check_launcher, launcher, on_cpu
from diffusion.parallel.signals import SamplingInterrupted, StopSignals
from diffusion.run.checkpoint import Checkpoint, Weights, is_run_or_checkpoint
from diffusion.run.folder import check_not_a_runs, locate
from diffusion.run.grids import save_gif, save_grid
from diffusion.run.samples import SUFFIXES, Form, SampleStore, begin_unused
from diffusion.samplers import SAMPLERS, sampler_options
from diffusion.sampling import Recorder, batches, check_finite, generate

MAX_IN_GRID = 10_000


class LowRes(NamedTuple):
    """What an upsampler enlarges: small images and their labels, if known, or a run that generates them."""

    images: Tensor | None = None
    labels: list[int] | None = None
    base: tuple[Checkpoint, Weights] | None = None

    def fingerprint(self) -> str | None:
        """What distinguishes these images, or the run, from others."""
        if self.base is not None:
            return self.base[0].fingerprint()
        return None if self.images is None else hashlib.sha256(self.images.numpy().tobytes()).hexdigest()


def parse(argv: list[str]) -> argparse.Namespace:
    parser = terminal.Parser(description="Generate images with a trained model.", allow_abbrev=False)
    add, path = parser.add_argument, terminal.non_empty_path
    add("--ckpt", type=path, required=True, help="a run's folder (its newest checkpoint), or a checkpoint's")
    add("--n", type=int, help="how many images (default: as in the run's grids)")
    add("--classes", help="class numbers or names, separated by commas, in turn (default: all, or those of --low_res)")
    add("--sampler", choices=SAMPLERS, help="default: as in the run's grids")
    add("--steps", help="sampling steps: a count, sections like 10,15,20, ddim50, logsnr10, karras10, or a list like "
        "[0, 250, 999] (default: as in the run's grids; of another sampler, its usual ones)")  # fmt: skip
    for option, samplers in OPTIONS.items():
        defaults = {name: sampler_options(name)[option] for name in samplers}
        usual = [plain(value) for value in dict.fromkeys(defaults.values())]
        texts = usual if len(usual) == 1 else [f"{plain(value)} for {name}" for name, value in defaults.items()]
        add(f"--{option}", metavar=type(defaults[samplers[0]]).__name__.upper(), help=f"option of {', '.join(samplers)}"
            f" (default: as in the run's grids, else {', '.join(texts)})")  # fmt: skip
    add("--seed", type=int, default=0, help="image i of a seed is the same at any --n and --batch_size (default: 0)")
    add("--guidance", type=float, help="guidance: 1 none, above 1 clearer classes, 0 no class (default: the grids')")
    add("--low_res", type=path, help="for an upsampler: a folder or an .npz of small images (files of other "
        "sizes are resized as for training), or a run that generates them with its own sampler")  # fmt: skip
    add("--batch_size", type=int, default=64, help="images generated at once (default: 64)")
    add("--ema", help="moving average: a rate, length0.07 (see train.ema_lengths), or none (default: the run's first)")
    add("--out", type=path, help="where to write (default: RUN/samples/...)")
    add("--captions", action="store_true", help="write the classes' names under the images of a grid")
    add("--chain", type=path, metavar="FILE.png", help="also write x_t and the predicted x_0 of each step, and a .gif")
    add("--compile", action="store_true", help="compile the network: for many images, since it takes half a minute")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--images", action="store_true", help="a folder with a PNG each (.npy of what PNG cannot hold)")
    form.add_argument("--npz", action="store_true", help="arr_0 (N, *sizes, C) as data.range says; arr_1, the classes")
    parser.epilog = "Each batch is written when it is done; the same command continues after an interruption."
    args = parser.parse_args(argv)
    given = {option: getattr(args, option) for option in OPTIONS if getattr(args, option) is not None}
    args.options = {option: parse_value(text, f"--{option}") for option, text in given.items()}
    return args


def main() -> None:
    args = parse(sys.argv[1:])
    check_launcher()
    terminal.check_counts(args)
    form: Form = "images" if args.images else "npz" if args.npz else "grid"
    check_outputs(args.out, args.chain, form)
    saved, weights = terminal.open_run(args.ckpt, args.ema)
    config = with_flags(saved.config, args)
    low_res = open_low_res(saved, args.low_res, args.classes is not None)
    labels = terminal.choose_labels(low_res.base[0] if low_res.base and not saved.class_names else saved, args.classes)
    n = choose_n(args, config, low_res, form)
    if low_res.images is not None and labels and args.classes is None:
        labels = low_res.labels

    from accelerate import PartialState

    with accelerate_starts():
        state = PartialState(cpu=on_cpu())
    store = open_store(args, form, saved, config, n, labels, low_res, state)
    network, passes = saved.network(weights).eval().to(state.device), config.sampling_process().num_timesteps
    if args.compile and (reason := compile_network(network, state.device)) and state.is_main_process:
        terminal.print_line(f"sample.py: --compile: nothing can be compiled here ({reason}): going on", error=True)
    if low_res.base is not None:
        first = low_res.base[0].config
        first_network = low_res.base[0].network(low_res.base[1]).eval().to(state.device)
        passes += first.sampling_process().num_timesteps
    todo = batches(range(n), args.batch_size)
    mine = [batch for batch in todo[state.process_index :: state.num_processes] if not store.is_done(batch)]
    signals = StopSignals(1, launcher())
    bar = terminal.progress_bar(len(mine) * passes, state.is_main_process and bool(mine))
    with closing(store), bar, signals:
        common: dict[str, Any] = dict(
            seed=args.seed, device=state.device, labels=labels if saved.class_names else None,
            progress=lambda steps: signals.interruptible(terminal.advance(bar, steps)))  # fmt: skip

        def small(batch: range) -> Tensor:
            if low_res.base is None:
                assert low_res.images is not None
                return to_x_start(low_res.images[batch.start : batch.stop])
            classes = labels if low_res.base[0].class_names else None
            [(_, images)] = generate(first, first_network, [batch], **common | {"labels": classes})
            return to_x_start(to_uint8(images)) if config.data.range is None else images

        condition = None if args.low_res is None else small
        try:
            for batch, images in generate(config, network, mine, low_res=condition, **common):
                store.write(batch, check_finite(images))
        except SamplingInterrupted:
            done = sum(len(batch) for batch in todo if store.is_done(batch))
            raise signals.stopped(f"with {done} of {n} images done, in {store.folder.resolve()}: "
                                  "the same command continues") from None  # fmt: skip
        state.wait_for_everyone()
        if state.is_main_process and args.chain is not None:
            write_chain(args.chain, config, network, low_res=condition, **common)
        if state.is_main_process:
            store.finish(todo)
            terminal.print_line(f"{n} images: {store.out.resolve()}")


def choose_n(args: argparse.Namespace, config: Config, low_res: LowRes, form: Form) -> int:
    """How many images to generate. Raises UsageError if they are too many."""
    n: int = args.n or (config.sample.n if low_res.images is None else len(low_res.images))
    if low_res.images is not None and n > len(low_res.images):
        raise UsageError(f"--n is {n}, and --low_res {args.low_res} holds {len(low_res.images)} images")
    if form == "grid" and n > MAX_IN_GRID:
        raise UsageError(f"--n is {n}, and a grid shows up to {MAX_IN_GRID}: add --images or --npz")
    return n


def write_chain(path: Path, config: Config, network: torch.nn.Module, **options: Any) -> None:
    """Generate the first image, and write its steps: x_t and the predicted x_0 as a strip, the latter as a GIF, too."""
    recorder = Recorder(config.sampling_process())
    [_] = generate(config, network, [range(1)], watch=recorder.watch, **options)
    x_t, pred_xstart = (to_uint8(torch.cat([x[:1] for x in kind])) for kind in zip(*recorder.steps, strict=True))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_grid(torch.cat([x_t, pred_xstart]), path, columns=len(x_t), by="sample")
    save_gif(pred_xstart, path.with_suffix(".gif"))
    terminal.print_line(f"steps of the first image: {path.resolve()}")


def with_flags(config: Config, args: argparse.Namespace) -> Config:
    """The run's configuration with the flags of this command in its section `sample`. Raises UsageError if they do
    not fit, with the flag's name."""
    given = {name: getattr(args, name) for name in ("sampler", "steps", "guidance") if getattr(args, name) is not None}
    known = sampler_options(args.sampler or config.sample.sampler)
    options = {name: value for name, value in config.sample.options.items() if name in known}
    if args.sampler not in (None, config.sample.sampler):
        given.setdefault("steps", None)  # another sampler, with its own usual steps
    try:
        sample = dataclasses.replace(config.sample, **given, options=options | args.options)
        return dataclasses.replace(config, sample=sample)
    except UsageError as error:
        raise UsageError(str(error).replace("sample.options.", "--").replace("sample.", "--")) from None


def open_store(
    args: argparse.Namespace, form: Form, saved: Checkpoint, config: Config, n: int, labels: list[int] | None,
    low_res: LowRes, state: Any,
) -> SampleStore:  # fmt: skip
    """The store that all processes write to, begun or continued. Raises UsageError if it cannot be written."""
    from accelerate.utils import broadcast_object_list

    sample = config.sample
    settings = dict(
        checkpoint=saved.path.name, weights=saved.fingerprint(args.ema), sampler=sample.sampler,
        steps=config.sample_steps(), options=sample.options, guidance=sample.guidance, seed=args.seed,
        batch_size=args.batch_size, device=state.device.type, low_res=low_res.fingerprint(),
    )  # fmt: skip

    def at(out: Path) -> SampleStore:
        return SampleStore(out, form, n, config.data.shape, labels, settings, config.data.range,
                           saved.class_names if args.captions else ())  # fmt: skip

    guided = f"_guidance{sample.guidance:g}" if sample.guidance != 1 else ""
    steps = config.sampling_process().num_timesteps
    name = f"{saved.path.name}_{sample.sampler}{steps}_seed{args.seed}{guided}{SUFFIXES[form]}"
    default = (locate(saved.path).run or Path()) / "samples" / name
    where = [args.out]
    if state.is_main_process:
        try:
            terminal.check_writable((args.out or default).parent, f"--out {args.out or default}")
            store = at(args.out) if args.out else begin_unused(default, at)
            if args.out:
                store.begin()
        except BlockingIOError:
            raise UsageError(f"--out {args.out} is in use by another process that writes there") from None
        except FileExistsError as error:
            raise UsageError(f"--out {error}") from None
        where = [store.out]
    broadcast_object_list(where)
    return store if state.is_main_process else at(where[0])


def check_outputs(out: Path | None, chain: Path | None, form: Form) -> None:
    """Raise UsageError if what `--out` and `--chain` name cannot be written."""
    if chain is not None and out in (chain, chain.with_suffix(".gif"), *chain.parents[:-1]):
        raise UsageError(f"--chain {chain} lies in --out {out}, or is it: name another")
    if chain is not None:
        for suffix in (".png", ".gif"):
            terminal.check_output(chain if suffix == ".png" else chain.with_suffix(suffix), "--chain", suffix)
    if out is not None and form != "images":
        terminal.check_output(out, "--out", SUFFIXES[form], instead=", or add --images")
    elif out is not None:
        check_no_dangling_link(out)
        with prefixed(f"--out {out} "):
            check_not_a_runs(out)
            if out.exists() and not out.is_dir():
                raise UsageError("is a file: name a folder")


def open_low_res(saved: Checkpoint, path: Path | None, classes_given: bool) -> LowRes:
    """What `--low_res` names. Raises UsageError if it is missing or does not fit."""
    data, size = saved.config.data, saved.config.data.low_res_size
    if (path is None) != (size is None):
        wrong = f"--low_res is {path}, but {saved.path} is not an upsampler"
        missing = f"{saved.path} is an upsampler: name the small images, or a run that generates them, with --low_res"
        raise UsageError(missing if path is None else wrong)
    if path is None or size is None:
        return LowRes()
    if not path.exists():
        raise UsageError(f"--low_res {path} is not there")
    small = (data.channels, *data.low_res_sizes)
    if is_run_or_checkpoint(path):
        base, weights = terminal.open_run(path)
        if (base.config.data.shape, base.config.data.low_res_size) != (small, None):
            kind = "an upsampler" if base.config.data.low_res_size is not None else "a run"
            raise UsageError(f"--low_res {path} is {kind} of {base.config.data.shape}; {saved.path} enlarges {small}")
        if base.class_names and saved.class_names not in ((), base.class_names):
            raise UsageError(f"--low_res {path} has other classes than {saved.path}")
        return LowRes(base=(base, weights))
    if path.is_dir():
        folder = Folder(path=str(path), image_size=data.low_res_sizes, channels=data.channels,
                        range=data.range).open()  # fmt: skip
        images, y = load(folder, range(len(folder)))
        known = folder.class_names and set(folder.class_names) <= set(saved.class_names)
        labels = [saved.class_names.index(folder.class_names[i]) for i in y] if known else None
    elif path.suffix == ".npz":
        images, labels = read_npz(path, len(saved.class_names), data.range)
    else:
        raise UsageError(f"--low_res is {path}; it must be a run, a folder of images, or an .npz that --npz wrote")
    if images.shape[1:] != small:
        raise UsageError(f"--low_res {path} holds images of {tuple(images.shape[1:])}; {saved.path} enlarges {small}")
    if saved.class_names and labels is None and not classes_given:
        raise UsageError(f"--low_res {path} does not say the classes, which {saved.path} needs: add --classes")
    return LowRes(images, labels)


def read_npz(path: Path, num_classes: int, declared: tuple[float, float] | None) -> tuple[Tensor, list[int] | None]:
    """The images (N, C, *sizes) of a file that `--npz` wrote, and their labels, if it has any."""
    try:
        if not path.is_file():
            raise ValueError("it is not a file")
        with np.load(path, allow_pickle=False) as arrays:
            images, labels = arrays["arr_0"], arrays["arr_1"] if "arr_1" in arrays and num_classes else None
        if images.ndim < 3 or (declared is None and images.dtype != np.uint8) or len(images) == 0:
            raise ValueError(f"arr_0 is {images.shape} {images.dtype}, not (N, H, W, C) uint8")
        images = scale(images, declared)
        whole = labels is None or (labels.shape == images.shape[:1] and labels.dtype.kind in "iu")
        if labels is not None and not (whole and ((labels >= 0) & (labels < num_classes)).all()):
            raise ValueError(f"arr_1 is {labels.shape} {labels.dtype}, not a class below {num_classes} for each")
    except Exception as error:  # numpy raises OSError, KeyError, ValueError, BadZipFile, ...
        raise UsageError(f"--low_res {path} is not an array that --npz wrote: {error}") from None
    return torch.from_numpy(np.moveaxis(images, -1, 1).copy()), None if labels is None else labels.tolist()
