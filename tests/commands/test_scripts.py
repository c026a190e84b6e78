"""The scripts as a user runs them: whole commands, and what they say to bad input."""

import ast
import errno
import importlib
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from accelerate.state import AcceleratorState
from helpers import ROOT, SMALL, Forked, script, together, user_environment
from PIL import Image

from benchmarks import verify_resume
from diffusion.commands import convert, evaluate, sample, train
from diffusion.commands.command_line import parse_command_line
from diffusion.commands.terminal import exit_code, print_line, progress_bar
from diffusion.data.base import load
from diffusion.data.sources.digits import Digits
from diffusion.data.values import to_x_start
from diffusion.ema import EMA
from diffusion.interop.openai import config_from_flags, parse_flags
from diffusion.likelihood import bits_per_dim
from diffusion.metrics import features
from diffusion.metrics.base import Subject
from diffusion.models.dit import DiT
from diffusion.randomness import image_noise
from diffusion.run.checkpoint import Checkpoint, newest
from diffusion.run.loaded import load_run
from diffusion.training.trainer import Trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of three steps, made by the script."""
    out = tmp_path_factory.mktemp("runs") / "run"
    said = together("train.py", "--out", out, *SMALL, processes=1)
    lines = said.splitlines()
    assert str(out) in lines[0]
    assert str(out / "samples/step_00000003.png") in lines[-1]
    assert "3/3" in said
    return out


@pytest.fixture(scope="module")
def unconditional(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "unconditional"
    Trainer(parse_command_line([*SMALL, "--model.class_cond", "false"]).config, out).run()
    return out


PAGES = ["README.md", "docs/training.md", "docs/sampling.md", "docs/formats.md", "docs/flow.md", "docs/gap.md",
         "docs/learning-rate.md"]  # fmt: skip
SHORT = "--train.batch_size 16 --sample.steps 2 --sample.n 6"


def commands_of(page, shell=False):
    """The commands in the blocks of a page; with `shell`, also what moves and compares files."""
    text = (ROOT / page).read_text().replace("\\\n", " ")
    lines = [line.strip() for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    scripts = r"(accelerate launch.*|python|torchrun\b.*) ?\S*(train|sample|evaluate)\.py"
    ours = rf"{scripts}|diffusion (convert|check-data|report|card)"
    moves = r"|mkdir|mv|diff " if shell else ""
    return [line.split(" #")[0] for line in lines if re.match(ours + moves, line)]


def test_the_pages_show_the_commands_that_this_file_runs():
    assert [len(commands_of(page)) for page in PAGES] == [8, 16, 21, 8, 3, 2, 1]


def launched(words):
    """The script of a command line and its arguments, and the number of processes, as the launchers read them."""
    if words[0] == "torchrun":
        from torch.distributed.run import parse_args

        args = parse_args(words[1:])
        return [args.training_script, *(word for word in args.training_script_args if word != "--")], 2
    if words[0] == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        args = launch_command_parser().parse_args(words[2:])
        return [args.training_script, *args.training_script_args], 1
    name = words[1] if words[0] == "diffusion" else Path(words[1]).stem
    return [f"{name}.py", *words[2:]], 1


def test_the_commands_of_the_documentation_work(tmp_path, monkeypatch, capsys):
    """All of them, in their order, in one folder, with the training cut short; then the Python of each page."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(features, "CLASSIFIER_STEPS", 2)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    flags = "--image_size 32 --num_channels 32 --num_res_blocks 1 --learn_sigma True"  # weights that need no download
    network = config_from_flags(parse_flags(flags), upsampler=False).network(0)
    torch.save(network.state_dict(), tmp_path / "cifar10_uncond_50M_500K.pt")
    latents = DiT(8, 2, 4, 384, 1, 6, num_classes=3)
    for name in ("DiT", "SiT"):
        torch.save(latents.state_dict(), tmp_path / f"{name}-XL-2-256x256.pt")
    went_back = False
    for page in PAGES:
        for line in commands_of(page, shell=True):
            if "--data.path" in line or "runs/mine" in line or "--data.source cifar10" in line:
                continue  # needs the reader's own images, or a download
            line = line.replace("--num_channels 128 --num_res_blocks 3", "--num_channels 32 --num_res_blocks 1")
            line = re.sub(r"--n (1000|500|200)\b", "--n 12", line).replace("--sets 3", "--sets 2")
            line = line.replace("--dropout 0.3 --diffusion_steps 4000", "--dropout 0.3 --diffusion_steps 100")
            if ("evaluate.py" in line and "--steps" in line) or ("runs/published" in line and "sample.py" in line):
                line = f"{re.sub(r'--steps [0-9]+', '', line)} --n 2 --steps 2"
            if "train.py" in line:
                steps = "4" if "runs/x" in line and "300" not in line else "3"
                line = f"{re.sub(r'--train.steps [0-9]+', '', line)} {SHORT} --train.steps {steps}"
            line = re.sub(r"step_00000([34])00", r"step_0000000\1", line)
            if re.match("mkdir|mv|diff ", line):
                assert subprocess.run(line, shell=True).returncode in ((0, 1) if "diff " in line else (0,))
                went_back = "checkpoints/step_" in line
                continue
            argv, processes = launched(shlex.split(line))
            if processes > 1:
                together(*argv, processes=processes, cwd=tmp_path)
                continue
            folder = "benchmarks" if "benchmarks" in line else "diffusion.commands"
            monkeypatch.setattr(sys, "argv", argv)
            main = importlib.import_module(f"{folder}.{argv[0].removesuffix('.py').replace('-', '_')}").main
            code, said = exit_code(main), capsys.readouterr()
            assert code == 0, (argv, said.err)
            AcceleratorState._reset_state(reset_partial_state=True)
            if went_back:
                assert "continues after step 3" in said.out
            went_back = False
        for block in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL):
            exec(block, {"__name__": "__main__"})  # the working directory is the folder
            AcceleratorState._reset_state(reset_partial_state=True)
    assert list(tmp_path.rglob("*.png"))


