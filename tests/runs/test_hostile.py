"""Files of strangers, and what a disk or a worker does to a run: nothing is run, nothing hangs, memory suffices."""

import dataclasses
import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import numpy as np
import pytest
import torch
from helpers import ROOT, user_environment
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_trainer import TINY, metrics, saved_step, small

from diffusion import UsageError
from diffusion.config.files import load_config, save_config
from diffusion.config.schema import all_settings, config_of
from diffusion.data import loader
from diffusion.data.base import load
from diffusion.data.image_files import FileDataset
from diffusion.data.sources.folder import Folder
from diffusion.data.sources.torchvision import MNIST
from diffusion.errors import Stopped
from diffusion.files.atomic import replace_text
from diffusion.training.trainer import Trainer

# --- configurations ---------------------------------------------------------------------------------------------------

PATHS = st.one_of(
    st.text(st.characters(codec="utf-8"), min_size=1).filter(str.isprintable),
    st.sampled_from(["null", "~", "1", "1e3", "0x10", "010", "true", "no", "[1]", "{a: 1}", "#x", "a: b", "- a", "'",
                     '"', "*a", "&a", "!!x", "%x", "@x", "`x", "|", ">", "=", "<<", "2020-01-01", "1:30", ".inf", " a ",
                     "é", "🎉"]),
)  # fmt: skip


@given(PATHS, PATHS, st.floats(min_value=5e-324, allow_infinity=False), st.integers(0, 10**9),
       st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=4, unique=True))  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_what_is_saved_is_read_back(tmp_path_factory, path, source, lr, seed, rates):
    config = config_of({
        "data": {"source": "folder", "path": path}, "sample": {"steps": "10"}, "diffusion": {"respacing": "ddim50"},
        "train": {"init_from": source, "lr": lr, "seed": seed, "ema_rates": rates},
    })  # fmt: skip
    file = tmp_path_factory.getbasetemp() / "config.yaml"
    save_config(config, file)
    again = load_config(file)
    assert again == config
    assert type(again.train.lr) is float
    assert type(again.sample.steps) is str
    assert (again.data.path, again.train.init_from) == (path, source)


