"""Draw pictures with a trained model: `python sample.py --ckpt RUN`. See --help."""

from __future__ import annotations

import argparse
import difflib
import hashlib
import sys
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from diffusion.checkpoint import Checkpoint, Weights, is_run_or_checkpoint
from diffusion.config import check_guidance, check_range
from diffusion.errors import UsageError
from diffusion.files import check_no_dangling_link
from diffusion.launch import (
    Parser,
    a_path,
    accelerate_starts,
    check_launcher,
    check_writable,
    counted,
    exit_code,
    launcher,
    on_cpu,
    opened,
    progress_bar,
    say,
)
from diffusion.process import GaussianDiffusion
from diffusion.run_folder import check_writable_file, locate

MAX_IN_GRID = 10_000
Form = Literal["grid", "images", "npz"]

Images = tuple[Tensor, list[int] | None]


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="sample.py", description="Draw pictures with a trained model.", allow_abbrev=False)
    add = parser.add_argument
    add("--ckpt", type=a_path, required=True, help="a run's folder (its newest checkpoint is used) or a checkpoint's")
    add("--n", type=int, help="how many pictures (default: as in the run's grids)")
    add(
        "--classes",
        help="class numbers or names, separated by commas, taken in turn (default: all of them, or those of --low_res)",
    )
    add("--sampler", choices=["ddpm", "ddim"], help="default: as in the run's grids")
    add("--steps", help="sampling steps: a count, sections like 10,15,20, or ddim50 (default: as in the run's grids)")
    add("--eta", type=float, help="noise of ddim: 0 none (the default), 1 as much as ddpm")
    add("--seed", type=int, default=0, help="picture i of a seed is the same at any --n and --batch_size (default: 0)")
    add("--guidance", type=float, help="classifier-free guidance: 1 none, above 1 clearer classes and less variety, "
                                       "0 no class at all (default: as in the run's grids)")  # fmt: skip
    add("--low_res", type=a_path, help="for an upsampler: a grid, an image, a folder or an .npz of small images "
                                     "(image files of other sizes are cut and shrunk as for training), or a run that "
                                     "draws them (with its own sampler and steps)")  # fmt: skip
    add("--batch_size", type=int, default=64, help="pictures drawn at once (default: 64)")
    add("--ema", help="which moving average of the weights: a rate, or none for the weights in training "
                      "(default: the run's first)")  # fmt: skip
    add("--out", type=a_path, help="where to write (default: RUN/samples/...)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--images",
        action="store_true",
        help="a folder of one PNG each (.npy above 4 channels), not a grid",
    )
    form.add_argument("--npz", action="store_true", help="write arr_0 (N, H, W, C), uint8, and arr_1, the classes")
    parser.epilog = "Each batch is written when it is drawn; the same command goes on where it was stopped."
    return parser.parse_args(argv)


