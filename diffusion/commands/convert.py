"""Weights of other codebases, in and out: `diffusion convert openai|dit|sit|diffusers SOURCE --out TARGET`.

A run becomes the other's format; anything else becomes a run, whose step is 0 and which `sample.py`, `evaluate.py` and
`train.py` (fine-tuning) take as their own. `openai` is the format of improved-diffusion and guided-diffusion,
`dit` and `sit` (which goes one way) of the codes of those names, `diffusers` a pipeline's folder of the library.
"""

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError

from diffusion.commands.terminal import Parser, check_writable, non_empty_path, number_from, open_run, print_line
from diffusion.config.files import save_config
from diffusion.config.schema import DiffusionConfig
from diffusion.errors import UsageError, refusing
from diffusion.interop.card import card, grid_of
from diffusion.interop.diffusers import check_plain, pipeline_writer, read_pipeline
from diffusion.interop.dit import check_dit, from_dit
from diffusion.interop.openai import check_unet, from_openai
from diffusion.run import checkpoint
from diffusion.run.folder import is_checkpoint, is_run, mark_run


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(allow_abbrev=False, description="A run becomes the other's format; anything else becomes a run.")
    parser.add_argument("format", choices=["openai", "dit", "sit", "diffusers"])
    text = "a run, a .pt file (openai, dit, sit), or a pipeline (diffusers)"
    parser.add_argument("source", type=non_empty_path, help=text)
    parser.add_argument("--out", type=non_empty_path, required=True, help="a new folder, or a new .pt file")
    parser.add_argument("--flags", help="openai, to a run: the flags of their README for this checkpoint")
    text = "dit and sit, to a run: attention heads (default: those of the published width)"
    parser.add_argument("--num_heads", type=number_from(1), help=text)
    parser.add_argument("--ema", help="from a run: which moving average, or none for the weights in training")
    return parser.parse_args(argv)


def main() -> None:
    args = parse(sys.argv[1:])
    if not args.source.exists():
        raise UsageError(f"{args.source} does not exist")
    if os.path.lexists(args.out):
        raise UsageError(f"--out {args.out} exists: name a new one")
    check_writable(args.out.parent, f"--out {args.out}")
    from_run = is_run(args.source) or is_checkpoint(args.source)
    meant = {"flags": args.format == "openai" and not from_run, "ema": from_run}
    meant["num_heads"] = args.format in ("dit", "sit") and not from_run
    if odd := [name for name in meant if getattr(args, name) and not meant[name]]:
        raise UsageError(f"--{odd[0]} has no meaning for {args.format} from {'a run' if from_run else args.source}")
    write, summary = export(args) if from_run else take_in(args)
    full_disk = OSError, RuntimeError, SafetensorError
    with refusing(lambda reason: f"--out {args.out} cannot be written: {reason}", full_disk):
        args.out.parent.mkdir(parents=True, exist_ok=True)
        # Elsewhere first, so that an incomplete file is never used.
        with tempfile.TemporaryDirectory(dir=args.out.parent, prefix=".") as folder:
            write(Path(folder, args.out.name))
            Path(folder, args.out.name).replace(args.out)
    print_line(f"{args.out.resolve()}: {summary}")


def export(args: argparse.Namespace) -> tuple[Callable[[Path], None], str]:
    """Export a run: a function that writes it, and a summary."""
    run = open_run(args.source, args.ema)
    saved, weights = run.saved, run.network.state_dict()
    _check_finite(weights, args.source)
    if args.format == "sit":
        raise UsageError("sit goes one way: its weights become a run")
    check_plain(run, args.format)
    if args.format in ("openai", "dit"):
        name = (check_unet if args.format == "openai" else check_dit)(saved.config)
        summary = f"a state dict of the published {name}, for {_process(saved.config.diffusion)}"
        return lambda out: torch.save(weights, out), summary
    classes = "; it passes no classes: call its unet with class_labels (docs/formats.md)" if saved.class_names else ""
    write, grid = pipeline_writer(saved, weights), grid_of(run)

    def with_card(out: Path) -> None:
        write(out)
        text = card(run, out.name, grid and Path("samples.png"), is_pipeline=True)
        (out / "README.md").write_text(text, encoding="utf-8")
        if grid:
            shutil.copyfile(grid, out / "samples.png")

    return with_card, f"DDPMPipeline{classes}"


def take_in(args: argparse.Namespace) -> tuple[Callable[[Path], None], str]:
    """Import a model: a function that writes a run, and a summary."""
    if args.format == "diffusers":
        config, names, weights = read_pipeline(args.source)
    elif args.format in ("dit", "sit"):
        config, names, weights = from_dit(args.source, args.num_heads, flow=args.format == "sit")
    elif args.flags is None:
        raise UsageError("--flags is missing: the flags of their README for this checkpoint, or '' for none")
    else:
        config, names, weights = from_openai(args.source, args.flags)
    with torch.device("meta"):
        network = config.network(len(names))
    checkpoint.check_fits(network, weights, args.source)
    _check_finite(weights, args.source)
    weights = {name: value.float().clone(memory_format=torch.contiguous_format) for name, value in weights.items()}

    def write(out: Path) -> None:
        out.mkdir()
        checkpoint.save(checkpoint.checkpoint_folder(out, 0), 0, config, names, weights, averages={}, training={})
        save_config(config, out / "config.yaml")
        mark_run(out, [f"converted from {args.source.name}"])

    process, classes = config.diffusion, f"{len(names)} classes"
    scale = "rescaled to 1000" if process.rescale_timesteps else "as they are"
    return write, f"a run of {_process(process)}, variance {process.variance}, timesteps {scale}, {classes}"


def _process(process: DiffusionConfig) -> str:
    return f"{process.steps} {process.schedule} steps that predict {process.prediction}"


def _check_finite(weights: checkpoint.Weights, source: Path) -> None:
    for name, value in weights.items():
        if not value.is_floating_point() or not value.float().isfinite().all():
            raise UsageError(f"{source} has {name} ({value.dtype}): weights must be finite real numbers")
