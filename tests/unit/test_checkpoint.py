"""Checkpoints on disk: what is saved comes back, damage is found, and a save that fails leaves nothing."""

import dataclasses
import errno
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from diffusion import UsageError
from diffusion.config.schema import Config, config_of
from diffusion.ema import EMA
from diffusion.run import checkpoint
from diffusion.run.checkpoint import Checkpoint, Damaged, newest, unflatten
from diffusion.run.folder import check_is_run, is_checkpoint, is_run, mark_run, run_of

CONFIG = config_of({"model": {"channel_mult": [1]}})
NAMES = tuple("0123456789")
TRAINING = {"step": {"optimizer": {0: {"exp_avg": torch.ones(3)}}}, "meter": {"unreadable": ["a.png"], "scale": 0.5}}
FILES = ["state.json", "config.yaml", "model.safetensors", "ema_0.999.safetensors", "training.safetensors",
         "SHA256SUMS"]  # fmt: skip


def forge(folder, name, content):
    """Replace a file of a checkpoint, and correct its checksum."""
    (folder / name).write_bytes(content)
    files = [path for path in folder.iterdir() if path.name != "SHA256SUMS"]
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
    (folder / "SHA256SUMS").write_text("".join(sums))


def save(run, step, weights, averages=None, config=CONFIG, training=TRAINING, **about):
    folder = checkpoint.checkpoint_folder(run, step)
    checkpoint.save(folder, step, config, NAMES, weights, averages or {}, training, **about)
    return folder


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory):
    """A run with checkpoints of steps 9 and 10, and the network saved there."""
    torch.manual_seed(0)
    network, path = CONFIG.network(10), tmp_path_factory.mktemp("checkpoint") / "run"
    path.mkdir()
    mark_run(path, [])
    for step in (9, 10):
        averages = {0.999: {name: p + 1 for name, p in network.state_dict().items()}}
        save(path, step, network.state_dict(), averages, data="of 1797", origin={"step": 3})
    return path, network


@pytest.fixture
def run(saved_run, tmp_path):
    """A copy of the run, to be damaged."""
    return shutil.copytree(saved_run[0], tmp_path / "run")


@pytest.fixture
def tiny(tmp_path):
    """A run of a checkpoint whose weights are three numbers."""
    mark_run(tmp_path, [])
    return save(tmp_path, 1, {"w": torch.ones(3)})


def everything(path):
    """A checkpoint whose every file is read."""
    return newest(path, Checkpoint.files)[0]


def test_what_is_saved_comes_back(saved_run):
    path, network = saved_run
    saved, files = newest(path, Checkpoint.files)
    assert (saved.step, saved.config, saved.class_names) == (10, CONFIG, NAMES)
    assert (saved.data, saved.origin) == ("of 1797", {"step": 3})
    weights, average = saved.weights("none"), saved.weights()
    for name, value in network.state_dict().items():
        assert torch.equal(weights[name], value)
        assert torch.equal(average[name], value + 1)
    training = unflatten({**files["training.safetensors"], **saved.numbers})
    assert torch.equal(training["step"]["optimizer"]["0"]["exp_avg"], torch.ones(3))
    assert training["meter"] == TRAINING["meter"]
    loaded, y = saved.network(weights), torch.tensor([3, 4])
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([1.0, 2.0])
    assert torch.equal(loaded(x, t, y), network(x, t, y))


def test_a_path_is_a_run_or_a_checkpoint_by_what_it_holds(saved_run, tmp_path):
    path, _ = saved_run
    folder = checkpoint.checkpoint_folder(path, 10)
    assert (is_run(path), is_checkpoint(path), is_run(folder), is_checkpoint(folder)) == (True, False, False, True)
    assert run_of(folder) == path
    alone = shutil.copytree(folder, tmp_path / "alone")
    assert run_of(alone) is None
    assert everything(alone).step == 10
    (tmp_path / "link").symlink_to(folder)
    assert everything(tmp_path / "link").path == folder.resolve()
    for other, says in ((tmp_path / "nowhere", "does not exist"), (tmp_path, r"it holds no run\.json"),
                        (folder.parent, f"name {path}"), (folder / "state.json", f"name {folder}")):  # fmt: skip
        with pytest.raises(UsageError, match=rf"{other}.*{says}"):
            check_is_run(other)
    with pytest.raises(UsageError, match="is not a checkpoint or a run that has saved one"):
        everything(tmp_path)


