"""Samples on disk: written as they are drawn, continued after a kill, shared by processes, in every form."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT, script, together, user_environment
from PIL import Image
from test_trainer import TINY, small

import diffusion
import sample
from diffusion import UsageError
from diffusion.data.sources.folder import Folder
from diffusion.run.samples import GridStore, SampleStore, Taken
from diffusion.sampling import batches
from diffusion.training.trainer import Trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("sampling") / "run"
    Trainer(small(train__steps=1, **TINY), out).run()
    return out


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def drawn(run, monkeypatch, capsys, *argv, code=0):
    got, out, err = script(sample, monkeypatch, capsys, "--ckpt", run, "--steps", 2, "--batch_size", 4, *argv)
    assert got == code, err
    return out if code == 0 else err


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["--images", "--npz", None])
def test_the_same_command_goes_on_where_it_was_cut_off(run, tmp_path, monkeypatch, capsys, form):
    """A grid begins again."""
    suffix = {"--images": "", "--npz": ".npz", None: ".png"}[form]
    store = SampleStore if form else GridStore
    whole, parts = (tmp_path / f"{name}{suffix}" for name in ("whole", "parts"))
    flags = ["--n", 11] + [form] * (form is not None)
    drawn(run, monkeypatch, capsys, *flags, "--out", whole)
    works, calls = store.write, []

    def cut_off(self, batch, images):
        works(self, batch, images)
        calls.append(batch)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(store, "write", cut_off)
    err = drawn(run, monkeypatch, capsys, *flags, "--out", parts, code=143)
    assert "stopped by SIGTERM with 4 of 11 images done" in err
    assert calls == [range(4)]
    monkeypatch.setattr(store, "write", lambda *args: calls.append(args[1]) or works(*args))
    drawn(run, monkeypatch, capsys, *flags, "--out", parts)
    assert calls == [range(4), *([] if form else [range(4)]), range(4, 8), range(8, 11)]
    if form == "--images":
        assert contents(parts) == contents(whole)
        settings = json.loads((parts / "samples.json").read_text())
        assert (settings["steps"], settings["seed"], settings["classes"]) == (2, 0, list(range(10)))
        assert [path.name for path in sorted(parts.iterdir())] == [*(f"{i:06d}.png" for i in range(11)), "samples.json"]
    else:
        assert parts.read_bytes() == whole.read_bytes()
    assert sorted(tmp_path.iterdir()) == sorted([whole, parts])


def test_an_array_holds_what_the_images_show(run, tmp_path, monkeypatch, capsys):
    drawn(run, monkeypatch, capsys, "--n", 11, "--npz", "--out", tmp_path / "a.npz")
    drawn(run, monkeypatch, capsys, "--n", 11, "--images", "--out", tmp_path / "b")
    with np.load(tmp_path / "a.npz", allow_pickle=False) as arrays:
        images, labels = arrays["arr_0"], arrays["arr_1"]
    assert (images.shape, images.dtype, labels.dtype) == ((11, 8, 8, 1), np.uint8, np.int64)
    assert labels.tolist() == [*range(10), 0]
    for i, image in enumerate(images):
        assert (np.asarray(Image.open(tmp_path / f"b/{i:06d}.png")) == image[..., 0]).all()
    from_python = diffusion.load(run).sample(11, steps=2)  # in one batch
    assert (from_python.add(1).mul(127.5).permute(0, 2, 3, 1).numpy() - images).__abs__().max() <= 1.5


def test_more_of_the_same_are_added(run, tmp_path, monkeypatch, capsys):
    drawn(run, monkeypatch, capsys, "--n", 6, "--images", "--out", tmp_path / "a")
    first = contents(tmp_path / "a")
    drawn(run, monkeypatch, capsys, "--n", 11, "--images", "--out", tmp_path / "a")
    after = contents(tmp_path / "a")
    assert {path: after[path] for path in first} == first
    assert len(after) == 12
    assert "8 images" in drawn(run, monkeypatch, capsys, "--n", 8, "--images", "--out", tmp_path / "a")
    assert contents(tmp_path / "a") == after


def test_samples_of_other_settings_are_not_mixed(run, tmp_path, monkeypatch, capsys):
    drawn(run, monkeypatch, capsys, "--n", 4, "--images", "--out", tmp_path / "a")
    before = contents(tmp_path / "a")
    for flags, key in (
        (["--seed", 1], "seed was 0"), (["--sampler", "ddim"], "options was "), (["--order", 1], "options was "),
        (["--classes", "3"], "classes"), (["--ema", "none"], "weights was "),
        (["--batch_size", 2], "batch_size was 4, and is 2"),
    ):  # fmt: skip
        err = drawn(run, monkeypatch, capsys, "--n", 8, "--images", "--out", tmp_path / "a", *flags, code=2)
        assert key in err
        assert err.count("\n") == 1
        assert contents(tmp_path / "a") == before


def test_a_run_that_trained_on_meanwhile_is_told_apart(tmp_path, monkeypatch, capsys):
    Trainer(small(train__steps=1, **TINY), tmp_path / "run").run()
    drawn(tmp_path / "run", monkeypatch, capsys, "--n", 2, "--images", "--out", tmp_path / "a")
    Trainer(small(train__steps=2, **TINY), tmp_path / "run").run()
    err = drawn(tmp_path / "run", monkeypatch, capsys, "--n", 4, "--images", "--out", tmp_path / "a", code=2)
    assert "(checkpoint was step_00000001, and is step_00000002)" in err
    first = tmp_path / "run/checkpoints/step_00000001"
    drawn(first, monkeypatch, capsys, "--n", 4, "--images", "--out", tmp_path / "a")


def test_samples_without_out_have_their_own_names(run, monkeypatch, capsys):
    before = set((run / "samples").iterdir())
    for flags in ([], [], ["--images"], ["--images", "--n", 3], ["--npz"], ["--npz"]):
        drawn(run, monkeypatch, capsys, "--n", 2, *flags)
    new = sorted(path.name.removeprefix("step_00000001_") for path in set((run / "samples").iterdir()) - before)
    name = "dpmpp2_seed0"
    assert new == [name, f"{name}.npz", f"{name}.png", f"{name}_2.npz", f"{name}_2.png"]  # the folder goes on


def test_a_grid_has_an_end(run, monkeypatch, capsys):
    assert "a grid shows up to 10000: add --images or --npz" in drawn(run, monkeypatch, capsys, "--n", 10_001, code=2)


def test_a_command_that_fails_before_it_draws_leaves_nothing(run, tmp_path, monkeypatch, capsys):
    def fails(*args, **options):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("diffusion.run.loaded.sample_batch", fails)
    for form in ([], ["--images"], ["--npz"]):
        out = tmp_path / ("a.npz" if "--npz" in form else "a" if form else "a.png")
        drawn(run, monkeypatch, capsys, "--n", 2, *form, "--out", out, code=2)
        assert list(tmp_path.iterdir()) == []


def test_processes_share_the_work_and_end_with_the_same_files(run, tmp_path, monkeypatch, capsys):
    argv = ["--n", 22, "--images", "--out"]
    together("sample.py", "--ckpt", run, "--steps", 2, "--batch_size", 4, *argv, tmp_path / "two")
    drawn(run, monkeypatch, capsys, *argv, tmp_path / "one")
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


# --- from Python ------------------------------------------------------------------------------------------------------


def test_a_run_is_loaded_and_sampled(run):
    loaded = diffusion.load(run)
    assert not loaded.network.training
    assert loaded.process.num_timesteps == loaded.config.diffusion.steps == 1000
    images = loaded.sample(5, classes=["3", 4], sampler="ddim", steps=3, eta=0.5, seed=7)
    assert images.shape == (5, 1, 8, 8)
    assert images.dtype == torch.float32
    assert -1 <= images.min() <= images.max() <= 1
    one = diffusion.load(str(run), "none").sample(1, classes=[3], sampler="ddim", steps=3, eta=0.5, seed=7)
    assert not torch.equal(one, images[:1])  # other weights
    for says, call in (
        (r"eta belongs to sampler ddim, and sampler is dpmpp", lambda: loaded.sample(1, eta=0.5)),
        (r"sampler is plms; it must be one of", lambda: loaded.sample(1, sampler="plms")),
        (r"classes has '10'; it must be a class name or a number below 10", lambda: loaded.sample(1, classes=[10])),
        (r"guidance is 2", lambda: loaded.sample(1, guidance=2.0)),
        (r"etaa", lambda: loaded.sample(1, sampler="ddim", options={"etaa": 0.5})),
        (r"steps: respacing '0' is not understood", lambda: loaded.sample(1, steps=0)),
        (r"n is 0; it must be a whole number from 1", lambda: loaded.sample(0)),
        (r"seed is -1; it must be a whole number from 0", lambda: loaded.sample(1, seed=-1)),
        (r"low_res is not a condition of .*: it has none", lambda: loaded.sample(1, low_res=torch.zeros(1, 1, 4, 4))),
        (r"--ema is 0\.5; .* has 0\.999, or none", lambda: diffusion.load(run, 0.5)),
        (r"is not a run or a checkpoint: name ", lambda: diffusion.load(run / "samples")),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=says):
            call()


# --- the store --------------------------------------------------------------------------------------------------------


def store_of(out, form="npz", n=8, shape=(1, 8, 8), **options):
    return SampleStore(out, form, n, shape, None, {"seed": 0}, **options)


def fill(store, images, keep=range(10**6)):
    """Draw those batches that are missing, of which `keep` are done before a kill. The batches that were drawn."""
    store.begin()
    todo = batches(range(store.n), 4)
    missing = [batch for batch in todo if not store.is_done(batch) and batch.start in keep]
    for batch in missing:
        store.write(batch, images[batch.start : batch.stop])
    if all(store.is_done(batch) for batch in todo):
        store.finish(todo, True)
    store.close()
    return missing


IMAGES = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("form", ["images", "npz"])
def test_what_a_power_failure_emptied_is_drawn_again(tmp_path, form):
    name = {"images": "", "npz": ".npz"}[form]
    whole, parts = tmp_path / f"whole{name}", tmp_path / f"parts{name}"
    fill(store_of(whole, form), IMAGES)
    assert fill(store_of(parts, form), IMAGES, keep=[0]) == [range(4)]
    store = store_of(parts, form)
    [first] = [path for path in store.folder.iterdir() if path.name.startswith(("000000.", "00000000-"))]
    first.write_bytes(b"")
    (store.folder / ".x.tmp").touch()  # of a kill
    assert fill(store, IMAGES) == [range(4), range(4, 8)]
    if form == "images":
        assert contents(parts) == contents(whole)
    else:
        assert parts.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([whole.name, parts.name])


def test_five_channels_have_a_form_and_are_read_back(tmp_path):
    images = IMAGES.expand(8, 5, 8, 8)
    fill(store_of(tmp_path / "a", "images", shape=(5, 8, 8)), images)
    fill(store_of(tmp_path / "a.npz", shape=(5, 8, 8)), images)
    with np.load(tmp_path / "a.npz") as arrays:
        array = arrays["arr_0"]
    back = Folder(path=str(tmp_path / "a"), image_size=8, channels=5).open()
    assert torch.equal(back.images, torch.from_numpy(array).permute(0, 3, 1, 2))


MEMORY = """
import resource, torch
from pathlib import Path
from diffusion.run.samples import SampleStore
from diffusion.sampling import batches
images = torch.zeros(500, 1, 64, 64)
for n in (500, 20_000):
    store, todo = SampleStore(Path(f"{n}.npz"), "npz", n, (1, 64, 64), None, {}), batches(range(n), 500)
    store.begin()
    for batch in todo:
        store.write(batch, images)
    store.finish(todo, True)
    store.close()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_number(tmp_path):
    """20,000 images of 64x64, held as float32, would be 320 MB."""
    environment = user_environment() | {"PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-c", MEMORY]
    done = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, check=True)
    few, many = map(int, done.stdout.split())
    assert many < few + 120_000  # kB; the pages of the array in the file, 80 MB, may be counted
    with np.load(tmp_path / "20000.npz") as arrays:
        assert arrays["arr_0"].shape == (20_000, 64, 64, 1)


