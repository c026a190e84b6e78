"""Sampling at scale: written as it is drawn, continued after a kill, shared by processes, in every form."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, command, together, user_environment
from PIL import Image
from test_scripts import script
from test_trainer import small

import sample
from diffusion.data.sources.folder import Folder
from diffusion.run.samples import SampleStore
from diffusion.training.trainer import Trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("sampling") / "run"
    Trainer(small(train__steps=1), out).run()
    return out


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def drawn(run, monkeypatch, capsys, *argv, code=0):
    got, out, err = script(sample, monkeypatch, capsys, "--ckpt", run, "--steps", 2, "--batch_size", 4, *argv)
    assert got == code, err
    return out if code == 0 else err


@pytest.mark.parametrize("form", ["--images", "--npz", None])
def test_the_same_command_goes_on_where_it_was_cut_off(run, tmp_path, monkeypatch, capsys, form):
    suffix = {"--images": "", "--npz": ".npz", None: ".png"}[form]
    whole, parts = (tmp_path / f"{name}{suffix}" for name in ("whole", "parts"))
    flags = ["--n", 11] + [form] * (form is not None)
    drawn(run, monkeypatch, capsys, *flags, "--out", whole)
    works, calls = SampleStore.write, []

    def cut_off(self, batch, images):
        works(self, batch, images)
        calls.append(batch)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(SampleStore, "write", cut_off)
    err = drawn(run, monkeypatch, capsys, *flags, "--out", parts, code=143)
    assert f"stopped by SIGTERM with 4 of 11 images done, in {parts}" in err
    assert calls == [range(4)]
    monkeypatch.setattr(SampleStore, "write", lambda *args: calls.append(args[1]) or works(*args))
    drawn(run, monkeypatch, capsys, *flags, "--out", parts)
    assert calls == [range(4), range(4, 8), range(8, 11)]
    if form == "--images":
        assert contents(parts) == contents(whole)
        assert [path.name for path in sorted(parts.iterdir())] == [*(f"{i:06d}.png" for i in range(11)), "samples.json"]
    else:
        assert parts.read_bytes() == whole.read_bytes()
    assert sorted(tmp_path.iterdir()) == sorted([whole, parts])


def test_an_array_is_that_of_numpy_and_holds_what_the_images_show(run, tmp_path, monkeypatch, capsys):
    drawn(run, monkeypatch, capsys, "--n", 11, "--npz", "--out", tmp_path / "a.npz")
    drawn(run, monkeypatch, capsys, "--n", 11, "--images", "--out", tmp_path / "b")
    with np.load(tmp_path / "a.npz", allow_pickle=False) as arrays:
        images, labels = arrays["arr_0"], arrays["arr_1"]
    assert (images.shape, images.dtype, labels.dtype) == ((11, 8, 8, 1), np.uint8, np.int64)
    assert labels.tolist() == [*range(10), 0]
    for i, image in enumerate(images):
        assert (np.asarray(Image.open(tmp_path / f"b/{i:06d}.png")) == image[..., 0]).all()


def test_more_of_the_same_are_added(run, tmp_path, monkeypatch, capsys):
    drawn(run, monkeypatch, capsys, "--n", 6, "--images", "--out", tmp_path / "a")
    first = contents(tmp_path / "a")
    drawn(run, monkeypatch, capsys, "--n", 11, "--images", "--out", tmp_path / "a")
    after = contents(tmp_path / "a")
    assert {path: after[path] for path in first} == first
    assert len(after) == 12
    out = drawn(run, monkeypatch, capsys, "--n", 8, "--images", "--out", tmp_path / "a")
    assert "8 images" in out
    assert contents(tmp_path / "a") == after


@pytest.mark.parametrize(
    ("flags", "key"),
    [(["--seed", 1], "seed was 0"), (["--sampler", "ddim"], "sampler was dpmpp"), (["--classes", "3"], "classes"),
     (["--ema", "none"], "weights was "), (["--batch_size", 2], "batch_size was 4, and is 2")],
)  # fmt: skip
def test_samples_of_other_settings_are_not_mixed(run, tmp_path, monkeypatch, capsys, flags, key):
    drawn(run, monkeypatch, capsys, "--n", 4, "--images", "--out", tmp_path / "a")
    before = contents(tmp_path / "a")
    err = drawn(run, monkeypatch, capsys, "--n", 8, "--images", "--out", tmp_path / "a", *flags, code=2)
    assert key in err
    assert err.count("\n") == 1
    assert contents(tmp_path / "a") == before


def test_a_folder_of_something_else_is_not_drawn_into(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/mine.txt").write_text("")
    err = drawn(run, monkeypatch, capsys, "--n", 4, "--images", "--out", tmp_path / "a", code=2)
    assert "is not empty: name a new folder" in err
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["mine.txt"]


def test_four_at_once_without_out_have_their_own(run):
    argv = [sys.executable, "sample.py", "--ckpt", str(run), "--n", "20", "--steps", "5"]
    before = set((run / "samples").iterdir())
    processes = [subprocess.Popen([*argv, *flags], cwd=ROOT, env=user_environment(), stdout=subprocess.PIPE, text=True)
                 for flags in ([], [], ["--images"], ["--images"])]  # fmt: skip
    said = {process.communicate(timeout=120)[0] for process in processes}
    assert [process.returncode for process in processes] == [0] * 4
    new = set((run / "samples").iterdir()) - before
    assert {Path(line.split(": ")[1].strip()) for line in said} <= new
    assert len([path for path in new if path.suffix == ".png"]) == 2


def test_processes_share_the_work_and_end_with_the_same_files(run, tmp_path):
    argv = ["sample.py", "--ckpt", run, "--n", 22, "--steps", 2, "--batch_size", 4]
    for form, name in (("--images", "a"), ("--npz", "a.npz")):
        together(*argv, form, "--out", tmp_path / f"two_{name}")
        together(*argv, form, "--out", tmp_path / f"one_{name}", processes=1)
    two, one = contents(tmp_path / "two_a"), contents(tmp_path / "one_a")
    assert two == one
    assert (tmp_path / "two_a.npz").read_bytes() == (tmp_path / "one_a.npz").read_bytes()


def test_five_channels_have_a_form_and_are_read_back(tmp_path, monkeypatch, capsys):
    (tmp_path / "data").mkdir()
    for i in range(4):
        np.save(tmp_path / f"data/{i}.npy", np.full((8, 8, 5), 50 * i, np.uint8))
    data = dict(data__source="folder", data__path=str(tmp_path / "data"), data__channels=5, model__class_cond=False)
    trainer = Trainer(small(train__steps=1, train__batch_size=4, **data), tmp_path / "run")
    trainer.run()
    for form, name in ((["--images"], "a"), (["--npz"], "a.npz"), ([], "a.png")):
        drawn(tmp_path / "run", monkeypatch, capsys, "--n", 3, *form, "--out", tmp_path / name)
    with np.load(tmp_path / "a.npz") as arrays:
        images = arrays["arr_0"]
    back = Folder(path=str(tmp_path / "a"), image_size=8, channels=5).open()
    assert torch.equal(back.images, torch.from_numpy(images).permute(0, 3, 1, 2))


MEMORY = """
import resource, sys, torch, diffusion.sampling, sample
diffusion.sampling.sample_batch = lambda process, model, shape, batch, **options: torch.zeros(len(batch), *shape)
sys.argv[1:] = ["--ckpt", {run!r}, "--n", "{n}", "--batch_size", "500", "--npz", "--out", {out!r}]
sample.main()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_number(tmp_path):
    """20,000 images of 64x64, held as float32, would be 320 MB."""
    Trainer(small(train__steps=1, train__batch_size=1, data__image_size=64, sample__n=1), tmp_path / "run").run()
    peaks = []
    for n in (500, 20_000):
        code = MEMORY.format(run=str(tmp_path / "run"), n=n, out=str(tmp_path / f"{n}.npz"))
        peaks.append(int(command(sys.executable, "-c", code).stdout.split()[-1]))
    assert peaks[1] < peaks[0] + 60_000  # kB
    with np.load(tmp_path / "20000.npz") as arrays:
        assert arrays["arr_0"].shape == (20_000, 64, 64, 1)


