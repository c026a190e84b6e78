"""Train a diffusion model: `accelerate launch train.py`, or `python train.py` on one process. See --help."""

from __future__ import annotations

import sys
from typing import Any

from diffusion.config import parse_command_line
from diffusion.launch import check_launcher, exit_code


def main() -> None:
    config, out = parse_command_line(sys.argv[1:])
    check_launcher()

    from tqdm import tqdm  # after the parser, so that --help and a mistyped key answer at once

    from diffusion.trainer import Trainer

    trainer = Trainer(config, out)
    main_process = trainer.accelerator.is_main_process
    if main_process:
        begun = f"continues after step {trainer.step}" if trainer.step else "begins"
        where = f"{trainer.accelerator.num_processes} x {trainer.accelerator.device.type}"
        print(f"run {out.resolve()} {begun}: {len(trainer.dataset)} images, on {where}")
    if trainer.step >= config.train.steps:
        if main_process:
            print(f"it has done {trainer.step} steps, and train.steps is {config.train.steps}: nothing is left to do")
        return
    bar = tqdm(
        total=config.train.steps,
        initial=trainer.step,
        unit="step",
        disable=not main_process,
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 30,  # a log file needs no second-by-second account
    )

    def on_step(step: int, metrics: dict[str, Any] | None) -> None:
        if metrics:
            bar.set_postfix_str(
                f"loss {metrics['loss']:.4f}, {metrics['images_per_second']:.0f} images/s", refresh=False
            )
        bar.update()

    with bar:
        trainer.run(on_step)
    if main_process:
        print(f"run {out.resolve()} is done: {config.train.steps} steps")
        print(f"pictures: {trainer.last_grid.resolve()}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