class Sentences:
    """Somebody else's model of sentences."""

    def __init__(self, name): ...

    def encode(self, sentences):
        return np.array([[len(text), text.count("a"), text.count("e")] for text in sentences], np.float32)


def test_the_recipes_of_conditions_work(tmp_path, monkeypatch, capsys):
    """The blocks of the page in their order, the training cut short, on images with masks and captions."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "sentence_transformers", SimpleNamespace(SentenceTransformer=Sentences))
    for folder, mode in (("photos", "RGB"), ("masks", "L")):
        (tmp_path / folder).mkdir()
        for i in range(32):
            Image.effect_noise((32, 32), 10 + i).convert(mode).save(f"{folder}/{i}{'_mask' if mode == 'L' else ''}.png")
    Path("captions.txt").write_text("".join(f"image {i}\n" for i in range(32)))
    quick = f"{SHORT} --train.steps 3 --checkpoint.every 2 --model.channel_mult [1,1,1]"
    blocks = re.findall(r"```(sh|python)\n(.*?)```", (ROOT / "docs/conditions.md").read_text(), re.DOTALL)
    lines = [line for kind, block in blocks for line in (block.splitlines() if kind == "sh" else [block])]
    assert len([line for line in lines if line.startswith("python ")]) == 12
    for line in lines:
        if not line.startswith("python "):
            exec(line, {})
            continue
        line = line.replace("step_00000250", "step_00000002").replace(" --train.steps 2000", "")
        line = line.replace("--guide_between", "--steps 8 --guide_between")
        _, *argv = shlex.split(f"{line} {quick}" if "train.py" in line else line)
        code, _, err = script({"train.py": train, "sample.py": sample}[argv[0]], monkeypatch, capsys, *argv[1:])
        assert code == 0, (line, err)
        AcceleratorState._reset_state(reset_partial_state=True)
    assert len(list(Path("runs").glob("*/samples/*.png"))) == 5 + 7


def test_the_python_examples_of_the_readme_are_short():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        assert len([line for line in block.splitlines() if line.strip()]) <= 15
        assert len(ast.parse(block).body) < 15


def test_the_same_command_continues(run, monkeypatch, capsys):
    code, out, _ = script(train, monkeypatch, capsys, "--out", run, *SMALL)
    assert code == 0
    assert "continues after step 3" in out
    assert "is done: 3 steps" in out


def test_a_last_grid_that_a_signal_cut_off_is_drawn_by_the_same_command(run, tmp_path, monkeypatch, capsys):
    shutil.copytree(run, tmp_path / "run")
    grid = tmp_path / "run/samples/step_00000003.png"
    first = grid.read_bytes()
    grid.unlink()
    code, out, _ = script(train, monkeypatch, capsys, "--out", tmp_path / "run", *SMALL)
    assert code == 0
    assert str(grid) in out
    assert grid.read_bytes() == first


def test_two_processes_draw_the_grid_of_one(run, tmp_path, monkeypatch, capsys):
    flags = ["--ckpt", run, "--n", 5, "--batch_size", 2, "--steps", 3, "--out"]
    assert together("sample.py", *flags, tmp_path / "two.png").count("5 images") == 1
    assert script(sample, monkeypatch, capsys, *flags, tmp_path / "one.png")[0] == 0
    drawn = [np.asarray(Image.open(tmp_path / name)).astype(int) for name in ("one.png", "two.png")]
    assert abs(drawn[0] - drawn[1]).max() <= 1


def test_users_can_verify_that_their_runs_resume(tmp_path):
    flags = ["--train.batch_size", "16", "--model.dropout", "0.1", "--train.gradient_accumulation", "2"]
    out = together("benchmarks/verify_resume.py", *flags, "--data.workers", "1", cwd=tmp_path)
    assert "4 steps, interrupted and resumed, end with the same bits as without a break" in out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_moments_are_named_after_their_weights(optimizer, tmp_path):
    config = parse_command_line([*SMALL, "--train.steps", "4", "--train.optimizer", optimizer]).config
    Trainer(config, tmp_path).run()
    named = dict(verify_resume._tensors(tmp_path, config))
    weights = {
        name.removeprefix("the weight "): value for name, value in named.items() if name.startswith("the weight")
    }
    moments = {name: value for name, value in named.items() if name.startswith("the optimizer's") and value.ndim}
    assert {name.split(" of ")[1] for name in moments} == weights.keys()
    for name, value in moments.items():
        assert value.shape == weights[name.split(" of ")[1]].shape, name


def test_a_resume_that_is_not_exact_is_found(tmp_path, monkeypatch, capsys):
    """An average that is not restored, as in other codebases, is named."""
    restore = Trainer._restore

    def without_averages(self, saved, files):
        restore(self, saved, files)
        self.ema = self.training_step.ema = EMA(self.network, self.config.train.ema_rates, self.config.train.ema_warmup)

    monkeypatch.setattr(Trainer, "_restore", without_averages)
    code, out, err = script(verify_resume, monkeypatch, capsys, "--train.batch_size", "16")
    assert (code, out) == (2, "")
    assert re.search("a continued run is not the uninterrupted one: the average at 0.999 of .* differs by up to", err)


def started(out, *flags, launcher=None, **options):
    """A long run as a process, once it has logged three steps: a forked one, or one that a launcher starts."""
    argv = ["train.py", "--out", str(out), *SMALL, "--train.steps", "100000", *flags]
    process = Forked(*argv) if launcher is None else subprocess.Popen(
        [*launcher, *argv], cwd=ROOT, env=user_environment(), text=True, stderr=subprocess.PIPE, **options
    )  # fmt: skip
    while not (out / "metrics.jsonl").exists() or (out / "metrics.jsonl").read_text().count("\n") < 3:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    return process


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_stops_all_processes_with_a_checkpoint(tmp_path, name):
    """A terminal's Ctrl-C for a run of one process with its workers, and a scheduler's SIGTERM for torchrun."""
    run, launcher = tmp_path / "run", None if name == "SIGINT" else ("torchrun", "--nproc_per_node", "2")
    with started(run, "--data.workers", "2", launcher=launcher) as process:
        workers = psutil.Process(process.pid).children() if launcher is None else []
        for number in [process.pid, *(worker.pid for worker in workers)]:
            os.kill(number, getattr(signal, name))
        err = process.communicate(timeout=100)[1]
    assert process.returncode == 130 if launcher is None else process.returncode != 0
    saved, _ = newest(run, Checkpoint.files)
    assert saved.step >= 3
    assert f"stopped by {name} after step {saved.step}, which is saved: the same command continues" in err
    if launcher is None:
        assert len(workers) == 2
        assert "Traceback" not in err


def draw(run, monkeypatch, capsys, tmp_path, *flags, n=20, name="x.npz"):
    out = tmp_path / name
    out.unlink(missing_ok=True)
    code, _, err = script(
        sample, monkeypatch, capsys, "--ckpt", run, "--npz", "--out", out, "--n", n, "--steps", 3, *flags
    )
    assert code == 0, err
    with np.load(out) as arrays:
        return dict(arrays)


def test_sampling_needs_no_flag_but_the_run(run, monkeypatch, capsys):
    code, out, err = script(sample, monkeypatch, capsys, "--ckpt", run)
    assert code == 0, err
    path = Path(out.strip().split(": ", 1)[1])
    assert path.is_relative_to(run)
    assert Image.open(path).format == "PNG"
    assert "2/2" in err  # progress
    first = path.read_bytes()
    _, out, _ = script(sample, monkeypatch, capsys, "--ckpt", run, "--n", 1)
    assert Path(out.strip().split(": ", 1)[1]) != path
    assert path.read_bytes() == first


def test_a_picture_is_the_same_at_any_batch_size(run, monkeypatch, capsys, tmp_path):
    whole = draw(run, monkeypatch, capsys, tmp_path)["arr_0"].astype(int)
    for n, batch_size in ((20, 1), (20, 7), (11, 64)):
        part = draw(run, monkeypatch, capsys, tmp_path, "--batch_size", batch_size, n=n)["arr_0"].astype(int)
        # the network's sums take another order in another batch: at most one level of 255
        assert abs(part - whole[:n]).max() <= 1
    assert len({picture.tobytes() for picture in whole}) == 20


def test_seeds_samplers_averages_and_eta_change_the_pictures(run, monkeypatch, capsys, tmp_path):
    variants = [[], ["--seed", 1], ["--sampler", "ddim"], ["--sampler", "ddim", "--eta", 1], ["--ema", "none"]]
    drawn = {draw(run, monkeypatch, capsys, tmp_path, *flags)["arr_0"].tobytes() for flags in variants}
    assert len(drawn) == len(variants)
    again = draw(run, monkeypatch, capsys, tmp_path, "--ema", "0.999")["arr_0"].tobytes()
    assert again in drawn


def test_classes_are_drawn_in_turn(run, unconditional, monkeypatch, capsys, tmp_path):
    assert draw(run, monkeypatch, capsys, tmp_path, n=12)["arr_1"].tolist() == [*range(10), 0, 1]
    assert draw(run, monkeypatch, capsys, tmp_path, "--classes", "7,3", n=3)["arr_1"].tolist() == [7, 3, 7]
    assert draw(unconditional, monkeypatch, capsys, tmp_path).keys() == {"arr_0"}


def test_images_are_those_of_the_array(run, monkeypatch, capsys, tmp_path):
    array = draw(run, monkeypatch, capsys, tmp_path, n=3)["arr_0"]
    code, _, _ = script(
        sample, monkeypatch, capsys, "--ckpt", run, "--images", "--out", tmp_path / "i", "--n", 3, "--steps", 3
    )
    assert code == 0
    files = sorted((tmp_path / "i").iterdir())
    assert [file.name for file in files] == ["000000.png", "000001.png", "000002.png", "samples.json"]
    np.testing.assert_array_equal(np.stack([np.asarray(Image.open(file)) for file in files[:3]]), array[..., 0])


@pytest.fixture(scope="module")
def cascade(tmp_path_factory):
    """A run that draws 4x4 digits, trained with and without their classes, and an upsampler to 8x8."""
    folder = tmp_path_factory.mktemp("cascade")
    first = ["--data.image_size", "4", "--model.channel_mult", "[1]", "--model.attention_resolutions", "[1]",
             "--train.label_dropout", "0.2"]  # fmt: skip
    second = ["--data.low_res_size", "4"]
    for name, flags in (("base", first), ("upsampler", second), ("plain", [*second, "--model.class_cond", "false"])):
        Trainer(parse_command_line([*SMALL, *flags]).config, folder / name).run()
    return folder


def test_a_cascade_is_the_same_by_every_way(cascade, monkeypatch, capsys, tmp_path):
    """The small images of a run, drawn at once or handed over as an array or a folder of images."""
    base, upsampler = cascade / "base", cascade / "upsampler"
    chosen = ["--classes", "3,1"]
    for form, out in ((["--npz"], "a.npz"), (["--images"], "images")):
        flags = ["--ckpt", base, "--n", 5, *form, *chosen, "--out", tmp_path / out]
        assert script(sample, monkeypatch, capsys, *flags)[0] == 0
    drawn = {}
    for source in (base, tmp_path / "a.npz", tmp_path / "images"):
        drawn[source.name] = draw(upsampler, monkeypatch, capsys, tmp_path, "--low_res", source, *chosen, n=5)
    assert drawn["base"]["arr_0"].shape == (5, 8, 8, 1)
    assert drawn["base"]["arr_1"].tolist() == [3, 1, 3, 1, 3]
    for arrays in drawn.values():
        np.testing.assert_array_equal(arrays["arr_0"], drawn["base"]["arr_0"])
    # An array brings its classes along, and their number.
    whole = tmp_path / "whole.npz"
    assert script(sample, monkeypatch, capsys, "--ckpt", upsampler, "--low_res", tmp_path / "a.npz", "--npz",
                  "--steps", 3, "--out", whole)[0] == 0  # fmt: skip
    np.testing.assert_array_equal(np.load(whole)["arr_0"], drawn["base"]["arr_0"])
    assert np.load(whole)["arr_1"].tolist() == [3, 1, 3, 1, 3]


def test_the_first_stage_alone_may_know_classes(cascade, monkeypatch, capsys, tmp_path):
    drawn = [draw(cascade / "plain", monkeypatch, capsys, tmp_path, "--low_res", cascade / "base", "--classes", c, n=2)
             for c in "38"]  # fmt: skip
    assert [arrays["arr_1"].tolist() for arrays in drawn] == [[3, 3], [8, 8]]


def test_a_folder_with_class_folders_brings_its_classes(cascade, monkeypatch, capsys, tmp_path):
    for name in ("7", "2"):
        (tmp_path / "in" / name).mkdir(parents=True)
        Image.effect_noise((9, 9), 100).save(tmp_path / "in" / name / "x.png")
    arrays = draw(cascade / "upsampler", monkeypatch, capsys, tmp_path, "--low_res", tmp_path / "in", n=2)
    assert arrays["arr_1"].tolist() == [2, 7]


def test_guidance_changes_the_pictures_of_a_run_that_was_trained_for_it(cascade, monkeypatch, capsys, tmp_path):
    drawn = [draw(cascade / "base", monkeypatch, capsys, tmp_path, *flags, n=4)["arr_0"].tobytes()
             for flags in ([], ["--guidance", 1], ["--guidance", 3], ["--guidance", 0])]  # fmt: skip
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) == 3


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--ckpt", "base", "--low_res", "base"], "low_res is not a condition of"),
        (["--ckpt", "upsampler", "--low_res", "upsampler"], "low_res has images of (1, 8, 8), or others than can be: "),
        (["--ckpt", "upsampler", "--low_res", "bad.npz"], "data.path bad.npz cannot be read as arrays"),
        (
            ["--ckpt", "upsampler", "--low_res", "bad.png", "--classes", "1"],
            "low_res bad.png: data.path bad.png is not a folder",
        ),
        (["--ckpt", "upsampler", "--low_res", "nowhere"], "nowhere does not exist"),
        (["--ckpt", "upsampler", "--low_res", ""], "argument --low_res: it is empty"),
        (["--ckpt", "upsampler", "--low_res", "few.npz"], "few.npz are (1,) int64; not (2,), whole numbers"),
        (["--ckpt", "upsampler", "--low_res", "float.npz"], "float.npz are (2,) float64; not (2,), whole numbers"),
        (["--ckpt", "upsampler", "--low_res", "high.npz"], "high.npz: classes has '10'; it must be a class name"),
        (["--ckpt", "upsampler", "--low_res", "empty"], "data.path empty holds no images"),
        (["--ckpt", "upsampler", "--low_res", "plain"], "low_res plain: it does not say the classes"),
        (["--ckpt", "base", "--guidance", "nan"], "guidance is nan"),
        (["--ckpt", "base", "--guidance", "-1"], "guidance is -1.0; it must be greater than or equal to 0"),
        (
            ["--ckpt", "upsampler", "--low_res", "base", "--guidance", "2"],
            "without train.label_dropout or a guide, it can only be 1",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_cascades_answer_bad_input_in_one_line(cascade, monkeypatch, capsys, tmp_path, flags, says):
    monkeypatch.chdir(tmp_path)
    np.savez("a.npz", np.zeros((2, 4, 4, 1), np.uint8), np.array([1, 2]))
    for name, labels in (("few", [1]), ("float", [1.0, 2.0]), ("high", [1, 10])):
        np.savez(f"{name}.npz", np.zeros((2, 4, 4, 1), np.uint8), np.array(labels))
    Path("plain").mkdir()
    Image.new("L", (4, 4)).save("plain/a.png")
    for name in ("bad.npz", "bad.png"):
        Path(name).write_text("nothing")
    Path("empty").mkdir()
    flags = [cascade / flag if flag in ("base", "upsampler") else flag for flag in flags]
    code, out, err = script(sample, monkeypatch, capsys, *flags)
    assert (code, out) == (2, "")
    assert says in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--ckpt", "nowhere"], "nowhere does not exist"),
        (["--ckpt", str(ROOT)], "is not a run or a checkpoint (it holds no run.json)"),
        ([], "--ckpt"),
        (["--ckpt", "RUN", "--n", "0"], "argument --n: it is 0; it must be a whole number from 1"),
        (["--ckpt", "RUN", "--n", "few"], "argument --n: it is few; it must be a whole number"),
        (["--ckpt", "RUN", "--batch_size", "0"], "argument --batch_size: it is 0"),
        (["--ckpt", "RUN", "--seed", "-1"], "argument --seed: it is -1"),
        (["--ckpt", "RUN", "--steps", "1001"], "1001 steps are more than the schedule's 1000"),
        (["--ckpt", "RUN", "--steps", "fast"], "'fast' is not understood"),
        (["--ckpt", "RUN", "--steps", "0"], "steps: respacing '0' is not understood"),
        (["--ckpt", "RUN", "--sampler", "ddim", "--eta", ""], "--eta is empty"),
        (["--ckpt", "RUN", "--eta", "0.5"], "eta belongs to sampler ddim, and sampler is dpmpp"),
        (["--ckpt", "RUN", "--sampler", "ddim", "--eta", "2"], "from 0 to 1"),
        (["--ckpt", "RUN", "--sampler", "plms"], "invalid choice: 'plms'"),
        (["--ckpt", "RUN", "--classes", "10"], "classes has '10'; it must be a class name or a number below 10"),
        (["--ckpt", "RUN", "--classes", "cat"], "classes has 'cat'; it must be a class name or a number below 10"),
        (["--ckpt", "UNCONDITIONAL", "--classes", "1"], "has no classes"),
        (["--ckpt", "RUN", "--ema", "0.5"], "--ema is 0.5; "),
        (["--ckpt", "RUN", "--out", "/proc/x/grid.png"], "--out /proc/x/grid.png cannot be written"),
        (["--ckpt", "RUN", "--out", "grid.jpg"], "it must be a .png file"),
        (["--ckpt", "RUN", "--out", "RUN"], "it must be a .png file"),
        (["--ckpt", "RUN", "--images", "--out", "RUN"], "is not empty"),
        (["--ckpt", "RUN", "--images", "--npz"], "not allowed with"),
        (["--ckpt", "RUN", "--stps", "3"], "unrecognized arguments: --stps 3"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_sample_answers_bad_input_in_one_line(run, unconditional, monkeypatch, capsys, flags, says):
    before = sorted(run.rglob("*"))
    flags = [{"RUN": run, "UNCONDITIONAL": unconditional}.get(flag, flag) for flag in flags]
    code, out, err = script(sample, monkeypatch, capsys, *flags)
    assert (code, out) == (2, "")
    assert err.startswith("sample.py: ")
    assert says in err
    assert err.count("\n") == 1
    assert sorted(run.rglob("*")) == before


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--train.stps", "3"], "did you mean train.steps?"),
        (["--data.source", "folder", "--data.path", "nowhere"], "data.path nowhere is not there"),
        (["--data.source", "folder"], "name the folder with --data.path FOLDER"),
        (["--out", "a" * 300], "File name too long"),
        (["--config", "/dev/null"], "--config /dev/null is not a file"),
        (["--data.image_size", "9"], "2 levels do not divide: the nearest that they do is 8x8"),
        (["--out", "/proc/x"], "--out /proc/x cannot be written"),
        (["--out", ""], "--out is empty"),
        (["--out", "README.md"], "--out README.md cannot be written"),
        (["--diffusion.schedule", "linear", "--diffusion.steps", "10"], "a linear schedule of 10 steps"),
        (["--train.batch_size", "1798"], "1797 images, fewer than train.batch_size 1798"),
    ],
    ids=" ".join,
)
def test_train_answers_bad_input_in_one_line(monkeypatch, capsys, tmp_path, flags, says):
    monkeypatch.chdir(ROOT)
    code, out, err = script(train, monkeypatch, capsys, "--out", tmp_path / "run", *flags)
    assert (code, out) == (2, "")
    assert err.startswith("train.py: ")
    assert says in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_damaged_checkpoint_is_named_and_nothing_overwritten(unconditional, monkeypatch, capsys, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(unconditional, copy)
    weights = copy / "checkpoints/step_00000003/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    flags = [*SMALL, "--model.class_cond", "false", "--train.steps", "4"]
    for module, argv in ((train, ["--out", copy, *flags]), (sample, ["--ckpt", copy, "--ema", "none"])):
        code, _, err = script(module, monkeypatch, capsys, *argv)
        assert code == 2
        assert "step_00000003 is not whole: model.safetensors is damaged" in err
        assert err.count("\n") == 1
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


# --- evaluate.py -------------------------------------------------------------------------------------------------


def score(run, monkeypatch, capsys, tmp_path, *flags):
    (tmp_path / "bits.json").unlink(missing_ok=True)
    argv = ["--ckpt", run, "--steps", 3, "--n", 10, "--out", tmp_path / "bits.json", *flags]
    code, out, err = script(evaluate, monkeypatch, capsys, *argv)
    assert code == 0, err
    figures = json.loads((tmp_path / "bits.json").read_text())
    bits, half = figures["bits_per_dim"], figures["bits_per_dim_interval"]
    assert out.startswith(f"{bits:.4f} +- {half:.4f} (95% interval) bits per dimension")
    return figures


def test_every_image_is_scored_once_whatever_the_batch(run, monkeypatch, capsys, tmp_path):
    figures = score(run, monkeypatch, capsys, tmp_path, "--batch_size", 4)  # the last batch holds two
    assert figures["images"] == 10
    assert figures["bits_per_dim"] == pytest.approx(figures["prior"] + sum(figures["terms"]), rel=1e-5)
    assert len(figures["terms"]) == figures["steps"] == 3
    for batch_size in (1, 10, 64):
        again = score(run, monkeypatch, capsys, tmp_path, "--batch_size", batch_size)
        assert again["bits_per_dim"] == pytest.approx(figures["bits_per_dim"], rel=1e-5)
        assert again["standard_error"] == pytest.approx(figures["standard_error"], rel=1e-3)
    assert score(run, monkeypatch, capsys, tmp_path, "--seed", 1)["bits_per_dim"] != figures["bits_per_dim"]
    together("evaluate.py", "--ckpt", run, "--steps", 3, "--n", 9, "--out", tmp_path / "two.json")
    nine = score(run, monkeypatch, capsys, tmp_path, "--n", 9)
    assert json.loads((tmp_path / "two.json").read_text())["bits_per_dim"] == pytest.approx(
        nine["bits_per_dim"], rel=1e-5
    )


def test_a_fixup_run_is_drawn_and_scored_by_every_way(tmp_path, monkeypatch, capsys):
    """Learned variance and classes too: they are the configuration's."""
    out = tmp_path / "run"
    fixup = ["--model.init", "fixup", "--model.use_norm", "false", "--train.grad_clip", 1, "--train.lr", 1e-2,
             "--train.optimizer", "adamw", "--diffusion.prediction", "epsilon"]  # fmt: skip
    code, _, err = script(train, monkeypatch, capsys, "--out", out, *SMALL, *fixup, "--train.label_dropout", 0.1)
    assert code == 0, err
    variants = [["--sampler", "ddpm"], ["--sampler", "ddim"], ["--sampler", "ddim", "--eta", 1], ["--ema", "none"],
                ["--guidance", 3]]  # fmt: skip
    drawn = {draw(out, monkeypatch, capsys, tmp_path, *flags)["arr_0"].tobytes() for flags in variants}
    assert len(drawn) == len(variants)
    assert 0 < score(out, monkeypatch, capsys, tmp_path)["bits_per_dim"] < 20


