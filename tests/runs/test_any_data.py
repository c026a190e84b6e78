"""Runs on data of any kind: trained, resumed, sampled and checked by the same commands."""

import importlib
import json
import math
import os
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SMALL, script, together
from PIL import Image
from test_scripts import commands_of
from test_sources import pixels, tarred, write, zipped
from test_trainer import metrics, small

import evaluate
import sample
import train
from benchmarks import verify_resume
from diffusion.commands import check_data
from diffusion.config.files import load_config
from diffusion.data.base import hold_out, open_data
from diffusion.data.loader import step_batches
from diffusion.data.sources.arrays import Arrays
from diffusion.data.sources.digits import Digits
from diffusion.data.sources.folder import Folder
from diffusion.data.sources.huggingface import HuggingFace, TableRows
from diffusion.data.summary import describe_data
from diffusion.run import checkpoint
from diffusion.training.trainer import Trainer

MODEL = ["--model.class_cond", "false", "--model.channel_mult", "[1]", "--model.attention_resolutions", "[]"]


def mixed(root, count=12):
    """A folder of images of many kinds, in two classes: broken, grey, transparent, 16-bit, not square."""
    for name in ("cat", "dog"):
        for i in range(count):
            write(root / name / f"{i}.jpg", pixels(10, 14, 3))
        write(root / name / "grey.png", pixels(8, 8))
        write(root / name / "transparent.png", pixels(8, 8, 4))
        write(root / name / "deep.png", pixels(8, 8, dtype=np.uint16) // 16)
        Image.fromarray(pixels(8, 8, 3)).save(root / name / "moving.gif", save_all=True,
                                              append_images=[Image.fromarray(pixels(8, 8, 3))])  # fmt: skip
    (root / "cat/broken.png").write_bytes(b"no")
    (root / "dog/copy.jpg").write_bytes((root / "cat/0.jpg").read_bytes())
    (root / "cat/notes.txt").write_text("hello")
    write(root / "dog/black.png", np.zeros((8, 8, 3), np.uint8))
    return root


# --- every source resumes to the bit ----------------------------------------------------------------------------------


def sources(tmp_path):
    """A small data set of each kind, and its settings."""
    folder = tmp_path / "folder"
    for i in range(24):
        write(folder / "ab"[i % 2] / f"{i:02d}.png", pixels(8, 8, 3))
    names = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*.png"))]
    np.savez(tmp_path / "arrays.npz", images=pixels(24, 8, 8, 3), labels=np.arange(24) % 2)
    np.save(tmp_path / "signals.npy", np.random.default_rng(0).standard_normal((24, 16, 2)).clip(-4, 4))
    rgb = {"image_size": 8, "channels": 3}
    return {
        "folder": Folder(path=str(folder), **rgb),
        "zip": Folder(path=str(zipped(folder, tmp_path / "a.zip")), **rgb),
        "tar": Folder(path=str(tarred(folder, tmp_path / "a.tar", names)), **rgb),
        "arrays": Arrays(path=str(tmp_path / "arrays.npz"), **rgb),
        "signals": Arrays(path=str(tmp_path / "signals.npy"), image_size=(16,), channels=2, range=(-4, 4)),
    }


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "arrays", "signals", "table"])
def test_every_source_gives_the_same_batches_wherever_a_run_begins(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusion.data.image_files.IN_MEMORY_BYTES", 0)
    if kind == "table":
        config = HuggingFace(path=str(saved_table(tmp_path)), image_size=8, channels=1)
    else:
        config = sources(tmp_path)[kind]

    def batches(steps, workers):
        data, _ = hold_out(open_data(config), 0.2, 0)
        return list(step_batches(data, 8, 0, steps, [slice(0, 8)], workers))

    whole, resumed = batches(range(5), 0), batches(range(2, 5), 1)
    for batch, again in zip(whole[2:], resumed, strict=True):
        assert all(map(torch.equal, batch, again))


def saved_table(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"image": [Image.fromarray(pixels(8, 8)) for _ in range(24)], "label": [0, 1] * 12}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "table")
    return tmp_path / "table"