def main() -> None:
    args = parse(sys.argv[1:])
    check_launcher()
    for name, value, least in (("--n", args.n, 1), ("--batch_size", args.batch_size, 1), ("--seed", args.seed, 0)):
        if value is not None:
            check_range(name, value, least)
    form: Form = "images" if args.images else "npz" if args.npz else "grid"
    if args.out is not None:
        check_out(args.out, form)
    saved, weights = opened(args.ckpt, args.ema)
    config = saved.config
    sampler = args.sampler or config.sample.sampler
    if args.eta is not None and (sampler != "ddim" or not 0 <= args.eta <= 1):
        raise UsageError(f"--eta is {args.eta} with --sampler {sampler}: it belongs to ddim, and lies from 0 to 1")
    guidance = config.sample.guidance if args.guidance is None else args.guidance
    check_range("--guidance", guidance, 0, most=1000)
    check_guidance("--guidance", guidance, config)
    steps = config.sample.steps if args.steps is None else args.steps
    process = config.diffusion.process(steps)

    import torch
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    from diffusion import pictures
    from diffusion.data import to_x_start
    from diffusion.samplers import batches, draw
    from diffusion.sampling import SUFFIXES, Samples, begin_unused
    from diffusion.signals import CutOff, StopSignals

    base, low_res = open_low_res(saved, args)
    labels = choose_labels(base[0] if base is not None and not saved.class_names else saved, args.classes)
    n = args.n or (config.sample.n if low_res is None else len(low_res[0]))
    if low_res is not None:
        if n > len(low_res[0]):
            raise UsageError(f"--n is {n}, and --low_res {args.low_res} holds {len(low_res[0])} images")
        if labels and args.classes is None:
            labels = low_res[1]
    if form == "grid" and n > MAX_IN_GRID:
        raise UsageError(f"--n is {n}, and a grid shows up to {MAX_IN_GRID}: add --images or --npz")

    with accelerate_starts():
        state = PartialState(cpu=on_cpu())
    shape = (config.data.channels, config.data.image_size, config.data.image_size)
    settings = dict(
        checkpoint=saved.path.name, weights=saved.sums[saved.chosen_file(args.ema)], sampler=sampler, steps=str(steps),
        eta=args.eta or 0.0, guidance=guidance, seed=args.seed, batch_size=args.batch_size, device=state.device.type,
        low_res=fingerprint(base, low_res),
    )  # fmt: skip

    def at(out: Path) -> Samples:
        return Samples(out, form, n, shape, labels, settings)

    network = saved.network(weights).eval().to(state.device)
    passes = process.num_timesteps
    if base is not None:  # the first stage of a cascade, drawn as its own grids are
        first, first_network = base[0].config, base[0].network(base[1]).eval().to(state.device)
        first_process = first.diffusion.process(first.sample.steps)
        passes += first_process.num_timesteps

    name = f"{sampler}{process.num_timesteps}_seed{args.seed}" + (f"_guidance{guidance:g}" if guidance != 1 else "")
    default = (locate(saved.path).run or Path()) / "samples" / f"{saved.path.name}_{name}{SUFFIXES[form]}"
    where = [args.out]
    if state.is_main_process:
        try:
            check_writable((args.out or default).parent, f"--out {args.out or default}")
            samples = at(args.out) if args.out else begin_unused(default, at)
            if args.out:
                samples.begin()
        except BlockingIOError:
            raise UsageError(f"--out {args.out} is in use by another process that draws there") from None
        except FileExistsError as error:
            raise UsageError(f"--out {error}") from None
        where = [samples.out]
    broadcast_object_list(where)
    if not state.is_main_process:
        samples = at(where[0])

    def drawn(run: Checkpoint, network: nn.Module, process: GaussianDiffusion, batch: range, **options: Any) -> Tensor:
        size = run.config.data.image_size
        chosen = torch.tensor([labels[i % len(labels)] for i in batch]) if labels and run.class_names else None
        return draw(
            process=process,
            model=network,
            shape=(config.data.channels, size, size),
            batch=batch,
            labels=chosen,
            seed=args.seed,
            device=state.device,
            progress=lambda steps: signals.watched(counted(bar, steps)),
            **options,
        )

    todo = [batch for batch, _ in batches(range(n), args.batch_size)]
    mine = [batch for batch in todo[state.process_index :: state.num_processes] if not samples.is_done(batch)]
    signals = StopSignals(1, launcher())
    bar = progress_bar(len(mine) * passes, state.is_main_process and bool(mine))
    with closing(samples), bar, signals:
        try:
            for batch in mine:
                small = None if low_res is None else to_x_start(low_res[0][batch.start : batch.stop])
                if base is not None:
                    small = drawn(base[0], first_network, first_process, batch, sampler=first.sample.sampler,
                                  guidance=first.sample.guidance)  # fmt: skip
                    small = to_x_start(pictures.to_uint8(small))
                images = drawn(saved, network, process, batch,
                               sampler=sampler, guidance=guidance, eta=args.eta or 0.0, low_res=small)  # fmt: skip
                samples.write(batch, images)
        except CutOff:
            done = sum(len(batch) for batch in todo if samples.is_done(batch))
            raise signals.stopped(f"with {done} of {n} images drawn, which lie in {samples.folder.resolve()}: "
                                  "the same command goes on") from None  # fmt: skip
        state.wait_for_everyone()
        if state.is_main_process:
            samples.finish(todo)
            say(f"{n} images: {samples.out.resolve()}")


def check_out(out: Path, form: Form) -> None:
    """Raise UsageError where `--out` cannot be what is to be written."""
    suffix = {"grid": ".png", "npz": ".npz", "images": ""}[form]
    check_writable_file(out)
    check_no_dangling_link(out)
    if form != "images":
        if out.is_dir():
            raise UsageError(f"--out {out} is a folder: name a {suffix} file, or add --images")
        if out.suffix != suffix:
            raise UsageError(f"--out {out} must end in {suffix}")
        if out.exists():
            raise UsageError(f"--out {out} is there already: name another, or remove it")
    elif out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file: name a folder")


def fingerprint(base: tuple[Checkpoint, Weights] | None, low_res: Images | None) -> object:
    """What tells small images, or the run that draws them, from others."""
    if base is not None:
        return base[0].sums[base[0].chosen_file()]
    return None if low_res is None else hashlib.sha256(low_res[0].numpy().tobytes()).hexdigest()


