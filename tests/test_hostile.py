"""What a file, a worker or a disk may do to a run: nothing is overwritten, nothing hangs, nothing whole is put away."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, SMALL, command, user_environment
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_checkpoint import forge
from test_scripts import script
from test_trainer import metrics, small

import evaluate
import sample
import train
from diffusion import UsageError
from diffusion.config.fields import describe
from diffusion.config.files import load_config, save_config
from diffusion.config.schema import FIELDS, classes_with, config_of
from diffusion.data.base import load
from diffusion.data.image_files import FileDataset
from diffusion.data.sources.folder import Folder
from diffusion.data.sources.torchvision import MNIST
from diffusion.errors import Stopped
from diffusion.files.atomic import replace_text
from diffusion.run import checkpoint
from diffusion.training.trainer import Trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("hostile") / "run"
    Trainer(small(train__steps=2, train__optimizer="adamw", checkpoint__every=1), out).run()
    return out


@pytest.fixture
def run(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def newest(run):
    return checkpoint.folders(run)[0]


# --- tensors from files -----------------------------------------------------------------------------------------------

MOMENT = ("step", "optimizer", 0, "exp_avg")
TENSORS = {
    "stride 0": (MOMENT, lambda x: torch.zeros(1).expand(x.shape), "stores fewer"),
    "float64": (MOMENT, lambda x: x.double(), "torch.float64"),
    "another shape": (MOMENT, lambda x: x[:1].clone(), "a tensor is"),
    "sparse": (MOMENT, lambda x: x.to_sparse(), "not dense"),
    "a number": (MOMENT, lambda x: 3.0, "a tensor is float"),
    "no step": (("step", "optimizer", 0, "step"), None, "does not hold"),
    "a step of numbers": (("step", "optimizer", 0, "step"), lambda x: torch.ones(3), "a tensor is"),
    "a step that is none": (("step", "optimizer", 0, "step"), lambda x: torch.tensor(float("nan")), "count of steps"),
    "a state too many": (("step", "optimizer", 10**6), lambda x: {}, "of other parameters"),
    "a moment too many": (("step", "optimizer", 0, "max_exp_avg_sq"), lambda x: torch.zeros(3), "another optimizer"),
    "a meter of another shape": (("meter", "sums"), lambda x: x[:, :1].clone(), "a tensor is"),
    "a meter without numbers": (("meter", "steps"), lambda x: None, "a tensor is"),
    "a meter with other names": (("meter", "unreadable"), lambda x: [1], "not strings"),
    "no meter": (("meter",), lambda x: None, "does not hold"),
    "an importance that is not asked for": (("step", "importance"), lambda x: {"losses": 3}, "does not hold"),
    "a scaler of texts": (("step", "scaler"), lambda x: {"scale": "big"}, "loss scale is invalid"),
    "a scaler that is a tensor": (("step", "scaler"), lambda x: torch.zeros(3), "does not hold"),
    "a meter without a number": (("meter", "sums"), lambda x: x * float("nan"), "impossible"),
    "steps below zero": (("meter", "steps"), lambda x: x - 5, "impossible"),
    "a moment without end": (MOMENT, lambda x: x + float("inf"), "a moment is impossible"),
    "a negative square": (("step", "optimizer", 0, "exp_avg_sq"), lambda x: x - 1, "a moment is impossible"),
    "10^10 elements": (("more",), lambda x: torch.zeros(1).expand(10**10), "stores fewer"),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_every_tensor_of_a_training_state_is_checked(run, kind):
    """A fused optimizer writes where strides and shapes lead it, in the memory of the process."""
    place, change, says = TENSORS[kind]
    training = torch.load(newest(run) / "training.pt", weights_only=True)
    inside = training
    for key in place[:-1]:
        inside = inside[key]
    if change is None:
        del inside[place[-1]]
    else:
        inside[place[-1]] = change(inside.get(place[-1]))
    forge(newest(run), "training.pt", training)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match=says) as caught:
        Trainer(small(train__steps=3, train__optimizer="adamw"), run)
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("change", [lambda x: x * 0, lambda x: x + 1e300, lambda x: {}, lambda x: x.float(),
                                    lambda x: x[:1], lambda x: x - float("inf")])  # fmt: skip
def test_an_impossible_history_of_losses_is_refused(change, tmp_path):
    config = dict(train__timestep_sampler="loss_second_moment", diffusion__steps=2, sample__steps=2)
    Trainer(small(train__steps=8, **config), tmp_path).run()
    training = torch.load(newest(tmp_path) / "training.pt", weights_only=True)
    training["step"]["importance"]["losses"] = change(training["step"]["importance"]["losses"])
    forge(newest(tmp_path), "training.pt", training)
    with pytest.raises(UsageError, match=r"training\.pt does not hold what a run of this network saves"):
        Trainer(small(train__steps=9, **config), tmp_path)


def test_a_run_of_an_older_version_is_named_as_one(run, monkeypatch, capsys):
    for folder in checkpoint.folders(run):
        forge(folder, "state.json", json.dumps({"format": 4}).encode())
    (run / "config.yaml").write_text("data:\n  name: digits\n")
    code, _, err = script(train, monkeypatch, capsys, "--out", run)
    assert code == 2
    assert "step_00000002 has format 4; this version reads 6" in err


def test_overlapping_memory_is_copied_before_it_is_written(run):
    """Each element has its own storage, but rows of the file share it: allowed, and taken apart."""
    training = torch.load(newest(run) / "training.pt", weights_only=True)
    moment = training["step"]["optimizer"][0]["exp_avg"]
    training["step"]["optimizer"][0]["exp_avg"] = torch.zeros(moment.numel()).as_strided(
        moment.shape, [0] * moment.ndim
    )
    forge(newest(run), "training.pt", training)
    trainer = Trainer(small(train__steps=3, train__optimizer="adamw"), run)
    mine = trainer.training_step.optimizer.state_dict()["state"][0]["exp_avg"]
    assert mine.untyped_storage().nbytes() == mine.numel() * 4
    assert mine.is_contiguous()
    trainer.run()


def test_weights_of_another_type_are_refused(run):
    from safetensors.torch import load_file, save_file

    path = newest(run) / "ema_0.999.safetensors"
    forge(newest(run), path.name, b"")
    save_file({name: value.half() for name, value in load_file(newest(run) / "model.safetensors").items()}, path)
    forge(newest(run), "state.json", (newest(run) / "state.json").read_bytes())
    with pytest.raises(UsageError, match=r"is of torch\.float16; weights are float32"):
        checkpoint.open_weights(run)


@pytest.mark.parametrize("name", ["../../x", "/dev/zero", "a/b", "..", ".hidden"])
def test_checksums_name_files_of_the_checkpoint_only(run, name):
    sums = newest(run) / "SHA256SUMS"
    sums.write_text(sums.read_text() + f"{'0' * 64}  {name}\n")
    with pytest.raises(checkpoint.Damaged, match="names others"):
        checkpoint.open_checkpoint(newest(run))


@pytest.mark.parametrize("name", ["state.json", "SHA256SUMS", "config.yaml", "training.pt", "model.safetensors"])
def test_a_pipe_is_not_waited_for(run, name):
    (newest(run) / name).unlink()
    os.mkfifo(newest(run) / name)
    with pytest.raises(checkpoint.Damaged, match=f"{name} is damaged: it is no file"):
        checkpoint.open_checkpoint(newest(run))


@pytest.mark.parametrize("name", ["state.json", "SHA256SUMS", "training.pt", "model.safetensors"])
@pytest.mark.parametrize("error", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_a_file_that_cannot_be_read_now_is_not_damaged(run, monkeypatch, name, error):
    """The checkpoint stays what and where it is, and no older one is used in its place."""
    works = Path.open

    def fails(self, mode="r", *args, **kwargs):
        if self == newest(run) / name and "r" in mode:
            raise OSError(error, os.strerror(error))
        return works(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", fails)
    before = set(run.rglob("*"))
    with pytest.raises(UsageError, match=f"{name} cannot be read: .*; nothing was changed"):
        Trainer(small(train__steps=3, checkpoint__keep_last=1), run)
    assert set(run.rglob("*")) == before


def test_a_checkpoint_of_another_version_is_not_put_away(run):
    state_ = json.loads((newest(run) / "state.json").read_text()) | {"format": 99}
    forge(newest(run), "state.json", json.dumps(state_).encode())
    with pytest.raises(UsageError, match="has format 99; this version reads 6"):
        Trainer(small(train__steps=3, train__optimizer="adamw"), run)
    assert newest(run).name == "step_00000002"


# --- configurations that are read back --------------------------------------------------------------------------------

PATHS = st.one_of(
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1),
    st.binary(min_size=1).filter(lambda b: b"\0" not in b).map(os.fsdecode),
    st.sampled_from(["null", "~", "1", "1e3", "0x10", "010", "true", "no", "[1]", "{a: 1}", "#x", "a: b", "- a",
                     "'", '"',
                     "*a", "&a", "!!x", "%x", "@x", "`x", "|", ">", "=", "<<", "2020-01-01", "1:30", ".inf", "\ufeff",
                     "\x85", "\u2028", " a ", "a\n", "\t", "é", "🎉", "a\udcff"]),
)  # fmt: skip


@given(PATHS, PATHS, st.floats(min_value=5e-324, allow_infinity=False), st.integers(0, 10**9),
       st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=4, unique=True))  # fmt: skip
@settings(max_examples=300, deadline=None)
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


@pytest.mark.parametrize("path", ["", "a\0b", "\ud800"])
def test_a_path_that_cannot_be_is_refused(path):
    with pytest.raises(UsageError, match=r"^data\.path (is empty|has )"):
        config_of({"data": {"source": "folder", "path": path}})


def test_a_run_on_a_path_that_is_not_utf8_is_continued(tmp_path):
    folder = os.fsencode(tmp_path / "d") + b"\xff"
    os.mkdir(folder)
    for i in range(4):
        Image.effect_noise((8, 8), 90 + i).save(os.path.join(folder, b"%d.png" % i))
    flags = ["--data.source", "folder", "--data.image_size", 8, "--data.channels", 1,
             "--model.class_cond", "false", "--train.batch_size", 4, "--sample.n", 1,
             "--sample.steps", 2, "--out", tmp_path / "run"]  # fmt: skip
    argv = [os.fsencode(str(word)) for word in [sys.executable, "train.py", *flags, "--data.path"]] + [folder]
    for steps in (b"1", b"2"):
        done = subprocess.run([*argv, b"--train.steps", steps], cwd=ROOT, env=user_environment(), capture_output=True)
        assert done.returncode == 0, done.stderr
    assert checkpoint.open_checkpoint(tmp_path / "run").step == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "uses an alias"),
        ("train:\n" + "".join(f"  k{i}: 1\n" for i in range(30_000)), "unknown key train.k0"),
        ("#" * 2**20 + "#", "it is no configuration"),
        ("train: " + "[" * 3000 + "]" * 3000, "--config"),
        (b"data:\n  path: \xff\n", "is not YAML"),
    ],
)
def test_a_file_that_would_fill_the_memory_gets_one_line(tmp_path, text, says):
    file = tmp_path / "c.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    began = time.monotonic()
    with pytest.raises(UsageError, match=says) as caught:
        load_config(file)
    assert len(str(caught.value)) < 600
    assert time.monotonic() - began < 20


def test_a_mapping_with_odd_keys_is_shown():
    with pytest.raises(UsageError, match=r"sample\.options is .*; it must be of type mapping"):
        config_of({"sample": {"options": {b"a": 2}}})


def test_every_field_has_a_type_and_a_description():
    for key in FIELDS:
        for kind in classes_with(key):
            description, types = describe(kind, key.split(".")[1])
            assert description, key
            assert types, key


# --- waits ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path):
    """A folder of more images than are read at the start."""
    (tmp_path / "images").mkdir()
    for i in range(20):
        Image.effect_noise((8, 8), 90 + i).save(tmp_path / f"images/{i}.png")
    return tmp_path / "images"


def on_disk(images, monkeypatch, **changes):
    monkeypatch.setattr("diffusion.data.image_files.IN_MEMORY_BYTES", 0)
    return small(data__source="folder", data__path=str(images), model__class_cond=False, train__batch_size=4,
                 train__log_every=1, **changes)  # fmt: skip


def test_a_signal_is_obeyed_while_images_are_waited_for(images, tmp_path, monkeypatch):
    """A disk that does not answer any more: what was done is saved, and the run ends with the bits of a whole one."""
    whole = Trainer(on_disk(images, monkeypatch, train__steps=6), tmp_path / "whole")
    whole.run()
    works = FileDataset.read
    stuck = tmp_path / "stuck"

    def read(self, path):
        if stuck.exists():
            time.sleep(600)
        return works(self, path)

    monkeypatch.setattr(FileDataset, "read", read)
    config = on_disk(images, monkeypatch, train__steps=6, data__workers=1, train__gradient_accumulation=2)

    def cut(step, _):
        if step == 2:
            stuck.touch()
            threading.Timer(3, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()

    trainer = Trainer(config, tmp_path / "run")
    began = time.monotonic()
    with pytest.raises(Stopped, match="stopped by SIGTERM after step"):
        trainer.run(cut)
    trainer.close()
    assert time.monotonic() - began < 30
    stuck.unlink()
    saved = checkpoint.open_checkpoint(tmp_path / "run")
    assert 2 <= saved.step < 6
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, gradient_accumulation=1))
    resumed = Trainer(config, tmp_path / "run")
    resumed.run()
    lines = [[line["loss"] for line in metrics(tmp_path / name)] for name in ("whole", "run")]
    assert lines[0] == pytest.approx(lines[1], rel=1e-4)


def test_workers_need_no_shared_memory(images, tmp_path):
    """Docker gives /dev/shm 64 MB, where torch would send batches through and lose them."""
    for i in range(8):
        Image.effect_noise((256, 256), 90 + i).save(images / f"large{i}.png")
    argv = [sys.executable, "train.py", "--out", tmp_path / "run", "--data.source", "folder", "--data.image_size", 8,
            "--data.channels", 1, "--data.path", images,
            "--data.image_size", 256, "--data.channels", 3, "--data.workers", 2, "--model.class_cond", "false",
            "--model.channel_mult", "[1,1,1,1,1,1]", "--model.attention_resolutions", "[32]", "--train.steps", 2,
            "--train.batch_size", 4, "--sample.n", 1, "--sample.steps", 2]  # fmt: skip
    code = "import diffusion.data.sources.folder as f, runpy, sys; f.IN_MEMORY_BYTES = 0; sys.argv.pop(0); runpy.run_path('train.py', run_name='__main__')"  # noqa: E501
    inner = [sys.executable, "-c", code, *argv[1:]]
    words = " ".join(f"'{word}'" if "'" not in str(word) else f'"{word}"' for word in inner)
    mounted = f"mount -t tmpfs -o size=100k tmpfs /dev/shm && exec {words}"
    if not shutil.which("unshare") or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("this user may not mount")
    command("unshare", "-m", "sh", "-c", mounted)
    assert checkpoint.open_checkpoint(tmp_path / "run").step == 2


def test_workers_that_cannot_be_started_are_said(tmp_path):
    argv = f"{sys.executable} train.py --out {tmp_path / 'run'} --data.workers 16 {' '.join(SMALL)}"
    done = subprocess.run(f"ulimit -n 40; exec {argv}", shell=True, cwd=ROOT, env=user_environment(), timeout=120,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 2
    assert "data.workers is 16, and they cannot be started: Too many open files" in done.stderr.splitlines()[-1]
    assert "Error:" not in done.stderr


def test_a_closed_terminal_saves_the_run_and_nohup_keeps_it(tmp_path):
    from test_scripts import started

    with started(tmp_path / "run") as process:
        process.send_signal(signal.SIGHUP)
        err = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGHUP
    assert "stopped by SIGHUP after step" in err
    assert checkpoint.open_checkpoint(tmp_path / "run").step >= 3
    with started(tmp_path / "kept", launcher=("nohup", sys.executable)) as process:
        process.send_signal(signal.SIGHUP)
        time.sleep(1)
        assert process.poll() is None
        process.terminate()
        process.communicate(timeout=60)
    assert process.returncode == 143


# --- words, figures, data ---------------------------------------------------------------------------------------------


def test_divergence_before_the_first_checkpoint_does_not_speak_of_one(tmp_path):
    config = small(train__lr=1e30, train__steps=50, train__max_skipped=2, train__log_every=1)
    with pytest.raises(
        UsageError, match=r"no checkpoint was saved before, so the same command begins again, with a lower train\.lr"
    ):
        Trainer(config, tmp_path).run()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    for line in lines:
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert json.loads(lines[-1])["grad_norm"] is None


def test_figures_are_on_the_disk_before_anybody_is_told(trained, tmp_path):
    argv = [sys.executable, "evaluate.py", "--ckpt", trained, "--n", 1, "--steps", 1, "--out", tmp_path / "x.json"]
    with open("/dev/full", "w") as full:
        subprocess.run([str(word) for word in argv], cwd=ROOT, env=user_environment(), stdout=full, timeout=100)
    assert json.loads((tmp_path / "x.json").read_text())["images"] == 1


def test_figures_replace_figures_only(trained, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.json").write_text('{"a": 1}')
    argv = ["--ckpt", trained, "--n", 1, "--steps", 1, "--out", tmp_path / "mine.json"]
    code, _, err = script(evaluate, monkeypatch, capsys, *argv)
    assert code == 2
    assert "is there already: name another" in err
    assert (tmp_path / "mine.json").read_text() == '{"a": 1}'


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


def test_a_link_is_written_through_and_a_device_is_left_alone(tmp_path, trained, monkeypatch, capsys):
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "link.json").symlink_to("real.json")
    replace_text(tmp_path / "link.json", "new")
    assert (tmp_path / "real.json").read_text() == "new"
    assert (tmp_path / "link.json").is_symlink()
    argv = ["--ckpt", trained, "--n", 1, "--steps", 1, "--out", "/dev/null"]
    assert script(evaluate, monkeypatch, capsys, *argv)[0] == 0
    assert Path("/dev/null").is_char_device()


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
    found = {(len(data), data.fingerprint()) for data in (config.open() for _ in range(5))}
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
    for i in range(2):
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.new("L", (1, 1), 100 * i).save(tmp_path / f"in/{i}.png")
    config = small(model__attention_resolutions=(), model__channel_mult=(1,), model__class_cond=False,
                   data__source="folder", data__path=str(tmp_path / "in"), data__image_size=1, train__batch_size=1,
                   train__steps=1, sample__n=1)  # fmt: skip
    Trainer(config, tmp_path / "run").run()


def test_images_in_memory_are_those_of_the_loader(images):
    data = Folder(path=str(images), image_size=8, channels=1).open()
    read = Folder(path=str(images), image_size=8, channels=1).list_files()
    assert torch.equal(load(data, range(20))[0], load(read, range(20))[0])
    assert load(read, [3])[0].dtype == torch.uint8
    assert isinstance(read.__getitems__([1])[0], np.ndarray)


def test_what_was_not_told_apart(run, monkeypatch, capsys):
    """`--ckpt` on a file or a folder inside names what it lies in."""
    for path, kind in ((run / "samples", "run"), (newest(run) / "model.safetensors", "checkpoint")):
        code, _, err = script(sample, monkeypatch, capsys, "--ckpt", path)
        assert code == 2
        assert f"lies in the {kind}" in err