def test_figures_that_cannot_be_written_are_shown(run, tmp_path, monkeypatch, capsys):
    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(evaluate, "replace_text", full)
    flags = ["--ckpt", run, "--n", 1, "--steps", 1, "--out", tmp_path / "a.json"]
    code, out, err = script(evaluate, monkeypatch, capsys, *flags)
    assert code == 2
    assert "bits per dimension: 1 images" in out
    assert err.splitlines()[-1] == f"evaluate.py: --out {tmp_path}/a.json cannot be written: No space left on device"


def test_figures_replace_nothing(run, monkeypatch, capsys, tmp_path):
    content = '{"metric": "accuracy"}'
    (tmp_path / "a.json").write_text(content)
    flags = ["--ckpt", run, "--n", 1, "--steps", 1, "--out", tmp_path / "a.json"]
    code, _, err = script(evaluate, monkeypatch, capsys, *flags)
    assert code == 2
    assert "is there already: name another" in err
    assert (tmp_path / "a.json").read_text() == content
    (tmp_path / "a.json").unlink()
    assert [script(evaluate, monkeypatch, capsys, *flags)[0] for _ in range(2)] == [0, 2], "nor figures of before"


def test_a_refused_command_leaves_no_folder(run, monkeypatch, capsys, tmp_path):
    for module, flags in (
        (evaluate, ["--ckpt", run, "--out", tmp_path / "new/a.json", "--data.source", "folder"]),
        (sample, ["--ckpt", run, "--out", tmp_path / "new/a.png", "--classes", "99"]),
        (convert, ["openai", run, "--out", tmp_path / "new/a.pt", "--ema", "0.5"]),
    ):
        assert script(module, monkeypatch, capsys, *flags)[0] == 2
        assert list(tmp_path.iterdir()) == []


