"""Whether a configuration resumes exactly, on this machine and data: a few steps, interrupted and resumed, against the
same steps without a break. Takes the flags of train.py, on one process or several, and leaves nothing behind.

    python benchmarks/verify_resume.py --config folder_small --data.path images
"""

from __future__ import annotations

import dataclasses
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor

from diffusion.commands.command_line import parse_command_line
from diffusion.commands.terminal import exit_code, print_line
from diffusion.config.schema import Config
from diffusion.errors import UsageError
from diffusion.parallel.launchers import accelerate_starts, check_launcher, on_cpu, with_launchers_settings
from diffusion.run.checkpoint import Checkpoint, checkpoint_folder, newest
from diffusion.training.build import parameter_groups
from diffusion.training.trainer import Trainer

STEPS = 4


class _Break(Exception):
    """Ends a run early, as a kill would."""


def verify_resume(config: Config, folder: Path) -> str | None:
    """Train a few steps in `folder` without interruption, and again with one.

    Returns None if both end with the same bits, otherwise the first tensor that differs, and by how much.
    """
    config = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, steps=STEPS),
        sample=dataclasses.replace(config.sample, every=STEPS + 1, n=1),
        checkpoint=dataclasses.replace(config.checkpoint, every=STEPS // 2, keep_last=0),
    )

    def break_off(step: int, metrics: object) -> None:
        if step == STEPS - 1:  # one step after the checkpoint is lost
            raise _Break

    Trainer(config, folder / "whole").run()
    broken = Trainer(config, folder / "broken")
    try:
        broken.run(break_off)
    except _Break:
        broken.close()
    Trainer(config, folder / "broken").run()
    ours, theirs = (dict(_tensors(folder / name, config)) for name in ("whole", "broken"))
    for name, value in ours.items():
        if not torch.equal(value, theirs[name]):
            return f"{name} differs by up to {(value.double() - theirs[name].double()).abs().max().item():.3g}"
    return None


def _tensors(run: Path, config: Config) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a run's last checkpoint, with a descriptive name."""
    saved, files = newest(checkpoint_folder(run, STEPS), Checkpoint.files)
    weights, training = files["model.safetensors"], files["training.safetensors"]
    yield from ((f"the weight {name}", value) for name, value in weights.items())
    for key in config.train.averages:
        average = files[f"ema_{key}.safetensors"]
        yield from ((f"the average at {key} of {name}", value) for name, value in average.items())
    model = saved.network(weights)
    named = {id(p): name for name, p in model.named_parameters()}
    optimizer = config.train.component("optimizer")(model, parameter_groups(model), config.train.lr)
    names = [named[id(p)] for group in optimizer.param_groups for p in group["params"]]  # in the optimizer's order
    for path, value in training.items():
        moment = re.fullmatch(r"step/optimizer/(\d+)/(\w+)", path)
        yield f"the optimizer's {moment[2]} of {names[int(moment[1])]}" if moment else path, value
    numbers = {name: value for name, value in saved.numbers.items() if isinstance(value, int | float)}
    yield from ((name, torch.as_tensor(value)) for name, value in numbers.items())


def main() -> None:
    config = parse_command_line(sys.argv[1:]).config
    check_launcher()
    config = with_launchers_settings(config).resolved()
    with accelerate_starts():
        state = PartialState(cpu=on_cpu())
    with tempfile.TemporaryDirectory() as folder:
        shared = [folder]  # the first process's is shared
        broadcast_object_list(shared)
        differs = verify_resume(config, Path(shared[0]))
        state.wait_for_everyone()
    if differs:
        raise UsageError(f"a continued run is not the uninterrupted one: {differs}")
    if state.is_main_process:
        print_line(f"{STEPS} steps, interrupted and resumed, end with the same bits as without a break")


if __name__ == "__main__":
    sys.exit(exit_code(main))