@pytest.mark.parametrize("path", ["", "a\nb"], ids=["empty", "two lines"])
def test_a_path_that_cannot_be_printed_is_refused(path):
    with pytest.raises(UsageError, match=r"^data\.path is .*; it must name a file or folder"):
        config_of({"data": {"source": "folder", "path": path}})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("train:\n  lr:\n  - &a0 [x, x]\n" + "".join(f"  - &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40)),
         "uses an alias"),
        ("train:\n" + "".join(f"  k{i}: 1\n" for i in range(3000)), "unknown key train.k0"),
        ("train: {steps: 1}\n#" + "#" * 2**20, "is larger than 1 MiB"),
        ("train: " + "[" * 3000 + "]" * 3000, "maximum recursion depth"),
        (b"data:\n  path: \xff\n", "is not YAML"),
        ("train: !!python/object/apply:os.system [exit]", "is not YAML"),
        ("train: {lr: 1, lr: 2}", "is not YAML"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 30 else "",
)  # fmt: skip
def test_an_odd_file_gets_one_line(tmp_path, text, says):
    file = tmp_path / "c.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    began = time.process_time()
    with pytest.raises(UsageError, match=says) as caught:
        load_config(file)
    assert len(str(caught.value)) < 600
    assert "\n" not in str(caught.value)
    assert time.process_time() - began < 10


def test_every_setting_has_types_and_a_description():
    for key, setting in all_settings().items():
        assert all(setting.texts), key
        assert setting.types, key


# --- waits ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(20):
        Image.effect_noise((8, 8), 90 + i).save(tmp_path / f"images/{i}.png")
    return tmp_path / "images"


def test_a_signal_is_obeyed_while_images_are_waited_for(images, tmp_path, monkeypatch):
    """A disk that does not answer any more: what was done is saved, and the run goes on as a whole one."""
    monkeypatch.setattr("diffusion.data.image_files.IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(loader, "POLL_SECONDS", 0.2)
    config = small(data__source="folder", data__path=str(images), data__workers=1, model__class_cond=False,
                   train__batch_size=4, train__log_every=1, **TINY)  # fmt: skip
    Trainer(config, tmp_path / "whole").run()
    works, stuck = FileDataset.read, tmp_path / "stuck"

    def read(self, path):
        if stuck.exists():
            time.sleep(600)
        return works(self, path)

    monkeypatch.setattr(FileDataset, "read", read)

    def cut(step, _):
        if step == 2:
            stuck.touch()
            threading.Timer(1, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()

    began = time.monotonic()
    with pytest.raises(Stopped, match="stopped by SIGTERM after step"):
        Trainer(config, tmp_path / "run").run(cut)
    assert time.monotonic() - began < 30
    stuck.unlink()
    assert 2 <= saved_step(tmp_path / "run") < 6
    Trainer(dataclasses.replace(config, data=dataclasses.replace(config.data, workers=0)), tmp_path / "run").run()
    lines = [[line["loss"] for line in metrics(tmp_path / name)] for name in ("whole", "run")]
    assert lines[0] == lines[1]


READ = """
import sys
from diffusion.data.loader import step_batches
from diffusion.data.sources.folder import Folder
data = Folder(path=sys.argv[1], image_size=256).list_files()
for images, *_ in step_batches(data, 4, 0, range(2), [slice(0, 4)], workers=2):
    print(tuple(images.shape))
"""


def test_workers_need_no_shared_memory(tmp_path):
    """Docker gives /dev/shm 64 MB, where torch would send batches through and lose them."""
    if not shutil.which("unshare") or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("this user may not mount")
    for i in range(4):
        Image.effect_noise((256, 256), 90 + i).save(tmp_path / f"{i}.png")
    mounted = 'mount -t tmpfs -o size=100k tmpfs /dev/shm && exec "$@"'
    argv = ["unshare", "-m", "sh", "-c", mounted, "sh", sys.executable, "-c", READ, str(tmp_path)]
    done = subprocess.run(argv, cwd=ROOT, env=user_environment(), capture_output=True, text=True, timeout=100)
    assert done.stdout.splitlines() == ["(4, 3, 256, 256)"] * 2, done.stderr


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_that_cannot_be_started_are_said(images):
    data = Folder(path=str(images), image_size=8, channels=1).list_files()
    before, taken = resource.getrlimit(resource.RLIMIT_NOFILE), []
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, before[1]))
    try:
        with suppress(OSError):
            while True:
                taken.append(os.dup(1))
        for _ in range(20):
            os.close(taken.pop())
        with pytest.raises(UsageError, match=r"data\.workers is 16, and they cannot be started: Too many open files"):
            next(loader.step_batches(data, 4, 0, range(2), [slice(0, 4)], workers=16))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for descriptor in taken:
            os.close(descriptor)


# --- files that are replaced ------------------------------------------------------------------------------------------


def test_a_file_is_replaced_whole_or_stays(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    path.write_text("old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        replace_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_is_written_through(tmp_path):
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "link.json").symlink_to("real.json")
    replace_text(tmp_path / "link.json", "new")
    assert (tmp_path / "real.json").read_text() == "new"
    assert (tmp_path / "link.json").is_symlink()


# --- data -------------------------------------------------------------------------------------------------------------


def test_a_class_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.new("L", (8, 8)).save(tmp_path / name / "0.png")
    works = os.scandir

    def scandir(path):
        if str(path).endswith("dog"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return works(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UsageError, match="dog cannot be listed: Permission denied"):
        Folder(path=str(tmp_path)).open()


def test_images_that_are_too_large_are_left_out_the_same_each_time(tmp_path):
    """PIL's own warning, filtered by thread, came and went."""
    for i in range(40):
        large = i % 10 == 0
        Image.new("1", (9500, 9500) if large else (16, 16)).save(tmp_path / f"{i:02d}.png")
    config = Folder(path=str(tmp_path), on_error="skip")
    found = {(len(data), data.fingerprint()) for data in (config.open() for _ in range(3))}
    assert len(found) == 1
    assert found.pop()[0] == 36


def test_labels_that_no_class_has_are_named(tmp_path):
    """EMNIST's files have MNIST's names, and 47 classes."""
    folder = tmp_path / "MNIST/raw"
    folder.mkdir(parents=True)
    for name, count in (("train", 5), ("t10k", 5)):
        header = (0x803).to_bytes(4, "big") + b"".join(x.to_bytes(4, "big") for x in (count, 28, 28))
        (folder / f"{name}-images-idx3-ubyte").write_bytes(header + bytes(count * 784))
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(
            (0x801).to_bytes(4, "big") + count.to_bytes(4, "big") + bytes([1, 2, 46, 3, 4])
        )
    with pytest.raises(UsageError, match="5 images and 5 labels up to 46; mnist has 10 classes"):
        MNIST(path=str(tmp_path), image_size=28).open()


def test_one_image_of_one_pixel_is_trained_on(tmp_path):
    (tmp_path / "in").mkdir()
    Image.new("L", (1, 1), 100).save(tmp_path / "in/0.png")
    config = small(model__class_cond=False, data__source="folder", data__path=str(tmp_path / "in"), data__image_size=1,
                   train__batch_size=1, train__steps=1, sample__n=1, **TINY)  # fmt: skip
    Trainer(config, tmp_path / "run").run()
    assert saved_step(tmp_path / "run") == 1


def test_images_in_memory_are_those_of_the_loader(images):
    data = Folder(path=str(images), image_size=8, channels=1).open()
    read = Folder(path=str(images), image_size=8, channels=1).list_files()
    assert torch.equal(load(data, range(20))[0], load(read, range(20))[0])
    assert load(read, [3])[0].dtype == torch.uint8
    assert isinstance(read.__getitems__([1])[0], np.ndarray)
