"""Draw pictures with a trained model: `python sample.py --ckpt RUN`. See --help."""

from __future__ import annotations

import argparse
import difflib
import math
import sys
from functools import partial
from pathlib import Path

from diffusion.checkpoint import Checkpoint, open_checkpoint
from diffusion.config import check_range
from diffusion.errors import UsageError
from diffusion.launch import Parser, check_launcher, check_writable, counted, exit_code, on_cpu, progress_bar


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="sample.py", description="Draw pictures with a trained model.", allow_abbrev=False)
    add = parser.add_argument
    add("--ckpt", type=Path, required=True, help="a run's folder (its newest checkpoint is used) or a checkpoint's")
    add("--n", type=int, help="how many pictures (default: as in the run's grids)")
    add("--classes", help="class numbers or names, separated by commas, taken in turn (default: all of them)")
    add("--sampler", choices=["ddpm", "ddim"], help="default: as in the run's grids")
    add("--steps", help="sampling steps: a count, sections like 10,15,20, or ddim50 (default: as in the run's grids)")
    add("--eta", type=float, help="noise of ddim: 0 none (the default), 1 as much as ddpm")
    add("--seed", type=int, default=0, help="picture i of a seed is the same at any --n and --batch_size (default: 0)")
    add("--batch_size", type=int, default=64, help="pictures drawn at once (default: 64)")
    add("--ema", help="which moving average of the weights: a rate, or none for the weights in training "
                      "(default: the run's first)")  # fmt: skip
    add("--out", type=Path, help="where to write (default: RUN/samples/...)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--images", action="store_true", help="write a folder of one PNG each instead of a grid")
    form.add_argument("--npz", action="store_true", help="write arr_0 (N, H, W, C), uint8, and arr_1, the classes")
    return parser.parse_args(argv)


def main() -> None:
    args = parse(sys.argv[1:])
    check_launcher()
    saved = open_checkpoint(args.ckpt)
    config = saved.config
    sampler = args.sampler or config.sample.sampler
    n = config.sample.n if args.n is None else args.n
    for name, value, least in (("--n", n, 1), ("--batch_size", args.batch_size, 1), ("--seed", args.seed, 0)):
        check_range(name, value, least)
    if args.eta is not None and (sampler != "ddim" or not 0 <= args.eta <= 1):
        raise UsageError(f"--eta is {args.eta} with --sampler {sampler}: it belongs to ddim, and lies from 0 to 1")
    process = config.diffusion.process(config.sample.steps if args.steps is None else args.steps)
    labels = choose_labels(saved, args.classes)
    out = choose_out(saved, args, f"{sampler}{process.num_timesteps}_seed{args.seed}")
    network = saved.network(saved.chosen_weights(args.ema)).eval()

    import torch
    from accelerate import PartialState
    from accelerate.utils import gather

    from diffusion import pictures
    from diffusion.samplers import draw

    state = PartialState(cpu=on_cpu())
    share = math.ceil(n / state.num_processes)  # every process draws as many; the last one's surplus is cut off
    indices = range(state.process_index * share, (state.process_index + 1) * share)
    bar = progress_bar(math.ceil(share / args.batch_size) * process.num_timesteps, state.is_main_process)

    with bar:
        images = draw(
            sampler,
            process,
            network.to(state.device),
            (config.data.channels, config.data.image_size, config.data.image_size),
            indices=indices,
            labels=None if labels is None else torch.tensor([labels[i % len(labels)] for i in indices]),
            seed=args.seed,
            batch_size=args.batch_size,
            device=state.device,
            eta=args.eta or 0.0,
            progress=partial(counted, bar),
        )
    images = gather(pictures.to_uint8(images).to(state.device))[:n]
    if state.is_main_process:
        if args.images:
            pictures.save_images(images, out)
        elif args.npz:
            pictures.save_npz(images, None if labels is None else [labels[i % len(labels)] for i in range(n)], out)
        else:
            pictures.save_grid(images, out, pictures.grid_columns(n, len(labels or ())))
        print(f"{n} pictures: {out.resolve()}")


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


def choose_out(saved: Checkpoint, args: argparse.Namespace, name: str) -> Path:
    """The file or folder to write, which is made sure to be writable before anything is drawn."""
    suffix = "" if args.images else ".npz" if args.npz else ".png"
    run = saved.path.parent.parent if saved.path.parent.name == "checkpoints" else saved.path
    out: Path = args.out or _unused(run / "samples" / f"{saved.path.name}_{name}{suffix}")
    if not args.images and out.is_dir():
        raise UsageError(f"--out {out} is a folder: name a {suffix} file, or add --images")
    if not args.images and out.suffix != suffix:
        raise UsageError(f"--out {out} must end in {suffix}")
    if args.images and out.is_dir() and any(out.iterdir()):
        raise UsageError(f"--out {out} is not empty: name a new folder")
    check_writable(out if args.images else out.parent, f"--out {out}")
    return out


def _unused(path: Path) -> Path:
    """The path, or with a number where there is such a file already: no picture is overwritten unasked."""
    tried = [path.with_stem(f"{path.stem}_{i}") if i > 1 else path for i in range(1, 10_000)]
    return next(candidate for candidate in tried if not candidate.exists())


if __name__ == "__main__":
    sys.exit(exit_code(main))