def test_the_newest_is_taken_and_what_a_kill_left_is_not_a_checkpoint(run):
    shutil.copytree(run / "checkpoints/step_00000010", run / "checkpoints/.step_00000011.tmp")
    assert everything(run).step == 10
    assert everything(run / "checkpoints/step_00000009").step == 9


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "cut", "empty"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(run, name, damage):
    folder = run / "checkpoints/step_00000010"
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if damage != "missing":
        (folder / name).write_bytes(content[: len(content) // 3 if damage == "cut" else 0])
    if name != "state.json" or damage != "missing":  # else the folder is not a checkpoint
        with pytest.raises(Damaged, match=rf"step_00000010 is not whole: {name} is (missing|damaged)") as caught:
            everything(folder)
        assert "\n" not in str(caught.value)
    saved = everything(run)
    [(passed, reason)] = saved.passed_over
    assert (saved.step, passed) == (9, folder)
    assert f"{name} is " in reason


def test_no_whole_checkpoint_is_said(run):
    for folder in checkpoint.folders(run):
        (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(Damaged, match=r"none of the 2 checkpoints of .* is whole; of the newest: .*step_00000010"):
        everything(run)


@pytest.mark.parametrize("name", ["state.json", "SHA256SUMS", "training.safetensors"])
@pytest.mark.parametrize("error", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_a_file_that_cannot_be_read_now_is_not_damaged(saved_run, monkeypatch, name, error):
    """No older checkpoint is used in its place."""
    path, works = saved_run[0], Path.read_bytes

    def fails(self):
        if self == path / "checkpoints/step_00000010" / name:
            raise OSError(error, os.strerror(error))
        return works(self)

    monkeypatch.setattr(Path, "read_bytes", fails)
    with pytest.raises(UsageError, match=f"{name} cannot be read: .*; nothing was changed") as caught:
        everything(path)
    assert not isinstance(caught.value, Damaged)


def test_a_checkpoint_of_another_version_is_not_damaged(tiny):
    forge(tiny, "state.json", json.dumps({"format": 99}).encode())
    with pytest.raises(UsageError, match="has format 99; this version reads 7") as caught:
        everything(tiny.parent.parent)
    assert not isinstance(caught.value, Damaged)
    (tiny / "training.safetensors").rename(tiny / "training.pt")
    forge(tiny, "state.json", json.dumps({"format": 6}).encode())
    with pytest.raises(UsageError, match="is of an earlier version; this one reads format 7") as caught:
        everything(tiny.parent.parent)
    assert not isinstance(caught.value, Damaged)


def test_a_checkpoint_under_another_name_is_refused(tiny):
    with pytest.raises(UsageError, match="is of step 1: give the folder its name back"):
        everything(tiny.rename(tiny.with_name("step_00000002")))


def test_another_architecture_is_told_apart(saved_run):
    saved = everything(saved_run[0])
    deeper = dataclasses.replace(saved.config, model=dataclasses.replace(saved.config.model, num_res_blocks=2))
    says = r"of another architecture: \d+ of \d+ weights differ: input_blocks.*; and \d+ more$"
    with pytest.raises(UsageError, match=says):
        dataclasses.replace(saved, config=deeper).network(saved.weights())


def test_an_edited_configuration_is_damage(tiny):
    file = tiny / "config.yaml"
    assert "seed: 0" in file.read_text()
    file.write_text(file.read_text().replace("seed: 0", "seed: 1"))
    with pytest.raises(Damaged, match=r"config\.yaml is damaged \(settings are changed on the command line\)"):
        everything(tiny)


def test_every_flipped_bit_and_every_cut_is_found(tiny):
    """At 100 random places of all files."""
    files, rng = sorted(tiny.iterdir()), np.random.default_rng(0)
    for i in range(100):
        file = files[i % len(files)]
        content = file.read_bytes()
        place = int(rng.integers(len(content)))
        flipped = bytes([content[place] ^ (1 << int(rng.integers(8)))])
        file.write_bytes(content[:place] + flipped + content[place + 1 :] if i % 4 else content[:place])
        with pytest.raises(UsageError, match=r"is not whole"):
            everything(tiny)
        file.write_bytes(content)
    assert everything(tiny).step == 1


def test_weights_are_those_that_were_verified(run):
    """A file may be overwritten in place, as by rsync --inplace, or cut while its weights are used."""
    saved, weights = newest(run, Checkpoint.weights)
    before, file = {name: value.clone() for name, value in weights.items()}, run / "checkpoints/step_00000010"
    file /= saved.chosen()
    file.write_bytes(file.read_bytes()[:1000] + bytes(file.stat().st_size - 1000))
    os.truncate(file, 100)
    assert all(torch.equal(value, before[name]) for name, value in weights.items())
    with pytest.raises(Damaged):
        newest(saved.path, Checkpoint.weights)


def test_the_checksums_are_those_of_sha256sum(tiny):
    for line in (tiny / "SHA256SUMS").read_text().splitlines():
        wanted, name = line.split("  ")
        assert hashlib.sha256((tiny / name).read_bytes()).hexdigest() == wanted


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "left"),
    [(0, 0, [2, 4, 6, 8, 10]), (2, 0, [8, 10]), (1, 4, [4, 8, 10]), (9, 0, [2, 4, 6, 8, 10]), (1, 5, [10])],
)
def test_old_checkpoints_are_removed(tmp_path, keep_last, keep_every, left):
    for step in (2, 4, 6, 8, 10):
        checkpoint.checkpoint_folder(tmp_path, step).mkdir(parents=True)
    (tmp_path / "checkpoints/step_1").mkdir()  # somebody's own
    checkpoint.prune(tmp_path, keep_last, keep_every)
    names = ["step_1", *(f"step_{step:08d}" for step in left)]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == sorted(names)


def test_a_save_that_fails_leaves_nothing_behind(tiny, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    before = sorted(tiny.parent.rglob("*"))
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save(tiny.parent.parent, 11, {"w": torch.ones(3)})
    assert sorted(tiny.parent.rglob("*")) == before


def test_a_file_system_that_cannot_sync_a_folder_is_saved_into(tmp_path, monkeypatch):
    works = os.fsync

    def fsync(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        works(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    assert everything(save(tmp_path, 1, {"w": torch.ones(3)})).step == 1


# --- power-function averages ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lengths(tmp_path_factory):
    """A run that keeps averages of lengths 0.05 and 0.1, and the average of length 0.075 of the same weights."""
    run, config = tmp_path_factory.mktemp("lengths"), config_of({"train": {"ema_lengths": [0.05, 0.1]}})
    mark_run(run, [])
    weights, generator = nn.Linear(10, 10, bias=False), torch.Generator().manual_seed(0)
    nn.init.zeros_(weights.weight)
    kept, direct = EMA(weights, [], lengths=[0.05, 0.1]), EMA(weights, [], lengths=[0.075])
    for step in range(40):
        with torch.no_grad():
            weights.weight.add_(torch.randn(10, 10, generator=generator))
        kept.update(step)
        direct.update(step)
        if step % 2:
            averages = {0.999: {}, **kept.averages}
            save(run, step + 1, weights.state_dict(), averages, config, {"step": torch.zeros(())})
    return run, direct.averages["length0.075"]["weight"]


def test_an_average_of_another_length_is_reconstructed_from_the_checkpoints(lengths):
    """As one that is tracked directly."""
    run, direct = lengths
    saved, found = newest(run, lambda saved: saved.weights("length0.075"))
    kept, scale = saved.weights("length0.05"), (saved.weights("none")["weight"] - direct).norm() ** 2
    assert (kept["weight"] - direct).norm() ** 2 > 0.01 * scale
    assert (found["weight"] - direct).norm() ** 2 < 0.003 * scale
    assert torch.equal(saved.weights("length0.10")["weight"], saved.weights("length0.1")["weight"])
    earlier, average = newest(run / "checkpoints/step_00000020", lambda saved: saved.weights("length0.075"))
    assert earlier.step == 20
    assert not torch.equal(average["weight"], found["weight"])


def test_an_earlier_checkpoint_that_is_damaged_is_not_taken_for_the_newest(lengths, tmp_path):
    run = shutil.copytree(lengths[0], tmp_path / "run")
    (run / "checkpoints/step_00000020/ema_length0.1.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match=r"--ema is length0.075, which is made of all .*step_00000020 is not whole"):
        newest(run, lambda saved: saved.weights("length0.075"))


def test_averages_that_a_run_cannot_give_are_refused(lengths, saved_run):
    first = lengths[0] / "checkpoints/step_00000002"
    for wanted, says in (
        ("length0.2", "--ema is length0.2; the averages of lengths 0.05, 0.1 after steps 2 express it with an error"),
        ("length0.5", "a length from length0.01 to length0.28, or none"), ("length-1", "or none"), ("0.05", "or none"),
        ("length0", "or none"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=re.escape(says)):
            newest(first, lambda saved, wanted=wanted: saved.weights(wanted))
    with pytest.raises(UsageError, match=r"--ema is length0.1; .* has 0.999, or none"):
        everything(saved_run[0]).weights("length0.1")


def test_the_default_configuration_is_saved_with_every_setting(tmp_path):
    saved = everything(save(tmp_path, 1, {"w": torch.ones(3)}, config=Config()))
    assert saved.config == Config()