@pytest.mark.parametrize("content", ['["my", "list"]', "not JSON", '{"seed": 9}'])
@pytest.mark.parametrize("form", ["images", "npz"])
def test_a_refused_sampling_removes_nothing(tmp_path, content, form):
    store = store_of(tmp_path / ("us" if form == "images" else "us.npz"), form)
    store.folder.mkdir()
    (store.folder / "samples.json").write_text(content)
    with pytest.raises(Taken, match="holds samples of other settings"):
        store.begin()
    store.close()
    assert contents(tmp_path) == {(store.folder / "samples.json").relative_to(tmp_path): content.encode()}


def test_a_folder_in_use_is_taken(tmp_path):
    first = store_of(tmp_path / "a", "images")
    first.begin()
    with pytest.raises(Taken, match="is in use by another process"):
        store_of(tmp_path / "a", "images").begin()
    first.close()
    assert list(tmp_path.iterdir()) == []  # nothing was drawn


def test_what_was_written_meanwhile_is_not_replaced(tmp_path):
    grid, array = GridStore(tmp_path / "a.png", 4, None), store_of(tmp_path / "a.npz", n=4)
    for store in (grid, array):
        store.begin()
        store.write(range(4), IMAGES[:4])
        store.out.write_text("mine")
    with pytest.raises(Taken, match="is there already"):
        array.finish([range(4)], True)  # its parts are there for another name
    grid.finish([range(4)], True)
    assert grid.out == tmp_path / "a_2.png"
    assert grid.out.exists()
    array.close()
    assert (tmp_path / "a.png").read_text() == (tmp_path / "a.npz").read_text() == "mine"


def test_a_missing_batch_is_said(tmp_path):
    store = store_of(tmp_path / "a.npz")
    store.begin()
    store.write(range(4), IMAGES[:4])
    with pytest.raises(UsageError, match=r"lacks images: it must lie in a folder that all processes share"):
        store.finish(batches(range(8), 4), True)
    store.close()


def test_an_array_is_written_through_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    fill(store_of(tmp_path / "link/a.npz"), IMAGES)
    with np.load(tmp_path / "real/a.npz") as arrays:
        assert len(arrays["arr_0"]) == 8