def open_low_res(
    saved: Checkpoint, args: argparse.Namespace
) -> tuple[tuple[Checkpoint, Weights] | None, Images | None]:
    """What `--low_res` names: a run that is to draw the small images, or the images and their labels."""
    path, size = args.low_res, saved.config.data.low_res_size
    if (path is None) != (size is None):
        raise UsageError(
            f"{saved.path} is an upsampler: name the small images, or a run that draws them, with --low_res"
            if path is None
            else f"--low_res is {path}, but {saved.path} is no upsampler"
        )
    if path is None or size is None:
        return None, None
    if not path.exists():
        raise UsageError(f"--low_res {path} is not there")
    channels = saved.config.data.channels
    if is_run_or_checkpoint(path):
        base, weights = opened(path)
        data = base.config.data
        if (data.image_size, data.channels, data.low_res_size) != (size, channels, None):
            kind = "an upsampler" if data.low_res_size is not None else "a run"
            drawn = f"{data.channels} channels at {data.image_size}x{data.image_size}"
            raise UsageError(f"--low_res {path} is {kind} of {drawn}; {saved.path} enlarges "
                             f"{channels} channels at {size}x{size}")  # fmt: skip
        if base.class_names and saved.class_names not in ((), base.class_names):
            raise UsageError(f"--low_res {path} has other classes than {saved.path}")
        return (base, weights), None
    images, labels = read_low_res(path, size, channels, saved.class_names)
    if images.shape[1:] != (channels, size, size):
        raise UsageError(f"--low_res {path} holds images of (channels, height, width) {tuple(images.shape[1:])}; "
                         f"{saved.path} enlarges {(channels, size, size)}")  # fmt: skip
    if saved.class_names and labels is None and args.classes is None:
        raise UsageError(f"--low_res {path} does not say the classes, which {saved.path} needs: add --classes")
    return None, (images, labels)


def read_low_res(path: Path, size: int, channels: int, class_names: tuple[str, ...]) -> Images:
    """Images (N, C, H, W), uint8, from a folder, an array (.npz of --npz), a grid of ours or an image file; and their
    labels, where these say them."""
    import numpy as np
    import torch

    from diffusion import pictures
    from diffusion.config import DataConfig
    from diffusion.data import load, open_dataset, read_image

    if path.is_dir():
        folder = open_dataset(DataConfig(name="folder", path=str(path), image_size=size, channels=channels))
        found, y = load(folder, range(len(folder)))
        if not set(folder.class_names) <= set(class_names) or not folder.class_names:
            return found, None
        return found, [class_names.index(folder.class_names[label]) for label in y]
    if path.suffix == ".npz":
        try:
            if not path.is_file():
                raise ValueError("it is no file")
            with np.load(path, allow_pickle=False) as arrays:
                images, labels = arrays["arr_0"], arrays["arr_1"] if "arr_1" in arrays and class_names else None
            if images.ndim != 4 or images.dtype != np.uint8 or len(images) == 0:
                raise ValueError(f"arr_0 is {images.shape} {images.dtype}, not (N, H, W, C) uint8")
            if labels is not None and (
                labels.shape != images.shape[:1]
                or labels.dtype.kind not in "iu"
                or not ((labels >= 0) & (labels < len(class_names))).all()
            ):
                raise ValueError(
                    f"arr_1 is {labels.shape} {labels.dtype}, not a class below {len(class_names)} for each"
                )
            return torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), None if labels is None else labels.tolist()
        except Exception as error:  # numpy raises OSError, KeyError, ValueError, BadZipFile, ...
            raise UsageError(f"--low_res {path} is no array that --npz wrote: {error}") from None
    grid = pictures.read_grid(path)
    if grid is None:
        return torch.from_numpy(read_image(path, size, channels).copy())[None], None
    images, labels = grid
    return images, labels if labels and max(labels) < len(class_names) else None


def choose_labels(saved: Checkpoint, wanted: str | None) -> list[int] | None:
    """The class numbers to draw in turn; None for a model without classes."""
    names = saved.class_names
    if not names:
        if wanted is not None:
            raise UsageError(f"--classes is {wanted}, but the model of {saved.path} has no classes")
        return None
    if wanted is None:
        return list(range(len(names)))
    labels = []
    for word in wanted.split(","):
        if word in names:
            labels.append(names.index(word))
        elif word.isdecimal() and word.isascii() and len(word) < 10 and int(word) < len(names):
            labels.append(int(word))
        else:
            near = difflib.get_close_matches(word, names, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names[:10])}" + (
                f" and {len(names) - 10} more" if len(names) > 10 else "")  # fmt: skip
            raise UsageError(
                f"--classes has {word!r}, which is no class name and no number from 0 to {len(names) - 1}: {hint}"
            )
    return labels


if __name__ == "__main__":
    sys.exit(exit_code(main))
