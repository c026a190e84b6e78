"""A compiled network computes the same, under its own names; where nothing can be compiled, one line says so."""

import json

import pytest
import torch
from helpers import command
from test_trainer import assert_same_bits, small, state, train

from diffusion.config.schema import Config
from diffusion.run import checkpoint
from diffusion.training.trainer import Trainer

TINY = dict(model__channel_mult=(1,), model__attention_resolutions=(), train__log_every=1, diffusion__prediction="v")


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_compiled_run_has_the_losses_and_keys_of_a_plain_one_and_resumes_with_the_same_bits(tmp_path):
    plain = train(small(**TINY), tmp_path / "plain")
    heard = []
    trainer = Trainer(small(**TINY, train__compile=True), tmp_path / "compiled", heard.append)
    trainer.run()
    assert heard == []
    assert trainer.network._compiled_call_impl is not None
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)
    weights = checkpoint.open_checkpoint(tmp_path / "compiled").weights()
    assert weights.keys() == plain.network.state_dict().keys()
    train(small(**TINY, train__compile=True, train__steps=3), tmp_path / "resumed")
    assert_same_bits(state(train(small(**TINY, train__compile=True), tmp_path / "resumed")), state(trainer))


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


def test_without_a_compiler_sampling_goes_on_and_says_so(tmp_path, monkeypatch):
    train(small(**TINY), tmp_path / "run")
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    done = command("python", "sample.py", "--ckpt", tmp_path / "run", "--n", "2", "--steps", "3", "--compile",
                   "--images", "--out", tmp_path / "images")  # fmt: skip
    said = [line for line in done.stderr.splitlines() if "--compile" in line]
    assert len(said) == 1
    assert "going on" in said[0]
    assert len(list((tmp_path / "images").glob("*.png"))) == 2


def test_compiling_is_off_by_default():
    assert not Config().train.compile
