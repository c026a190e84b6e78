"""Runs of earlier releases continue, and end as they did there.

`python tests/runs/test_release.py` writes the run of the present version. At each release it is added, and stays.
"""

import shutil
import tempfile
from pathlib import Path

import pytest
import safetensors.torch
import torch

import diffusion
from diffusion.commands.command_line import parse_command_line
from diffusion.training.trainer import Trainer

RELEASES = Path(__file__).parents[1] / "release"
FLAGS = """--model.network dit --model.hidden_size 8 --model.depth 1 --model.num_heads 1 --model.patch_size 4
    --diffusion.steps 50 --data.held_out 0.9 --train.batch_size 16 --train.ema_rates [0.9] --train.ema_lengths [0.1]
    --train.timestep_sampler loss_second_moment --train.label_dropout 0.1 --train.grad_clip 1 --train.warmup_steps 0
    --sample.n 4 --sample.steps 2 --sample.every 0 --checkpoint.every 0"""


def end_of(out):
    """The weights of a run that is trained to its fourth step, and images that it draws with the first average."""
    trainer = Trainer(parse_command_line(["--out", str(out), "--train.steps", "4"]).config, out)
    trainer.run()
    return {**trainer.network.state_dict(), "samples": diffusion.load(out).sample(2)}


@pytest.mark.parametrize("version", sorted(path.name for path in RELEASES.glob("*")))
def test_a_run_of_a_release_continues_and_ends_as_it_did_there(version, tmp_path):
    out = shutil.copytree(RELEASES / version / "run", tmp_path / "run", symlinks=True)
    assert diffusion.load(out).saved.step == 2
    ours, theirs = end_of(out), safetensors.torch.load_file(RELEASES / version / "end.safetensors")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():  # other processors round otherwise
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_the_present_release_has_a_run():
    assert (RELEASES / diffusion.__version__).exists()


if __name__ == "__main__":
    folder = RELEASES / diffusion.__version__
    folder.mkdir(parents=True)
    config = parse_command_line([*FLAGS.split(), "--out", str(folder / "run"), "--train.steps", "2"]).config
    Trainer(config, folder / "run").run()
    shutil.rmtree(folder / "run" / "samples")
    with tempfile.TemporaryDirectory() as place:
        end = end_of(shutil.copytree(folder / "run", Path(place, "run"), symlinks=True))
    end = {name: value.clone().contiguous() for name, value in end.items()}
    safetensors.torch.save_file(end, folder / "end.safetensors")
