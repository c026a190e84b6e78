"""Weights of other codebases, in and out: `python -m diffusion.convert openai|diffusers SOURCE --out TARGET`.

A run becomes the other's format; anything else becomes a run, whose step is 0 and which `sample.py`, `evaluate.py` and
`train.py` (fine-tuning) take as their own. `openai` is the format of improved-diffusion and guided-diffusion;
`diffusers` a pipeline's folder of the library of that name.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from diffusion import checkpoint
from diffusion.errors import UsageError
from diffusion.interop_diffusers import read_pipeline, write_pipeline
from diffusion.interop_openai import flags_from_config, from_openai
from diffusion.launch import Parser, check_writable, exit_code, opened


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="diffusion.convert", description="Weights of other codebases, in and out.", allow_abbrev=False,
        epilog="A run becomes the other's format; anything else becomes a run.",
    )  # fmt: skip
    parser.add_argument("format", choices=["openai", "diffusers"])
    parser.add_argument(
        "source", type=Path, help="a run's folder, a .pt file (openai), a pipeline's folder (diffusers)"
    )
    parser.add_argument("--out", type=Path, required=True, help="a new folder, or a new .pt file")
    parser.add_argument("--flags", help="openai, to a run: the flags of their README for this checkpoint")
    parser.add_argument("--class_names", type=Path, help="to a run: a text file with a class's name a line, in order")
    parser.add_argument("--ema", help="from a run: which moving average, or none for the weights in training")
    parser.add_argument("--ddim", action="store_true", help="diffusers, from a run: a DDIMPipeline, of the mean only")
    return parser.parse_args(argv)


def main() -> None:
    args = parse(sys.argv[1:])
    if not args.source.exists():
        raise UsageError(f"{args.source} is not there")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise UsageError(f"--out {args.out} is there already: name a new one")
    is_run = args.source.is_dir() and ((args.source / "checkpoints").is_dir() or (args.source / "state.json").exists())
    for name, wanted in (("flags", args.format == "openai" and not is_run), ("class_names", not is_run),
                         ("ema", is_run), ("ddim", args.format == "diffusers" and is_run)):  # fmt: skip
        if getattr(args, name) and not wanted:
            raise UsageError(f"--{name} has no meaning for {args.format} from {'a run' if is_run else args.source}")
    check_writable(args.out.parent, f"--out {args.out}")
    if is_run:
        export(args)
    else:
        take_in(args)


def export(args: argparse.Namespace) -> None:
    """A run to the other's format."""
    saved = opened(args.source)
    weights = saved.chosen_weights(args.ema)
    saved.network(weights)  # raises where they are not its own
    if args.format == "diffusers":
        write_pipeline(saved, weights, args.out, args.ddim)
        print(f"{'DDIMPipeline' if args.ddim else 'DDPMPipeline'}: {args.out.resolve()}")
        if saved.class_names:
            print("its pipeline passes no classes: call its unet with class_labels (README, Other formats)")
    else:
        torch.save(dict(weights), args.out)
        print(f"state dict: {args.out.resolve()}")
        try:
            print(f"guided-diffusion's flags: {flags_from_config(saved.config, len(saved.class_names))}")
        except UsageError as error:
            print(f"load it into their UNetModel by hand: {error}")


def take_in(args: argparse.Namespace) -> None:
    """The other's format to a run."""
    if args.format == "diffusers":
        config, names, weights = read_pipeline(args.source)
    elif args.flags is None:
        raise UsageError("--flags is missing: the flags of their README for this checkpoint, or '' for none")
    else:
        config, num_classes, weights = from_openai(args.source, args.flags)
        names = tuple(map(str, range(num_classes)))
    if args.class_names:
        given = tuple(args.class_names.read_text().splitlines())
        if len(set(given)) != len(names):
            raise UsageError(
                f"--class_names {args.class_names} has {len(set(given))} different names; the weights have {len(names)}"
            )
        names = given
    with torch.device("meta"):
        network = config.network(len(names))
    checkpoint.check_fits(network, weights, args.source)
    checkpoint.save(
        checkpoint.checkpoint_folder(args.out, 0), step=0, config=config, class_names=names, weights=weights,
        averages={}, training={"optimizer": {"state": {}}, "scaler": None, "importance": None},
    )  # fmt: skip
    config.save(args.out / "config.yaml")
    (args.out / "metrics.jsonl").touch()
    print(f"run: {args.out.resolve()} ({config.diffusion.steps} {config.diffusion.schedule} steps, "
          f"variance {config.diffusion.variance}, timesteps {'' if config.diffusion.rescale_timesteps else 'not '}"
          "rescaled to 1000)")  # fmt: skip


if __name__ == "__main__":
    sys.exit(exit_code(main))
