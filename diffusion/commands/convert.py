"""Weights of other codebases, in and out: `diffusion convert openai|diffusers SOURCE --out TARGET`.

A run becomes the other's format; anything else becomes a run, whose step is 0 and which `sample.py`, `evaluate.py` and
`train.py` (fine-tuning) take as their own. `openai` is the format of improved-diffusion and guided-diffusion;
`diffusers` a pipeline's folder of the library of that name.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError

from diffusion.commands.terminal import Parser, check_writable, non_empty_path, open_run, print_line
from diffusion.config.files import save_config
from diffusion.errors import UsageError, one_line, prefixed
from diffusion.interop.diffusers import pipeline_writer, read_pipeline
from diffusion.interop.openai import flags_from_config, from_openai
from diffusion.run import checkpoint
from diffusion.run.folder import check_not_a_runs


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(allow_abbrev=False, description="Weights of other codebases, in and out. A run becomes the other's "
                    "format; anything else becomes a run.")  # fmt: skip
    parser.add_argument("format", choices=["openai", "diffusers"])
    parser.add_argument("source", type=non_empty_path, help="a run, a .pt file (openai), or a pipeline (diffusers)")
    parser.add_argument("--out", type=non_empty_path, required=True, help="a new folder, or a new .pt file")
    parser.add_argument("--flags", help="openai, to a run: the flags of their README for this checkpoint")
    parser.add_argument("--class_names", type=non_empty_path, help="to a run: a text file, one class name per line")
    parser.add_argument("--ema", help="from a run: which moving average, or none for the weights in training")
    parser.add_argument("--ddim", action="store_true", help="diffusers, from a run: a DDIMPipeline, of the mean only")
    return parser.parse_args(argv)


def main() -> None:
    args = parse(sys.argv[1:])
    if not args.source.exists():
        raise UsageError(f"{args.source} is not there")
    if not args.out.name or (os.path.lexists(args.out) and (not args.out.is_dir() or any(args.out.iterdir()))):
        raise UsageError(f"--out {args.out} is there already: name a new one")
    with prefixed(f"--out {args.out} "):
        check_not_a_runs(args.out)
    is_run = args.source.is_dir() and checkpoint.is_run_or_checkpoint(args.source)
    if args.out.is_dir() and is_run and args.format == "openai":
        raise UsageError(f"--out {args.out} is a folder: name a new .pt file")
    for name, wanted in (("flags", args.format == "openai" and not is_run), ("class_names", not is_run),
                         ("ema", is_run), ("ddim", args.format == "diffusers" and is_run)):  # fmt: skip
        if getattr(args, name) and not wanted:
            raise UsageError(f"--{name} has no meaning for {args.format} from {'a run' if is_run else args.source}")
    check_writable(args.out.parent, f"--out {args.out}")
    write, says = export(args) if is_run else take_in(args)
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        # Elsewhere first, so that an incomplete file is never used.
        with tempfile.TemporaryDirectory(dir=args.out.parent, prefix=".") as folder:
            write(Path(folder, args.out.name))
            Path(folder, args.out.name).replace(args.out)
    except (OSError, RuntimeError, SafetensorError) as error:  # types raised for a full disk
        raise UsageError(f"--out {args.out} cannot be written: {one_line(error)}") from None
    print_line(f"{args.out.resolve()}: {says}")


def export(args: argparse.Namespace) -> tuple[Callable[[Path], None], str]:
    """Export a run: a function that writes it, and a message."""
    saved, weights = open_run(args.source, args.ema)
    _check(saved.network(weights).state_dict(), args.source)
    if args.format == "diffusers":
        kind = "DDIMPipeline" if args.ddim else "DDPMPipeline"
        classes = "; it passes no classes: call its unet with class_labels (docs/formats.md)"
        return pipeline_writer(saved, weights, args.ddim), kind + (classes if saved.class_names else "")
    if not saved.config.model.use_norm:
        raise UsageError(f"{args.source} is a network without normalisation, and the published code has none such")
    try:
        says = f"a state dict; guided-diffusion's flags: {flags_from_config(saved.config, len(saved.class_names))}"
    except UsageError as error:
        says = f"a state dict, to be loaded into their UNetModel by hand: {error}"
    return partial(torch.save, dict(weights)), says


def take_in(args: argparse.Namespace) -> tuple[Callable[[Path], None], str]:
    """Import a model: a function that writes a run, and a message."""
    if args.format == "diffusers":
        config, names, weights = read_pipeline(args.source)
    elif args.flags is None:
        raise UsageError("--flags is missing: the flags of their README for this checkpoint, or '' for none")
    else:
        config, num_classes, weights = from_openai(args.source, args.flags)
        names = tuple(map(str, range(num_classes)))
    if args.class_names:
        names = _read_names(args.class_names, len(names))
    with torch.device("meta"):
        network = config.network(len(names))
    checkpoint.check_fits(network, weights, args.source)
    _check(weights, args.source)
    weights = {name: value.float().clone(memory_format=torch.contiguous_format) for name, value in weights.items()}

    def write(out: Path) -> None:
        out.mkdir()
        checkpoint.save(checkpoint.checkpoint_folder(out, 0), 0, config, names, weights, averages={}, training={})
        save_config(config, out / "config.yaml")
        (out / "metrics.jsonl").touch()

    scale = "rescaled to 1000" if config.diffusion.rescale_timesteps else "as they are"
    process = f"{config.diffusion.steps} {config.diffusion.schedule} steps, variance {config.diffusion.variance}"
    return write, f"a run of {process}, timesteps {scale}"


def _check(weights: checkpoint.Weights, source: Path) -> None:
    """Raise UsageError, with the name of the first weight that is not dense or not finite."""
    for name, value in weights.items():
        dense = value.layout == torch.strided and value.device.type == "cpu" and value.is_floating_point()
        if not dense or not value.float().isfinite().all():
            kind = "with numbers that are not finite" if dense else f"of {value.dtype}, {value.layout}, {value.device}"
            raise UsageError(f"{source} has {name} {kind}: weights are dense and of finite real numbers")


def _read_names(path: Path, wanted: int) -> tuple[str, ...]:
    try:
        if not path.is_file():
            raise OSError("it is no file")
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--class_names {path} cannot be read: {error}") from None
    if len(set(names)) != wanted or len(names) != wanted or not all(names):
        different = len(set(names) - {""})
        raise UsageError(f"--class_names {path} has {different} different names, {len(names)} in all; wanted: {wanted}")
    return tuple(names)