def test_a_checkpoint_that_is_removed_meanwhile_is_looked_for_again(run, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    Trainer(small(train__steps=2, checkpoint__every=1), out).run()
    from diffusion.run import checkpoint

    works, seen = checkpoint._open_folder, []

    def pruned(folder):
        if not seen:  # between the listing and the reading, training went on
            seen.append(folder)
            Trainer(small(train__steps=3, checkpoint__keep_last=1), out).run()
        return works(folder)

    monkeypatch.setattr(checkpoint, "_open_folder", pruned)
    assert "step_00000003" in drawn(out, monkeypatch, capsys, "--n", 1)


def test_a_grid_has_an_end(run, monkeypatch, capsys):
    assert "a grid shows up to 10000: add --images or --npz" in drawn(run, monkeypatch, capsys, "--n", 10_001, code=2)


def test_a_long_sampling_writes_as_it_draws(run, tmp_path):
    argv = [sys.executable, "sample.py", "--ckpt", str(run), "--n", "100000", "--steps", "20", "--images", "--out",
            str(tmp_path / "a")]  # fmt: skip
    with subprocess.Popen(argv, cwd=ROOT, env=user_environment(), text=True, stderr=subprocess.PIPE) as process:
        while not (tmp_path / "a/000200.png").exists():
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
        process.terminate()
        err = process.communicate(timeout=60)[1]
    assert process.returncode == 143
    assert "of 100000 images done" in err.splitlines()[-1]
    settings = json.loads((tmp_path / "a/samples.json").read_text())
    assert (settings["steps"], settings["seed"], settings["classes"]) == ("20", 0, list(range(10)))


@pytest.mark.parametrize("content", [b"", b"\x89PNG cut off"])
def test_an_image_that_a_power_cut_emptied_is_drawn_again(run, tmp_path, monkeypatch, capsys, content):
    drawn(run, monkeypatch, capsys, "--n", 4, "--images", "--out", tmp_path / "a")
    before = contents(tmp_path / "a")
    (tmp_path / "a/000001.png").write_bytes(content)
    drawn(run, monkeypatch, capsys, "--n", 4, "--images", "--out", tmp_path / "a")
    assert contents(tmp_path / "a") == before


@pytest.mark.parametrize(
    "part",
    [np.zeros((4, 8, 8, 1), np.float32), np.zeros((4, 8, 8, 3), np.uint8), np.zeros((1, 8, 8, 1), np.uint8), None],
)
def test_a_part_that_is_not_ours_is_drawn_again(run, tmp_path, monkeypatch, capsys, part):
    drawn(run, monkeypatch, capsys, "--n", 8, "--npz", "--out", tmp_path / "whole.npz")
    works = SampleStore.write

    def cut_off(self, batch, images):
        works(self, batch, images)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(SampleStore, "write", cut_off)
    drawn(run, monkeypatch, capsys, "--n", 8, "--npz", "--out", tmp_path / "a.npz", code=143)
    monkeypatch.setattr(SampleStore, "write", works)
    parts = tmp_path / "a.npz.parts"
    (parts / "notes.txt").write_text("mine")
    path = next(parts.glob("*.npy"))
    path.write_bytes(b"") if part is None else np.save(path, part)
    drawn(run, monkeypatch, capsys, "--n", 8, "--npz", "--out", tmp_path / "a.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert (parts / "notes.txt").read_text() == "mine"


def test_an_array_is_written_through_a_link(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    drawn(run, monkeypatch, capsys, "--n", 2, "--npz", "--out", tmp_path / "link/a.npz")
    with np.load(tmp_path / "real/a.npz") as arrays:
        assert len(arrays["arr_0"]) == 2
    (tmp_path / "b.npz").symlink_to("nowhere/b.npz")
    assert "is a broken link" in drawn(run, monkeypatch, capsys, "--npz", "--out", tmp_path / "b.npz", code=2)


def test_settings_that_are_no_file_are_refused(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "a").mkdir()
    os.mkfifo(tmp_path / "a/samples.json")
    assert "holds no samples" in drawn(run, monkeypatch, capsys, "--images", "--out", tmp_path / "a", code=2)
    os.mkfifo(tmp_path / "x.npz")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/samples.json").write_text("[" * 100_000)
    assert "cannot be read" in drawn(run, monkeypatch, capsys, "--images", "--out", tmp_path / "b", code=2)


def test_a_command_that_fails_before_it_draws_leaves_nothing(run, tmp_path, monkeypatch, capsys):
    def fails(*args, **options):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("diffusion.sampling.sample_batch", fails)
    drawn(run, monkeypatch, capsys, "--n", 2, "--out", tmp_path / "a.png", code=2)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_trained_on_meanwhile_is_told_apart(tmp_path, monkeypatch, capsys):
    Trainer(small(train__steps=1), tmp_path / "run").run()
    drawn(tmp_path / "run", monkeypatch, capsys, "--n", 2, "--images", "--out", tmp_path / "a")
    Trainer(small(train__steps=2), tmp_path / "run").run()
    err = drawn(tmp_path / "run", monkeypatch, capsys, "--n", 4, "--images", "--out", tmp_path / "a", code=2)
    assert "(checkpoint was step_00000001, and is step_00000002)" in err
    first = tmp_path / "run/checkpoints/step_00000001"
    drawn(first, monkeypatch, capsys, "--n", 4, "--images", "--out", tmp_path / "a")


@pytest.mark.parametrize(("flags", "name"), [((), "a.png"), (("--npz",), "a.npz"), (("--images",), "a")])
def test_a_file_that_is_there_is_not_replaced(run, tmp_path, monkeypatch, capsys, flags, name):
    (tmp_path / name).write_text("mine")
    drawn(run, monkeypatch, capsys, *flags, "--out", tmp_path / name, code=2)
    assert (tmp_path / name).read_text() == "mine"
