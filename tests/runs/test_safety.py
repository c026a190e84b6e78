"""Files that would run code, in each place where one of a stranger is opened; and disks that are full or read-only."""

import pickle
import re
import shutil
import subprocess
import zipfile

import pytest
import torch
from helpers import Trap, script
from safetensors import SafetensorError
from test_checkpoint import FILES, forge
from test_trainer import TINY, small

import evaluate
import sample
import train
from diffusion import UsageError
from diffusion.commands import convert
from diffusion.config.files import load_config
from diffusion.config.schema import Config
from diffusion.data.base import load
from diffusion.data.sources.arrays import Arrays
from diffusion.data.sources.folder import Folder
from diffusion.data.sources.torchvision import CIFAR10, MNIST
from diffusion.interop.diffusers import read_pipeline
from diffusion.interop.openai import from_openai
from diffusion.run import checkpoint
from diffusion.run.checkpoint import Checkpoint, newest
from diffusion.run.folder import mark_run
from diffusion.training.trainer import Trainer


def in_file(name, read):
    """Hide content in a file, and read that."""

    def open_it(content, folder):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return read(path)

    return open_it


def cifar10(content, folder):
    inside = folder / "cifar-10-batches-py"
    inside.mkdir()
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]:
        (inside / name).write_bytes(content)
    return CIFAR10(path=str(folder)).open()


def mnist(content, folder):
    for inside in ("processed", "raw"):
        (folder / "MNIST" / inside).mkdir(parents=True)
        for name in ("training.pt", "test.pt", "train-images-idx3-ubyte", "train-labels-idx1-ubyte"):
            (folder / "MNIST" / inside / name).write_bytes(content)
    return MNIST(path=str(folder)).open()


