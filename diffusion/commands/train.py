"""`diffusion train`: train a model, or continue a run."""

from __future__ import annotations

import shlex
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from diffusion.commands.command_line import parse_command_line
from diffusion.commands.report import write_report
from diffusion.commands.terminal import print_line, progress_bar
from diffusion.errors import escape_control, one_line
from diffusion.files.atomic import replace_text
from diffusion.parallel.launchers import check_launcher, with_launchers_settings
from diffusion.run import folder as run_folder

if TYPE_CHECKING:
    from diffusion.training.trainer import Trainer


def go_back(out: Path, step: int) -> None:
    """Take the run back to an earlier checkpoint, and print where the later ones are."""
    aside = run_folder.go_back(out, step)
    later = f"; what came later is in {aside}" if aside else ", and has nothing later"
    print_line(
        f"run {out.resolve()} is back at step {step}{later}: the same command without --back_to continues from there"
    )


def announce(trainer: Trainer) -> None:
    """Print where and how a run begins, and what was found in the data."""
    from diffusion.training.data import describe_run

    config, out = trainer.config, trainer.out
    begun = f"continues after step {trainer.step}" if trainer.step else "begins"
    if trainer.origin and not trainer.step:
        begun = f"begins with the weights of {trainer.origin['path']}"
    precision = f", {config.train.precision}" if config.train.precision not in (None, "no") else ""
    where = f"{trainer.accelerator.num_processes} x {trainer.accelerator.device.type}"
    where += f" of {torch.get_num_threads()} threads" if trainer.accelerator.device.type == "cpu" else ""
    print_line(f"run {out.resolve()} {begun}: {len(trainer.dataset)} images, on {where}{precision}")
    lines = describe_run(config, trainer.data)
    for line in lines:
        print_line(f"  {line}")
    lines.append(f"begun by: {shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}")
    with suppress(OSError):  # a full disk is told where a checkpoint is written
        if trainer.step == 0:
            replace_text(out / "data.txt", "\n".join(map(escape_control, lines)) + "\n")  # for the report


def main() -> None:
    command = parse_command_line(sys.argv[1:])
    config, out = command.config, command.out
    check_launcher()
    if command.back_to is not None:
        go_back(out, command.back_to)
        return
    config = with_launchers_settings(config).resolved()
    if command.dry_run:
        from diffusion.training.dry_run import dry_run

        for line in dry_run(config):
            print_line(line)
        return

    from diffusion.training.trainer import Trainer  # after parsing, so that --help and typos are answered at once

    trainer = Trainer(config, out, warn=lambda message: print_line(f"{Path(sys.argv[0]).name}: {message}", error=True))
    config = trainer.config
    main_process = trainer.accelerator.is_main_process
    if main_process:
        announce(trainer)
    if trainer.step >= config.train.steps:
        if main_process:
            print_line(f"all {trainer.step} steps are done (train.steps is {config.train.steps})")
        if not trainer.last_grid.exists():  # interrupted by a signal
            trainer.sample()
            if main_process:
                print_line(f"images: {trainer.last_grid.resolve()}")
        trainer.close()
        return
    bar = progress_bar(config.train.steps, main_process, done=trainer.step)

    def on_step(step: int, metrics: dict[str, Any] | None) -> None:
        if metrics:
            loss = "none" if metrics["loss"] is None else f"{metrics['loss']:.4f}"
            bar.set_postfix_str(f"loss {loss}, {metrics['images_per_second']:.0f} images/s", refresh=False)
        bar.update()

    with bar:
        trainer.run(on_step)
    if main_process:
        print_line(f"run {out.resolve()} is done: {config.train.steps} steps")
        try:
            write_report([out], out / "report.html")
            print_line(f"report: {(out / 'report.html').resolve()}")
        except Exception as error:  # of any type: it can be written later, and the run is done
            print_line(f"{Path(sys.argv[0]).name}: no report: {one_line(error)}", error=True)
        if (out / "best").exists():
            print_line(f"best by held-out loss: {(out / 'best').resolve().name} (--ckpt {out / 'best'})")
        print_line(f"images: {trainer.last_grid.resolve()}")