def test_a_table_opens_no_files_outside_of_it(tmp_path):
    datasets = pytest.importorskip("datasets")
    for path in ("mine.png", "table/own.png"):
        write(tmp_path / path, pixels(8, 8))
    os.mkfifo(tmp_path / "table/pipe.png")
    cells = [{"bytes": None, "path": str(tmp_path / path)}
             for path in ("table/own.png", "table/../mine.png", "table/pipe.png")]  # fmt: skip
    table = datasets.Dataset.from_dict({"image": cells}).cast_column("image", datasets.Image(decode=False))
    rows = TableRows(str(tmp_path / "table"), table, "image")
    with rows.open(0) as file:
        assert file.read() == (tmp_path / "table/own.png").read_bytes()
    with pytest.raises(ValueError, match=r"mine\.png, outside the data set"):
        rows.open(1)
    with pytest.raises(ValueError, match=r"pipe\.png is not a file"):
        rows.open(2)


FLAGS = ["--data.source", "folder", "--data.image_size", "8", "--data.channels", "3", "--data.random_flip", "true",
         "--data.workers", "1", "--data.held_out", "0.2", *SMALL, "--train.batch_size", "8",
         "--diffusion.steps", "50"]  # fmt: skip


def test_a_run_with_workers_resumes_to_the_bit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("diffusion.data.image_files.IN_MEMORY_BYTES", 0)
    path = sources(tmp_path)["folder"].path
    code, out, err = script(verify_resume, monkeypatch, capsys, *FLAGS, "--data.path", path)
    assert code == 0, err
    assert f"{verify_resume.STEPS} steps, interrupted and resumed, end with the same bits as without a break" in out


def test_two_processes_resume_to_the_bit(tmp_path):
    """Workers of two processes read one archive, whose position processes would share."""
    path = sources(tmp_path)["zip"].path
    said = together("benchmarks/verify_resume.py", *FLAGS, "--data.path", path)
    assert "end with the same bits as without a break" in said


# --- any sizes and values: trained, sampled, written ------------------------------------------------------------------


def trained_and_sampled(tmp_path, monkeypatch, capsys, *argv, form="--npz"):
    """A run, and its samples as an array."""
    out = tmp_path / "run"
    code, said, err = script(train, monkeypatch, capsys, "--out", out, *SMALL, *MODEL, "--train.batch_size", "4", *argv)
    assert code == 0, err
    assert Image.open(out / "samples/step_00000003.png").size[0] > 1
    samples = tmp_path / ("samples.npz" if form == "--npz" else "samples")
    code, _, err = script(sample, monkeypatch, capsys, "--ckpt", out, "--n", 3, form, "--out", samples)
    assert code == 0, err
    return out, said, np.load(samples)["arr_0"] if form == "--npz" else sorted(samples.iterdir())


def test_signals_are_trained_on_and_sampled(tmp_path, monkeypatch, capsys):
    values = np.random.default_rng(0).random((8, 32, 2)).astype(np.float32)
    np.save(tmp_path / "a.npy", values)
    argv = (
        "--data.source",
        "arrays",
        "--data.path",
        tmp_path / "a.npy",
        "--data.channels",
        2,
        "--data.range",
        "[0.0,1.0]",
    )
    out, said, samples = trained_and_sampled(tmp_path, monkeypatch, capsys, *argv)
    assert (samples.shape, samples.dtype) == ((3, 32, 2), np.float32)
    assert 0 <= samples.min() < samples.max() <= 1
    assert load_config(out / "config.yaml").data.image_size == (32,)
    assert "8 images as 2 x 32, values 0" in said
    code, said, _ = script(train, monkeypatch, capsys, "--out", out, "--train.steps", 4)
    assert code == 0
    assert "continues after step 3" in said


def test_volumes_are_trained_on_and_sampled(tmp_path, monkeypatch, capsys):
    for i in range(4):
        write(tmp_path / f"data/{i}.npy", pixels(4, 8, 8))
    argv = (
        "--data.source",
        "folder",
        "--data.path",
        tmp_path / "data",
        "--data.image_size",
        "null",
        "--data.channels",
        "1",
    )
    _, _, files = trained_and_sampled(tmp_path, monkeypatch, capsys, *argv, form="--images")
    arrays = [np.load(path) for path in files if path.suffix == ".npy"]
    assert [(array.shape, array.dtype) for array in arrays] == [((4, 8, 8, 1), np.uint8)] * 3


