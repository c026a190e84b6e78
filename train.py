"""Train a diffusion model: `accelerate launch train.py`, or `python train.py` on one process. See --help."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

from diffusion.config import parse_command_line
from diffusion.launch import check_launcher, exit_code, progress_bar


def main() -> None:
    config, out = parse_command_line(sys.argv[1:])
    check_launcher()

    from diffusion.trainer import Trainer  # after the parser, so that --help and a mistyped key answer at once

    trainer = Trainer(config, out, tell=lambda message: tqdm.write(f"train.py: {message}", file=sys.stderr))
    main_process = trainer.accelerator.is_main_process
    if main_process:
        begun = f"continues after step {trainer.step}" if trainer.step else "begins"
        where = f"{trainer.accelerator.num_processes} x {trainer.accelerator.device.type}"
        print(f"run {out.resolve()} {begun}: {len(trainer.dataset)} images, on {where}")
    if trainer.step >= config.train.steps:
        if main_process:
            print(f"it has done {trainer.step} steps, and train.steps is {config.train.steps}: nothing is left to do")
        return
    bar = progress_bar(config.train.steps, main_process, done=trainer.step)

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
