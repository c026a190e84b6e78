"""Files that would run code, in each place where train, sample, evaluate or convert opens one; and disks that fail."""

import pickle
import shutil
import subprocess
import zipfile

import pytest
import torch
from helpers import SMALL, Trap
from test_checkpoint import forge
from test_scripts import script
from test_trainer import small

import evaluate
import sample
import train
from diffusion import UsageError
from diffusion.commands import convert
from diffusion.run import checkpoint
from diffusion.training.trainer import Trainer


@pytest.fixture(scope="module")
def upsampler(tmp_path_factory):
    """A run that reads small images, too."""
    out = tmp_path_factory.mktemp("runs") / "run"
    Trainer(small(train__steps=1, data__low_res_size=4), out).run()
    return out


def in_a_checkpoint(name):
    def hide(content, run):
        forge(checkpoint.folders(run)[0], name, content)
        return run

    return hide


def in_cifar10(content, run):
    folder = run.parent / "cifar-10-batches-py"
    folder.mkdir()
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]:
        (folder / name).write_bytes(content)
    return run


def in_mnist(content, run):
    for folder in ("processed", "raw"):
        (run.parent / "MNIST" / folder).mkdir(parents=True)
        for name in ("training.pt", "test.pt", "train-images-idx3-ubyte", "train-labels-idx1-ubyte"):
            (run.parent / "MNIST" / folder / name).write_bytes(content)
    return run


def as_file(name):
    def hide(content, run):
        (run.parent / name).write_bytes(content)
        return run

    return hide