def test_images_of_sixteen_bits_are_written_with_sixteen(tmp_path, monkeypatch, capsys):
    for i in range(4):
        write(tmp_path / f"data/{i}.png", pixels(12, 16, dtype=np.uint16) // 16)
    argv = ["--data.source", "folder", "--data.path", tmp_path / "data", "--data.image_size", "[12, 16]",
            "--data.channels", "1", "--data.range", "[0, 4095]"]  # fmt: skip
    _, said, files = trained_and_sampled(tmp_path, monkeypatch, capsys, *argv, form="--images")
    images = [Image.open(path) for path in files if path.suffix == ".png"]
    assert [(image.mode, image.size) for image in images] == [("I;16", (16, 12))] * 3
    assert 255 < max(np.asarray(image).max() for image in images) <= 4095
    assert "4 of 16 bits, all of which are used" in said
    back = tmp_path / "back"
    code, said, err = script(train, monkeypatch, capsys, "--out", back, *SMALL, *MODEL, *argv, "--train.batch_size", 3,
                             "--data.path", tmp_path / "samples")  # fmt: skip
    assert code == 0, err


def test_sixteen_bits_seen_as_dark_are_told(tmp_path):
    for i in range(4):
        write(tmp_path / f"{i}.png", pixels(8, 8, dtype=np.uint16) // 16)
    config = Folder(path=str(tmp_path), image_size=8, channels=1)
    lines = "\n".join(describe_data(config, open_data(config)))
    assert "those of 16 bits have values up to 4" in lines
    assert "declare what they really span with --data.range" in lines


# --- held out ---------------------------------------------------------------------------------------------------------


def test_the_best_checkpoint_by_held_out_images_is_kept_and_named(tmp_path, monkeypatch, capsys):
    digits = Digits().open()
    np.savez(tmp_path / "digits.npz", images=digits.images[:80, 0].numpy(), labels=digits.labels[:80].numpy())
    config = small(train__steps=8, train__log_every=1, checkpoint__every=1, checkpoint__keep_last=1,
                   data__source="arrays", data__path=str(tmp_path / "digits.npz"), data__image_size=8,
                   data__channels=1, data__held_out=0.4, train__optimizer="adamw", train__lr=0.02,
                   train__ema_warmup=False, train__ema_rates=(0.0,), diffusion__steps=50)  # fmt: skip
    trainer = Trainer(config, tmp_path / "run")
    assert 20 < len(trainer.data.held_out) < 55
    trainer.run()
    losses = {line["step"]: line["held_out_loss"] for line in metrics(tmp_path / "run")}
    best = min(losses, key=losses.get)
    left = [checkpoint.step_of(path) for path in checkpoint.folders(tmp_path / "run")]
    assert left == sorted({8, best}, reverse=True)
    assert (tmp_path / "run/best").resolve().name == f"step_{best:08d}"
    for split, count in (("held_out", len(trainer.data.held_out)), ("train", len(trainer.dataset))):
        figures = tmp_path / f"{split}.json"
        code, _, err = script(evaluate, monkeypatch, capsys, "--ckpt", tmp_path / "run", "--split", split, "--steps", 2,
                              "--out", figures)  # fmt: skip
        assert code == 0, err
        assert json.loads(figures.read_text())["images"] == count
    code, out, err = script(sample, monkeypatch, capsys, "--ckpt", tmp_path / "run/best", "--n", 2)
    assert code == 0, err
    assert str(tmp_path / "run/samples") in out


def test_the_held_out_loss_is_that_of_the_average_and_does_not_disturb_training(tmp_path):
    scored = Trainer(small(train__steps=2, data__held_out=0.02, diffusion__steps=50), tmp_path / "scored")
    first = scored.score_held_out()
    assert scored.score_held_out() == first
    assert math.isfinite(first)
    state = torch.random.get_rng_state()
    scored._scored = -1, None
    assert scored.score_held_out() == first
    assert torch.equal(torch.random.get_rng_state(), state)
    assert scored.network.training
    scored.close()


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_commands_of_the_page_on_data_work(tmp_path, monkeypatch, capsys):
    mixed(tmp_path / "images", 30)
    for name in ("cat/broken.png", "cat/notes.txt", "cat/deep.png", "dog/deep.png"):
        (tmp_path / "images" / name).unlink()
    zipped(tmp_path / "images", tmp_path / "images.zip")
    for i in range(32):
        write(tmp_path / f"scans/{i}.png", pixels(32, 32, dtype=np.uint16) // 16)
    np.save(tmp_path / "signals.npy", np.random.default_rng(0).standard_normal((32, 64, 2)).clip(-4, 4))
    short = ["--train.steps", "2", "--train.batch_size", "8", "--sample.n", "2", "--sample.steps", "2",
             "--diffusion.steps", "50"]  # fmt: skip
    lines = commands_of("docs/data.md")
    for i in range(32):
        for kind in ("input", "mask"):
            write(tmp_path / f"pairs/{i:03}.{kind}.png", pixels(32, 32, 3))
    assert len(lines) == 12
    monkeypatch.chdir(tmp_path)
    for line in lines:
        program, name, *argv = shlex.split(line.split("  #")[0])
        name, argv = (name, argv) if program == "diffusion" else (Path(name).stem, argv)
        module = importlib.import_module(f"diffusion.commands.{name.replace('-', '_')}")
        if name == "evaluate":
            argv = [*argv[:-1], 2]
        if name == "sample" and "--n" not in argv:
            argv = [*argv, "--n", 2]
        code, _, err = script(module, monkeypatch, capsys, *argv, *(short if name == "train" else []))
        assert code == 0, (line, err)


def test_two_processes_score_held_out_images_as_one_does(tmp_path):
    flags = [*SMALL, "--data.held_out", "0.02", "--train.optimizer", "adamw"]
    for processes, name in ((1, "one"), (2, "two")):
        together("train.py", *flags, "--out", tmp_path / name, processes=processes)
    one, two = (metrics(tmp_path / name)[-1]["held_out_loss"] for name in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-4)


# --- check-data and dry runs ------------------------------------------------------------------------------------------


def test_check_data_tells_what_was_found(tmp_path, monkeypatch, capsys):
    root = mixed(tmp_path / "mixed")
    sheet = tmp_path / "sheet.png"
    monkeypatch.setattr(sys, "argv", ["diffusion check-data"])
    code, out, err = script(check_data, monkeypatch, capsys, "--sheet", sheet, "--data.source", "folder",
                            "--data.path", root, "--data.image_size", "8", "--data.held_out", "0.2")  # fmt: skip
    assert code == 0, err
    for part in (
        "1 cannot be read (train without them with --data.on_error skip)", "broken.png cannot be read as an image",
        "JPEG RGB", "PNG I;16", "14x10", "2 of 16 bits, all of which are used", "may have transparent pixels",
        "2 of several frames", "are of another shape than 8x8", "not read: 1 .txt", "2 classes: cat 16, dog 18",
        "1 of a single value", "dog/black.png", "1 groups of images that are the same", "cat/0.jpg = ",
        "of them are held out", "fingerprint ", str(sheet),
    ):  # fmt: skip
        assert part in out, (part, out)
    assert Image.open(sheet).size[0] > 100
    assert list(Path().glob("check-data.png")) == []


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--sheet", "a.jpg"], "--sheet is a.jpg; it must be a .png file"),
        (["--sheet", "/proc/a.png"], "--sheet /proc/a.png cannot be written"),
        (["--data.source", "folder", "--data.path", "/nowhere"], "data.path /nowhere is not there"),
        (["--data.sorce", "folder"], "did you mean data.source"),
    ],
)
def test_check_data_refuses_in_one_line(argv, says, monkeypatch, capsys):
    code, out, err = script(check_data, monkeypatch, capsys, *argv)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert says in err


def test_two_commands_lead_from_mixed_images_to_samples(tmp_path, monkeypatch, capsys):
    root, out = mixed(tmp_path / "mixed"), tmp_path / "run"
    argv = ["--config", "folder_small", "--data.path", root, "--out", out, *SMALL, *MODEL, "--train.batch_size", "8"]
    code, said, err = script(train, monkeypatch, capsys, *argv)
    assert code == 0, err
    assert "broken.png cannot be read" in err
    assert "not read: 1 .txt" in said
    code, said, err = script(sample, monkeypatch, capsys, "--ckpt", out)
    assert code == 0, err


def test_a_dry_run_measures_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    code, out, err = script(train, monkeypatch, capsys, "--dry-run", "--out", tmp_path / "run", *SMALL)
    assert code == 0, err
    for part in ("0.76 million parameters", "GFLOPs a step", "seconds a step", "GiB of memory on one cpu",
                 "3 steps take", "a checkpoint takes"):  # fmt: skip
        assert part in out
    assert not (tmp_path / "run").exists()
    Trainer(small(train__steps=1), tmp_path / "run").run()
    [folder] = checkpoint.folders(tmp_path / "run")
    size = sum(path.stat().st_size for path in folder.iterdir()) / 2**20
    predicted = float(out.split("a checkpoint takes ")[1].split(" MiB")[0])
    assert predicted == pytest.approx(size, abs=1, rel=0.05)
