"""`diffusion train`: train a model, or continue a run."""

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from diffusion.commands.command_line import parse_command_line
from diffusion.commands.report import write_report
from diffusion.commands.terminal import print_line, progress_bar
from diffusion.errors import one_line
from diffusion.parallel.launchers import check_launcher, with_launchers_settings

if TYPE_CHECKING:
    from diffusion.training.trainer import Trainer

SLOWER = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"
"""Variables of the environment that may cost speed."""


def announce(trainer: "Trainer") -> None:
    """Print where and how a run begins, and what was found in the data."""
    from diffusion.training.data import describe_run

    config, device = trainer.config, trainer.accelerator.device.type
    origin = f" with the weights of {trainer.origin['path']}" if trainer.origin else ""
    begins = f"continues after step {trainer.step}" if trainer.step else f"begins{origin}"
    precision = f", {mixed}" if (mixed := trainer.accelerator.mixed_precision) != "no" else ""
    where = f"{trainer.accelerator.num_processes} x {device}"
    where += f" of {torch.get_num_threads()} threads" if device == "cpu" else ""
    slower = [f"{name}={os.environ[name]}" for name in SLOWER if name in os.environ and device == "cpu"]
    where += f", with {', '.join(slower)}, which may cost speed" if slower else ""
    print_line(f"run {trainer.out.resolve()} {begins}: {len(trainer.dataset)} images, on {where}{precision}")
    lines = describe_run(config, trainer.data)
    for line in lines:
        print_line(f"  {line}")
    if trainer.step == 0:
        trainer.describe([*lines, f"begun by: {shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}"])


def main() -> None:
    command = parse_command_line(sys.argv[1:])
    check_launcher()
    config = with_launchers_settings(command.config).resolved()
    if command.dry_run:
        from diffusion.training.dry_run import dry_run

        for line in dry_run(config):
            print_line(line)
        return

    from diffusion.training.trainer import Trainer  # after parsing, so that --help and typos are answered at once

    name = Path(sys.argv[0]).name
    trainer = Trainer(config, command.out, warn=lambda message: print_line(f"{name}: {message}", error=True))
    config, main_process = trainer.config, trainer.accelerator.is_main_process
    if main_process:
        announce(trainer)
    if trainer.step < config.train.steps:
        train(trainer)
    elif not trainer.last_grid.exists():  # interrupted by a signal
        trainer.sample()
    trainer.close()
    if main_process:
        finish(trainer)


def train(trainer: "Trainer") -> None:
    """Train to the last step, with a bar."""
    bar = progress_bar(trainer.config.train.steps, trainer.accelerator.is_main_process, done=trainer.step)

    def on_step(step: int, metrics: dict[str, Any] | None) -> None:
        if metrics:
            loss = "none" if metrics["loss"] is None else f"{metrics['loss']:.4f}"
            bar.set_postfix_str(f"loss {loss}, {metrics['images_per_second']:.0f} images/s", refresh=False)
        bar.update()

    with bar:
        trainer.run(on_step)


def finish(trainer: "Trainer") -> None:
    """Write the page of a run that is done, and print what there is."""
    out = trainer.out
    print_line(f"run {out.resolve()} is done: {trainer.step} steps")
    try:
        write_report([out], out / "report.html")
        print_line(f"report: {(out / 'report.html').resolve()}")
    except Exception as error:  # of any type: it can be written later, and the run is done
        print_line(f"{Path(sys.argv[0]).name}: no report: {one_line(error)}", error=True)
    if (out / "best").exists():
        print_line(f"best by held-out loss: {(out / 'best').resolve().name} (--ckpt {out / 'best'})")
    print_line(f"images: {trainer.last_grid.resolve()}")