def object_array(content, folder):
    """An .npz whose array is of objects, which numpy would unpickle."""
    with zipfile.ZipFile(folder / "a.npz", "w") as archive:
        header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
        header += b" " * (117 - len(header)) + b"\n"
        archive.writestr("arr_0.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + content)
    return read_array(folder / "a.npz")


def read_images(path):
    return load(Folder(path=str(path.parent), image_size=8, channels=1).open(), [0])


def read_array(path):
    return Arrays(path=str(path), image_size=8, channels=1).open()


def pipeline(path):
    """A pipeline of diffusers, whose weights lie in `path`."""
    (path.parent.parent / "scheduler").mkdir()
    (path.parent / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    (path.parent.parent / "scheduler/scheduler_config.json").write_text('{"_class_name": "DDPMScheduler"}')
    return read_pipeline(path.parent.parent)


PLACES = {
    "a configuration": in_file("c.yaml", load_config),
    "CIFAR-10": cifar10,
    "MNIST": mnist,
    "an image": in_file("images/a.png", read_images),
    "an image that is an array": in_file("images/a.npy", read_images),
    "a .npy": in_file("a.npy", read_array),
    "a .npz": in_file("a.npz", read_array),
    "an array of objects": object_array,
    "their .pt": in_file("a.pt", lambda path: from_openai(path, "--image_size 32")),
    "a pipeline's weights": in_file("unet/diffusion_pytorch_model.safetensors", pipeline),
}


@pytest.fixture(params=["pickle", "torch.save"])
def trap(request, tmp_path):
    """A file's content that would write a file, and that file."""
    sprung = tmp_path / "sprung"
    if request.param == "pickle":
        return pickle.dumps(Trap(sprung)), sprung
    torch.save({"weight": Trap(sprung)}, tmp_path / "saved")
    return (tmp_path / "saved").read_bytes(), sprung


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("place", PLACES)
def test_a_pickle_that_would_write_a_file_writes_none(place, trap, tmp_path):
    content, sprung = trap
    (tmp_path / "in").mkdir()
    with pytest.raises(UsageError) as caught:
        PLACES[place](content, tmp_path / "in")
    assert not sprung.exists()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FILES)
def test_nothing_in_a_checkpoint_is_unpickled(name, trap, tmp_path):
    content, sprung = trap
    folder, weights = checkpoint.checkpoint_folder(tmp_path, 1), {"w": torch.ones(3)}
    checkpoint.save(folder, 1, Config(), (), weights, {0.999: weights}, {"step": torch.ones(1)})
    forge(folder, name, content)
    if name == "SHA256SUMS":
        (folder / name).write_bytes(content)
    with pytest.raises((UsageError, ValueError, SafetensorError)):
        newest(tmp_path, Checkpoint.files)
    assert not sprung.exists()


def test_the_trap_works(tmp_path):
    """Else the tests above could not fail."""
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung")))
    assert (tmp_path / "sprung").exists()


# --- disks ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path):
    """A disk of its own, and what makes it larger or smaller, in kB."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def resize(kilobytes, *options):
        argv = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={kilobytes}k", *options]), "tmpfs", str(folder)]
        return subprocess.run(argv, capture_output=True, check=False).returncode == 0

    if shutil.which("mount") is None or not resize(100_000):
        pytest.skip("this user may not mount")
    yield folder, lambda kilobytes, *options: resize(kilobytes, "remount", *options)
    subprocess.run(["umount", str(folder)], check=True)


def pages(path):
    return -(-path.stat().st_size // 4096) * 4


def kilobytes(folder):
    return sum(pages(path) for path in folder.rglob("*") if path.is_file())


def test_a_disk_that_is_full_in_any_file_of_a_save(disk):
    """One checkpoint fits, and of the next one file more each time; then there is room again."""
    run, resize = disk
    mark_run(run, [])
    weights = {"w": torch.ones(5000)}

    def save(step):
        folder = checkpoint.checkpoint_folder(run, step)
        checkpoint.save(folder, step, Config(), (), weights, {0.999: weights}, {"step": torch.ones(5000)})
        return folder

    first, room = save(2), 0
    used = kilobytes(run)
    for path in (first / name for name in ("state.json", *FILES[1:])):
        assert resize(used + room)
        with pytest.raises((OSError, SafetensorError)):
            save(4)
        assert [path.name for path in (run / "checkpoints").iterdir()] == [first.name]
        assert newest(run, Checkpoint.files)[0].step == 2
        room += pages(path)
    assert resize(100_000)
    save(4)
    assert newest(run, Checkpoint.files)[0].step == 4


def test_a_full_disk_ends_a_command_with_one_line(disk, monkeypatch, capsys):
    folder, resize = disk
    argv = ["--out", folder / "run", "--train.steps", 2, "--train.batch_size", 4, "--sample.n", 1, "--sample.steps", 2,
            "--checkpoint.every", 1]  # fmt: skip
    Trainer(small(train__steps=1, **TINY), folder / "other").run()
    size = kilobytes(folder / "other")
    shutil.rmtree(folder / "other")
    assert resize(size + size // 2)
    code, _, err = script(train, monkeypatch, capsys, *argv, "--model.channel_mult", "[1]")
    assert code == 2
    says = r"step_00000002 cannot be written: .*No space left on device.*; the checkpoints up to step 1 are whole"
    assert re.search(says, err.splitlines()[-1])
    assert "Traceback" not in err
    assert resize(100_000)
    code, said, err = script(train, monkeypatch, capsys, "--out", folder / "run")
    assert code == 0, err
    assert "continues after step 1" in said


def test_an_output_that_cannot_be_written_is_named_before_the_first_step(disk, monkeypatch, capsys):
    folder, resize = disk
    Trainer(small(train__steps=1, **TINY), folder / "run").run()
    assert resize(100_000, "ro")
    for module, argv in (
        (train, ["--out", folder / "run", "--train.steps", "3"]),
        (train, ["--out", folder / "new"]),
        (sample, ["--ckpt", folder / "run"]),
        (evaluate, ["--ckpt", folder / "run", "--n", "2", "--steps", "2", "--out", folder / "x.json"]),
        (convert, ["openai", folder / "run", "--out", folder / "x.pt"]),
    ):
        code, _, err = script(module, monkeypatch, capsys, *argv)
        assert code == 2
        assert "Read-only file system" in err.splitlines()[-1]
        assert str(folder) in err.splitlines()[-1]