def test_another_sampler_keeps_the_options_that_it_has(run, monkeypatch, capsys, tmp_path):
    out = tmp_path / "run"
    flags = ["--sample.clip_denoised", "false"]
    assert script(train, monkeypatch, capsys, "--out", out, *SMALL, *flags)[0] == 0
    kept, said, clipped = (
        draw(out, monkeypatch, capsys, tmp_path, "--sampler", "ddim", *more)["arr_0"].tobytes()
        for more in ([], ["--clip_denoised", "false"], ["--clip_denoised", "true"])
    )
    assert kept == said != clipped


def test_the_standard_error_is_that_of_the_mean(run, monkeypatch, capsys, tmp_path):
    """And the four images are spread over all of the data."""
    found = score(run, monkeypatch, capsys, tmp_path, "--n", 4)
    subject = Subject(None, Digits().open(), SimpleNamespace(num_processes=1, process_index=0), None, n=4)
    [(batch, indices)] = subject.data_batches()
    loaded = load_run(run)
    process = loaded.config.diffusion.process("3")
    x_start, y, *_ = load(subject.dataset, indices)
    noise = partial(image_noise, batch, (1, 8, 8), "cpu", 0)
    model = partial(loaded.network, y=y)
    bits = bits_per_dim(process, model, to_x_start(x_start), noise).total.numpy()
    assert found["bits_per_dim"] == pytest.approx(bits.mean(), rel=1e-4)
    assert found["standard_error"] == pytest.approx(bits.std(ddof=1) / 2, rel=1e-3)
    assert found["bits_per_dim_interval"] == pytest.approx(1.96 * found["standard_error"])


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--n", "0"], "argument --n: it is 0"),
        (["--steps", "2000"], "--steps: respacing '2000': 2000 steps are more than"),
        (["--split", "test"], "digits has no such part"),
        (["--data.path", "x"], "huggingface, and data.source is digits"),
        (["--data.source", "mnist"], "mnist of (1, 28, 28); the model's images are (1, 8, 8)"),
        (["--data.source", "folder"], "name the folder with --data.path FOLDER"),
        (["--ema", "0.1"], "--ema is 0.1"),
        (["--out", "tests"], "--out is tests; it must be a .json file"),
        (["--out", "/proc/x/y.json"], "--out /proc/x/y.json cannot be written"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_evaluate_answers_bad_input_in_one_line(run, monkeypatch, capsys, flags, says):
    monkeypatch.chdir(ROOT)
    code, out, err = script(evaluate, monkeypatch, capsys, "--ckpt", run, *flags)
    assert (code, out) == (2, "")
    assert says in err
    assert err.count("\n") == 1


# --- what a hostile machine does --------------------------------------------------------------------------------------


def test_a_loader_worker_that_dies_ends_the_run_with_one_line(tmp_path):
    with started(tmp_path / "run", "--data.workers", "2") as process:
        psutil.Process(process.pid).children()[0].kill()
        err = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert "a process that read images ahead died" in err
    assert "Traceback" not in err


def test_a_killed_run_with_workers_can_be_started_again_at_once(tmp_path):
    with started(tmp_path / "run", "--data.workers", "2") as process:
        process.kill()
    together("train.py", "--out", tmp_path / "run", *SMALL, "--data.workers", "2", processes=1)


def test_a_run_that_is_moved_away_is_not_begun_again(tmp_path):
    with started(tmp_path / "run", "--checkpoint.every", "20") as process:
        (tmp_path / "run").rename(tmp_path / "moved")
        err = process.communicate(timeout=60)[1]
    assert process.returncode == 2
    assert "cannot be written: No such file or directory" in err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_nobody_has_to_hear_what_a_run_says(stream, monkeypatch):
    """A full disk under a log ends nothing."""
    full = open("/dev/full", "w", buffering=1)  # noqa: SIM115
    monkeypatch.setattr(sys, stream, full)
    print_line("x", error=stream == "stderr")
    with progress_bar(3, shown=True) as bar:
        bar.update()
    with pytest.raises(OSError, match="No space left"):
        full.close()


def test_a_quota_under_the_metrics_leaves_no_half_line(tmp_path, monkeypatch, capsys):
    def limited(*flags):
        before = resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))
        ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            return script(train, monkeypatch, capsys, "--out", tmp_path / "run", *SMALL, "--train.steps", "40", *flags)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            signal.signal(signal.SIGXFSZ, ignored)
            assert before is None

    code, _, err = limited()
    assert code == 2
    assert "File too large" in err.splitlines()[-1]
    lines = (tmp_path / "run/metrics.jsonl").read_text()
    assert lines.endswith("\n")
    assert len([json.loads(line) for line in lines.splitlines()]) > 5


def test_names_that_look_like_flags_do_not_stop_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert script(train, monkeypatch, capsys, "--out=-x", *SMALL)[0] == 0
    code, out, _ = script(train, monkeypatch, capsys, "--out=-x", *SMALL, "--train.steps", "4")
    assert code == 0
    assert "continues after step 3" in out