def in_an_array(content, run):
    with zipfile.ZipFile(run.parent / "small.npz", "w") as archive:
        header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
        header += b" " * (117 - len(header)) + b"\n"
        archive.writestr("arr_0.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + content)
    return run


TRAIN = ["--out", "{run}/../other", *SMALL]
CONTINUE = ["--out", "{run}", "--train.steps", "3", "--train.batch_size", "16", "--data.low_res_size", "4"]
SAMPLE = ["--ckpt", "{run}", "--n", "1", "--steps", "1"]
ENLARGE = [*SAMPLE, "--low_res", "{run}/samples"]
FOLDER = [
    *TRAIN,
    "--data.source",
    "folder",
    "--data.image_size",
    "8",
    "--data.channels",
    "1",
    "--data.path",
    "{run}/../images",
]
PLACES = {
    "the optimizer's state": (in_a_checkpoint("training.pt"), train, CONTINUE),
    "weights, in training on": (in_a_checkpoint("model.safetensors"), train, CONTINUE),
    "weights, in sampling": (in_a_checkpoint("model.safetensors"), sample, [*ENLARGE, "--ema", "none"]),
    "averages": (in_a_checkpoint("ema_0.999.safetensors"), sample, ENLARGE),
    "averages, in scoring": (in_a_checkpoint("ema_0.999.safetensors"), evaluate, SAMPLE),
    "state.json": (in_a_checkpoint("state.json"), sample, ENLARGE),
    "config.yaml of a checkpoint": (in_a_checkpoint("config.yaml"), sample, ENLARGE),
    "checksums": (in_a_checkpoint("SHA256SUMS"), sample, ENLARGE),
    "the configuration": (as_file("c.yaml"), train, ["--config", "{run}/../c.yaml", "--out", "{run}/../other"]),
    "CIFAR-10": (in_cifar10, train, [*TRAIN, "--data.source", "cifar10", "--data.path", "{run}/.."]),
    "MNIST": (in_mnist, train, [*TRAIN, "--data.source", "mnist", "--data.path", "{run}/.."]),
    "an image": (as_file("images/a.png"), train, FOLDER),
    "an image that is an array": (as_file("images/a.npy"), train, FOLDER),
    "small images": (in_an_array, sample, [*SAMPLE, "--low_res", "{run}/../small.npz"]),
    "a small image": (as_file("images/a.png"), sample, [*SAMPLE, "--low_res", "{run}/../images/a.png"]),
    "their .pt": (as_file("a.pt"), convert,
                  ["openai", "{run}/../a.pt", "--flags", "--image_size 32", "--out", "{run}/../other"]),
    "a run to convert": (in_a_checkpoint("ema_0.999.safetensors"), convert,
                         ["openai", "{run}", "--out", "{run}/../b.pt"]),
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["pickle", "torch.save"])
def test_a_pickle_that_would_write_a_file_writes_none(place, kind, upsampler, tmp_path, monkeypatch, capsys):
    hide, module, argv = PLACES[place]
    run, sprung = tmp_path / "run", tmp_path / "sprung"
    shutil.copytree(upsampler, run)
    (tmp_path / "images").mkdir()
    if kind == "pickle":
        content = pickle.dumps(Trap(sprung))
    else:
        torch.save({"weight": Trap(sprung)}, tmp_path / "saved")
        content = (tmp_path / "saved").read_bytes()
    hide(content, run)
    code, _, err = script(module, monkeypatch, capsys, *(arg.replace("{run}", str(run)) for arg in argv))
    assert not sprung.exists()
    assert code == 2, err
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith(f"{module.__name__}.py: ")


def test_the_trap_works(tmp_path):
    """Else the test above could not fail."""
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


def kilobytes(folder):
    return sum(-(-path.stat().st_size // 4096) * 4 for path in folder.rglob("*") if path.is_file())


def test_a_disk_that_is_full_in_any_file_of_a_save(disk, tmp_path):
    """The first checkpoint fits, and of the second one more each time; then there is room again."""
    folder, resize = disk
    config = small(train__steps=4, checkpoint__every=2)
    Trainer(config, tmp_path / "whole").run()
    whole = checkpoint.checkpoint_folder(tmp_path / "whole", 4)
    one = kilobytes(whole)
    room, places = 0, 0
    for path in (whole / name for name in ("config.yaml", "state.json", "model.safetensors", "ema_0.999.safetensors",
                                           "training.pt", "SHA256SUMS")):  # fmt: skip
        out = folder / path.stem
        assert resize(one + 12 + room)  # 12 for the run's config.yaml, metrics.jsonl and .lock
        trainer = Trainer(config, out)
        with pytest.raises(
            UsageError, match=r"step_00000004 cannot be written: .*; the checkpoints up to step 2 are whole"
        ):
            trainer.run()
        trainer.close()
        assert [p.name for p in (out / "checkpoints").iterdir()] == ["step_00000002"]
        assert checkpoint.open_checkpoint(out).step == 2
        assert resize(100_000)
        Trainer(config, out).run()
        for name in ("model.safetensors", "ema_0.999.safetensors", "training.pt"):
            ours = checkpoint.checkpoint_folder(out, 4) / name
            assert ours.read_bytes() == (whole / name).read_bytes()
        room += -(-path.stat().st_size // 4096) * 4
        shutil.rmtree(out)
        places += 1
    assert places == 6


def test_an_output_that_cannot_be_written_is_named_before_the_first_step(disk, monkeypatch, capsys):
    folder, resize = disk
    Trainer(small(train__steps=1), folder / "run").run()
    assert resize(100_000, "ro")
    again = ["--out", folder / "run", "--train.steps", "3", "--train.batch_size", "16"]
    for module, argv in (
        (train, again),
        (train, ["--out", folder / "new", *SMALL]),
        (sample, ["--ckpt", folder / "run"]),
        (evaluate, ["--ckpt", folder / "run", "--n", "2", "--steps", "2", "--out", folder / "x.json"]),
        (convert, ["openai", folder / "run", "--out", folder / "x.pt"]),
    ):
        code, _, err = script(module, monkeypatch, capsys, *argv)
        assert code == 2
        assert "Read-only file system" in err.splitlines()[-1]
        assert str(folder) in err.splitlines()[-1]
