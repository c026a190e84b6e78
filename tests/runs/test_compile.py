"""A compiled network computes the same, under its own names; where nothing can be compiled, one line says so."""

import shutil

import pytest
import torch
from helpers import losses, tensors, together
from test_trainer import assert_same_bits, small, train

from diffusion.config.schema import Config
from diffusion.run import checkpoint
from diffusion.training.trainer import Trainer

TINY = dict(model__channel_mult=(1,), model__attention_resolutions=(), train__log_every=1, train__steps=3,
            checkpoint__every=2)  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "plain"
    train(small(**TINY), out)
    return out


def test_a_compiled_run_has_the_losses_and_keys_of_a_plain_one_and_resumes_with_the_same_bits(plain, tmp_path):
    heard = []
    trainer = Trainer(small(**TINY, train__compile=True), tmp_path / "compiled", heard.append)
    trainer.run()
    assert heard == []
    assert trainer.network._compiled_call_impl is not None
    for ours, theirs in zip(losses(tmp_path / "compiled"), losses(plain), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    assert tensors(tmp_path / "compiled").keys() == tensors(plain).keys()
    shutil.copytree(tmp_path / "compiled", tmp_path / "resumed")
    shutil.rmtree(checkpoint.checkpoint_folder(tmp_path / "resumed", 3))
    train(small(**TINY, train__compile=True), tmp_path / "resumed")
    assert_same_bits(tensors(tmp_path / "resumed"), tensors(tmp_path / "compiled"))


def test_dynamo_that_accelerate_was_told_of_saves_the_same_names(plain, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    trainer = train(small(**TINY), tmp_path / "run")
    assert hasattr(trainer.training_step.model, "_orig_mod")
    assert tensors(tmp_path / "run").keys() == tensors(plain).keys()


def nothing_compiles(*args, **kwargs):
    raise RuntimeError("No working C++ compiler found\nand more")


def test_without_a_compiler_training_goes_on_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", nothing_compiles)
    heard = []
    Trainer(small(**TINY, train__compile=True), tmp_path / "run", heard.append).run()
    assert len(heard) == 1
    assert heard[0].startswith("train.compile: the network is not compiled, since nothing can be compiled here (")
    assert "No working C++ compiler found" in heard[0]
    assert "\n" not in heard[0]


def test_without_a_compiler_sampling_goes_on_and_says_so(plain, tmp_path):
    flags = ["--ckpt", plain, "--n", 2, "--steps", 3, "--compile", "--images", "--out", tmp_path / "images"]
    without = {"PATH": tmp_path, "TORCHINDUCTOR_CACHE_DIR": tmp_path / "cache"}
    lines = together("sample.py", *flags, processes=1, environment=without).splitlines()
    [said] = [line for line in lines if "--compile" in line]
    assert "nothing is compiled" in said
    assert len(list((tmp_path / "images").glob("*.png"))) == 2


def test_compiling_is_off_by_default():
    assert not Config().train.compile
