"""Bits per dimension of a data set under a trained model: `python evaluate.py --ckpt RUN`. See --help."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from functools import partial
from pathlib import Path

from diffusion.config import check_range
from diffusion.errors import UsageError
from diffusion.files import replace_text
from diffusion.launch import (
    Parser,
    a_path,
    accelerate_starts,
    check_launcher,
    check_writable,
    counted,
    exit_code,
    on_cpu,
    opened,
    progress_bar,
    say,
)
from diffusion.run_folder import check_writable_file

IMAGES = {"digits": (8, 1), "mnist": (28, 1), "cifar10": (32, 3)}
"""Size and channels of the images of each data set that has but one."""


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="evaluate.py", allow_abbrev=False, description="Bits per dimension of images under a trained model."
    )
    add = parser.add_argument
    add("--ckpt", type=a_path, required=True, help="a run's folder (its newest checkpoint is used) or a checkpoint's")
    add("--data.name", dest="data_name", choices=["digits", "mnist", "cifar10", "folder"],
        help="which data set (default: the run's)")  # fmt: skip
    add("--data.path", dest="data_path", help="where the data lie (default: where the run had them)")
    add("--split", choices=["train", "test"], default="train", help="of mnist and cifar10 (default: train)")
    add("--n", type=int, help="score the first n images only (default: all)")
    add(
        "--steps",
        default="",
        help="steps of the bound: a count, or sections like 10,15,20 (default: all of training's)",
    )
    add("--ema", help="a moving average's rate, or none for the weights in training (default: the run's first)")
    add("--seed", type=int, default=0, help="of the noise, which for an image depends on nothing else (default: 0)")
    add("--batch_size", type=int, default=64, help="images scored at once (default: 64)")
    add("--out", type=a_path, help="write the figures there too, as JSON")
    return parser.parse_args(argv)


def is_figures(path: Path) -> bool:
    """Whether a file is what an earlier call wrote, which may be replaced."""
    try:
        return "bits_per_dim" in json.loads(path.read_bytes())
    except (ValueError, TypeError, RecursionError):
        return False


def main() -> None:
    args = parse(sys.argv[1:])
    check_launcher()
    for name, value, least in (("--n", args.n, 1), ("--batch_size", args.batch_size, 1), ("--seed", args.seed, 0)):
        if value is not None:
            check_range(name, value, least)
    if args.out is not None:
        check_writable_file(args.out)
    saved, weights = opened(args.ckpt, args.ema)
    data = saved.config.data
    if args.data_name is not None:
        there, wanted = IMAGES.get(args.data_name), (data.image_size, data.channels)
        if args.data_name != data.name and there not in (None, wanted):
            raise UsageError(
                f"--data.name is {args.data_name}, whose images are of (size, channels) {there}; "
                f"the model's are {wanted}"
            )
        data = dataclasses.replace(data, name=args.data_name, path=None, random_flip=False)
    if args.data_path is not None:
        data = dataclasses.replace(data, path=args.data_path)
    if args.split == "test" and data.name not in ("mnist", "cifar10"):
        raise UsageError(f"--split is test, but {data.name} has no such part: use another folder with --data.path")
    process = saved.config.diffusion.process(args.steps)
    if args.out is not None:
        if args.out.is_dir():
            raise UsageError(f"--out {args.out} is a folder: name a .json file")
        if args.out.is_file() and not is_figures(args.out):
            raise UsageError(f"--out {args.out} is there already, and holds no figures of evaluate.py: name another")
        check_writable(args.out.parent, f"--out {args.out}")

    import torch
    from accelerate import PartialState
    from accelerate.utils import gather_object

    from diffusion.data import load, open_dataset, shrink, to_x_start
    from diffusion.likelihood import bits_per_dim
    from diffusion.randomness import picture_noise
    from diffusion.samplers import batches

    # Each image is scored once, so none may take the place of another.
    dataset = open_dataset(dataclasses.replace(data, on_error="fail"), train=args.split == "train")
    if saved.class_names and not saved.fits_classes(dataset.class_names):
        given = ", ".join(dataset.class_names) or "none"
        raise UsageError(f"the data's classes are {given}, and {', '.join(saved.class_names)} in {saved.path}")
    n = min(len(dataset), args.n or len(dataset))
    network = saved.network(weights).eval()

    with accelerate_starts():
        state = PartialState(cpu=on_cpu())
    network.to(state.device)
    share = math.ceil(n / state.num_processes)
    mine = range(min(n, state.process_index * share), min(n, (state.process_index + 1) * share))
    parts = [batch for batch, _ in batches(mine, args.batch_size)]
    bar = progress_bar(len(parts) * process.num_timesteps, state.is_main_process)
    # Sums over images of: 1, the bound, its square, the prior, and the terms of the bound.
    sums = torch.zeros(4 + process.num_timesteps, dtype=torch.float64)

    with bar:
        for batch in parts:
            images, y = load(dataset, batch)
            x_start = to_x_start(images.to(state.device))
            inputs = {"y": y.to(state.device)} if saved.class_names else {}
            if data.low_res_size is not None:
                inputs["low_res"] = shrink(x_start, data.low_res_size)
            noise = partial(picture_noise, batch, x_start.shape[1:], state.device, args.seed)
            bits = bits_per_dim(process, partial(network, **inputs), x_start, noise, progress=partial(counted, bar))
            total = bits.total.double().cpu()
            head = torch.stack([torch.ones_like(total), total, total**2, bits.prior.double().cpu()])
            sums += torch.cat([head.sum(1), bits.vb.double().sum(0).cpu()])
    count, bound, square, prior, *vb = torch.stack(gather_object([sums])).sum(0).tolist()
    if not math.isfinite(bound):
        raise UsageError(f"the bound is {bound}: the weights of {saved.path} or their process give no likelihood")
    deviation = math.sqrt(max(0.0, square / count - (bound / count) ** 2) * count / max(1, count - 1))
    figures = {
        "bits_per_dim": bound / count,
        "standard_error": deviation / math.sqrt(count),
        "prior": prior / count,
        "terms": [term / count for term in vb],
        "images": int(count),
        "steps": process.num_timesteps,
    }
    if state.is_main_process:
        wrong = None
        if args.out:  # before anything that a closed terminal could end
            try:
                replace_text(args.out, json.dumps(figures, allow_nan=False))
            except OSError as error:
                wrong = UsageError(f"--out {args.out} cannot be written: {error.strerror}")
        say(f"{figures['bits_per_dim']:.4f} +- {figures['standard_error']:.4f} bits per dimension: "
            f"{int(count)} images, {process.num_timesteps} steps, {saved.path}")  # fmt: skip
        say(
            f"prior {figures['prior']:.6f}; the terms by quarter of t: "
            + ", ".join(f"{sum(figures['terms'][q * len(vb) // 4 : (q + 1) * len(vb) // 4]):.4f}" for q in range(4))
        )
        if wrong:
            raise wrong


if __name__ == "__main__":
    sys.exit(exit_code(main))
