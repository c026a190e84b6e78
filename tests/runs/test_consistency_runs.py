"""A finished run becomes a consistency model: trained on, continued, sampled in few evaluations; what it cannot do."""

import shutil

import pytest
import torch
from helpers import script, tensors
from test_trainer import TINY, assert_same_bits, small, train

import diffusion
import evaluate
import sample
from diffusion import UsageError
from diffusion.commands import convert
from diffusion.training import step as step_module
from diffusion.training.trainer import Trainer

FAST = TINY | dict(diffusion__loss="consistency", sample__sampler="consistency", sample__steps=2, train__seed=1)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    out = tmp_path_factory.mktemp("first") / "run"
    train(small(**TINY, checkpoint__every=3), out)
    return out


@pytest.fixture(scope="module")
def fast(first, tmp_path_factory):
    out = tmp_path_factory.mktemp("fast") / "run"
    train(small(**FAST, train__init_from=str(first), checkpoint__every=3, model__dropout=0.1), out)
    return out


def test_it_is_continued_to_the_bit(first, fast, tmp_path):
    again = shutil.copytree(fast, tmp_path / "again")
    shutil.rmtree(again / "checkpoints/step_00000006")
    train(small(**FAST, train__init_from=str(first), checkpoint__every=3, model__dropout=0.1), again)
    assert_same_bits(tensors(again), tensors(fast))


def test_the_gap_shrinks_over_training(first, tmp_path, monkeypatch):
    seen, real = [], step_module.training_losses
    monkeypatch.setattr(step_module, "training_losses", lambda *case: seen.append(case[-1]) or real(*case))
    train(small(**FAST, train__init_from=str(first)), tmp_path / "run")
    assert seen == [i / 6 for i in range(6)]


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_count_of_steps_is_so_many_evaluations(fast, steps):
    run, calls = diffusion.load(fast), []
    run.network.register_forward_pre_hook(lambda network, inputs: calls.append(inputs[1][0].item()))
    images = run.sample(3, steps=steps)
    assert len(calls) == steps
    assert calls[0] == 995  # log(alpha / sigma) is -5.1
    assert images.shape == (3, 1, 8, 8)
    torch.testing.assert_close(images[1:2], run.sample(2, steps=steps, batch_size=1)[1:], atol=1e-3, rtol=0)


def test_what_it_cannot_do_is_refused_in_a_line(first, fast, monkeypatch, capsys, tmp_path):
    begun = shutil.copytree(first, tmp_path / "begun")
    shutil.rmtree(begun / "checkpoints/step_00000006")
    goes_on = "and a consistency run goes on from a finished run of the same network and process"

    def refused(out, **changes):
        with pytest.raises(UsageError) as error:
            Trainer(small(**FAST | changes), tmp_path / out)
        assert not (tmp_path / out / "checkpoints").exists()
        return str(error.value)

    assert "diffusion.loss is consistency, which trains a finished run further" in refused("a")
    assert refused("b", train__init_from=str(begun)).endswith(f"{goes_on}: it has done 3 of 6 steps")
    other = dict(train__init_from=str(first), diffusion__prediction="epsilon")
    assert refused("c", **other).endswith("diffusion.prediction was v and is epsilon")
    wider = dict(train__init_from=str(first), model__channel_mult=(2,))
    assert f"{goes_on}: model.channel_mult was [1] and is [2]" in refused("d", **wider)
    assert "sample.sampler is dpmpp, and diffusion.loss consistency" in refused("e", sample__sampler="dpmpp")
    assert "diffusion.weighting is min_snr" in refused("f", diffusion__weighting="min_snr")
    for name, change in (("g", {"diffusion__prediction": "previous_x"}), ("h", {"diffusion__respacing": "10"})):
        assert "takes no prediction previous_x and no respacing" in refused(name, **change)

    def said(module, *argv):
        code, _, err = script(module, monkeypatch, capsys, *argv)
        assert (code, err.count("\n")) == (2, 1), err
        return err

    assert "has consistency model true" in said(sample, "--ckpt", first, "--guide", fast, "--guidance", "2")
    assert "jumps5000" in said(evaluate, "--ckpt", fast, "--metric", "frechet", "--steps", "5000")
    assert "is a consistency model, which has no likelihood" in said(evaluate, "--ckpt", fast)
    assert "sampler is ddim, and diffusion.loss consistency" in said(sample, "--ckpt", fast, "--sampler", "ddim")
    assert "sampler is consistency, and diffusion.loss" in said(sample, "--ckpt", first, "--sampler", "consistency")
    assert "is a consistency model" in said(convert, "openai", fast, "--out", tmp_path / "exported.pt")
    assert "jumps5000" in said(sample, "--ckpt", fast, "--steps", "5000")
    assert "still holds" in said(sample, "--ckpt", fast, "--steps", "[0, 500]")
