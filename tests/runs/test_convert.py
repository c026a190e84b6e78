"""Weights of other codebases: what comes in computes what it computed there, and what goes out comes back unchanged."""

import dataclasses
import json
import re
import resource
import shutil
import signal
import sys
from functools import partial

import diffusers
import numpy as np
import pytest
import torch
from helpers import ROOT, Trap, fill, golden, golden_unet, tensor
from safetensors.torch import load_file, save_file

from diffusion import UsageError, load
from diffusion.commands import convert
from diffusion.commands.command_line import parse_command_line
from diffusion.commands.terminal import exit_code
from diffusion.config.files import load_config
from diffusion.data.values import to_stored
from diffusion.interop.diffusers import (
    config_from_diffusers,
    pipeline_writer,
    read_pipeline,
    scheduler_config,
    unet_config,
)
from diffusion.interop.openai import config_from_flags, parse_flags
from diffusion.models.dit import DiT
from diffusion.randomness import image_noise
from diffusion.run import checkpoint
from diffusion.run.checkpoint import Checkpoint, newest
from diffusion.run.folder import mark_run
from diffusion.samplers import ddim, ddpm, ode
from diffusion.training.trainer import Trainer

BASE = "--num_channels 32 --num_res_blocks 1 --learn_sigma True "
GOLDEN = {
    "uncond": BASE + "--image_size 16 --channel_mult 1,2 --attention_resolutions 8 --num_heads 2",
    "classcond": "--num_channels 32 --num_res_blocks 2 --image_size=16 --channel_mult=1,2,2 "
                 "--attention_resolutions 8,4 --num_heads 4 "
                 "--num_heads_upsample 2 --class_cond True --use_scale_shift_norm False",
    "adm": BASE + "--image_size 16 --channel_mult 1,2 --attention_resolutions 16,8 --num_head_channels 16 "
                  "--resblock_updown True --use_fp16 True",
    "superres": BASE + "--large_size 16 --small_size 8 --channel_mult 1,2 --attention_resolutions 8 --num_heads 2 "
                       "--class_cond True",
}  # fmt: skip
"""The golden networks in the words of the published scripts."""


def run_convert(monkeypatch, capsys, *argv):
    monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, argv)])
    code = exit_code(convert.main)
    out = capsys.readouterr()
    return code, out.out, out.err


def run_of(out, *overrides, classes=()):
    """A run folder of a filled network, whose average differs from its weights: (config, weights, average)."""
    config = parse_command_line(overrides).config
    weights, average = (fill(config.network(len(classes)), seed).state_dict() for seed in (1, 2))
    out.mkdir(parents=True, exist_ok=True)
    checkpoint.save(checkpoint.checkpoint_folder(out, 3), step=3, config=config, class_names=classes, weights=weights,
                    averages={config.train.ema_rates[0]: average}, training={})  # fmt: skip
    mark_run(out, [])
    return config, weights, average


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


# --- OpenAI -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Files in their format that hold the golden networks."""
    folder = tmp_path_factory.mktemp("published")
    for name in GOLDEN:
        case = golden("unet.json")[name]
        network = fill(golden_unet(case), case["seed"])
        torch.save(network.state_dict(), folder / f"{name}.pt")
    return folder


@pytest.fixture
def small_weights(published):
    """The weights of the smallest golden network."""
    return torch.load(published / "uncond.pt", weights_only=True)


@pytest.mark.parametrize("name", GOLDEN)
def test_a_published_file_becomes_a_run_with_the_published_output_and_comes_back(
    name, published, tmp_path, monkeypatch, capsys
):
    path, flags, arrays = published / f"{name}.pt", GOLDEN[name], golden(f"unet_{name}.npz")
    code, out, err = run_convert(monkeypatch, capsys, "openai", path, "--flags", flags, "--out", tmp_path / "run")
    assert (code, err) == (0, "")
    assert str(tmp_path / "run") in out
    saved = newest(tmp_path / "run", Checkpoint.files)[0]
    network = saved.network(saved.weights()).eval()
    inputs = {key: tensor(arrays[key]) for key in ("y", "low_res") if key in arrays}
    torch.testing.assert_close(
        network(tensor(arrays["x"]), tensor(arrays["t"]), **inputs), tensor(arrays["out"]), atol=1e-4, rtol=0
    )
    code, _, _ = run_convert(monkeypatch, capsys, "openai", tmp_path / "run", "--out", tmp_path / "back.pt")
    assert code == 0
    assert_same(torch.load(tmp_path / "back.pt", weights_only=True), torch.load(path, weights_only=True))


def test_the_average_goes_out_unless_asked_otherwise(tmp_path, monkeypatch, capsys):
    _, weights, average = run_of(tmp_path / "run", classes=tuple("0123456789"))
    for flags, wanted in (((), average), (("--ema", "none"), weights)):
        code, _, _ = run_convert(monkeypatch, capsys, "openai", tmp_path / "run", *flags, "--out", tmp_path / "a.pt")
        assert code == 0
        assert_same(torch.load(tmp_path / "a.pt", weights_only=True), wanted)
        (tmp_path / "a.pt").unlink()


README = {  # of both repositories: flags, channel multipliers, parameters, upsampler
    "cifar10_uncond": "--image_size 32 --num_channels 128 --num_res_blocks 3 --learn_sigma True --dropout 0.3 "
                      "--diffusion_steps 4000 --noise_schedule cosine --lr 1e-4 --batch_size 128",
    "imagenet64_uncond": "--image_size 64 --num_channels 128 --num_res_blocks 3 --learn_sigma True "
                         "--diffusion_steps 4000 --noise_schedule cosine --lr 1e-4 --batch_size 128",
    "imagenet64_cond": "--image_size 64 --num_channels 192 --num_res_blocks 3 --learn_sigma True --class_cond True "
                       "--diffusion_steps 4000 --noise_schedule cosine --rescale_learned_sigmas False "
                       "--rescale_timesteps False --lr 3e-4 --batch_size 2048",
    "upsample_cond_256": "--num_channels 192 --num_res_blocks 2 --learn_sigma True --class_cond True "
                         "--diffusion_steps 4000 --noise_schedule linear --rescale_learned_sigmas False "
                         "--rescale_timesteps False --lr 3e-4 --batch_size 256",
    "lsun_bedroom_256": "--image_size 256 --num_channels 128 --num_res_blocks 2 --num_heads 1 --learn_sigma True "
                        "--use_scale_shift_norm False --attention_resolutions 16 --diffusion_steps 1000 "
                        "--noise_schedule linear --rescale_learned_sigmas False --rescale_timesteps False",
    "adm_imagenet64_cond": "--attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 --dropout 0.1 "
                           "--image_size 64 --learn_sigma True --noise_schedule cosine --num_channels 192 "
                           "--num_head_channels 64 --num_res_blocks 3 --resblock_updown True "
                           "--use_new_attention_order True --use_fp16 True --use_scale_shift_norm True",
    "adm_imagenet256_uncond": "--attention_resolutions 32,16,8 --class_cond False --diffusion_steps 1000 "
                              "--image_size 256 --learn_sigma True --noise_schedule linear --num_channels 256 "
                              "--num_head_channels 64 --num_res_blocks 2 --resblock_updown True --use_fp16 True "
                              "--use_scale_shift_norm True",
}  # fmt: skip


@pytest.mark.parametrize("name", README)
def test_flags_of_the_readmes_describe_the_published_networks(name):
    flags = parse_flags(README[name])
    upsampler = name.startswith("upsample")
    config = config_from_flags(flags, upsampler)
    with torch.device("meta"):
        network = config.network(1000)
    assert sum(p.numel() for p in network.parameters()) == golden("published_parameters.json")[name]
    # The file of this run is the same one.
    file = {
        "cifar10_uncond": "cifar10",
        "upsample_cond_256": "published/upsample_64_256",
        "lsun_bedroom_256": "published/lsun_bedroom",
        "adm_imagenet256_uncond": "published/adm_imagenet256_cond",
    }
    written = load_config(ROOT / "configs" / f"{file.get(name, f'published/{name}')}.yaml")
    model = dataclasses.replace(written.model, class_cond="uncond" not in name and written.model.class_cond)
    assert (config.model, config.diffusion) == (model, written.diffusion)
    assert config.data.shape == written.data.shape
    assert (config.data.random_flip, config.data.low_res_size) == (written.data.random_flip, written.data.low_res_size)


def test_each_repository_has_its_own_defaults():
    improved, guided = (config_from_flags(parse_flags(flags), False)
                        for flags in ("--learn_sigma True --use_fp16 True", "--resblock_updown True"))  # fmt: skip
    assert (improved.diffusion.loss, improved.diffusion.rescale_timesteps) == ("rescaled_mse", True)
    assert (guided.diffusion.loss, guided.diffusion.rescale_timesteps) == ("mse", False)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "most"), [("cifar10_uncond", 60e6), ("adm_imagenet64_cond", 300e6)])
def test_published_sizes_come_in(name, most, tmp_path, monkeypatch, capsys):
    flags = parse_flags(README[name])
    network = fill(config_from_flags(flags, False).network(1000), 1)
    assert sum(p.numel() for p in network.parameters()) < most
    torch.save(network.state_dict(), tmp_path / "a.pt")
    code, _, err = run_convert(
        monkeypatch, capsys, "openai", tmp_path / "a.pt", "--flags", README[name], "--out", tmp_path / "run"
    )
    assert (code, err) == (0, "")
    assert_same(newest(tmp_path / "run", Checkpoint.files)[0].weights("none"), network.state_dict())


def test_a_converted_model_is_trained_on(published, tmp_path, monkeypatch, capsys):
    """A run begins with its weights, with data and batch of its own; its own folder stays as it is."""
    path = published / "classcond.pt"
    run_convert(monkeypatch, capsys, "openai", path, "--flags", GOLDEN["classcond"], "--out", tmp_path / "run")
    overrides = ["--data.source", "digits", "--train.batch_size", "2",
                 "--train.steps", "1", "--train.ema_rates", "[0.5]", "--train.lr", "1e-30",
                 "--model.dropout", "0.1", "--diffusion.loss", "mse",
                 "--sample.n", "1", "--sample.steps", "1"]  # fmt: skip
    source = ["--config", str(tmp_path / "run/config.yaml"), *overrides]
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    command = parse_command_line(source)
    assert command.out == tmp_path / "run"
    with pytest.raises(UsageError, match=r"is a converted model: begin with .*init_from"):
        Trainer(command.config, command.out)
    out = tmp_path / "tuned"
    command = parse_command_line([*source, "--train.init_from", str(tmp_path / "run"), "--out", str(out)])
    Trainer(command.config, out).run()
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    saved = newest(out, Checkpoint.files)[0]
    assert saved.step == 1
    before = torch.load(path, weights_only=True)
    for name, value in saved.weights("0.5").items():  # a step of 1e-30 moves nothing
        torch.testing.assert_close(value, before[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--num_chanels 32", "--flags has --num_chanels, which cannot be honoured: did you mean num_channels?"),
        ("--classifier_scale 1.0", "--classifier_scale, which cannot be honoured"),
        ("--clip_denoised False", "--clip_denoised, which cannot be honoured"),
        ("--image_size big", "--image_size big; it must be of type int"),
        ("--learn_sigma maybe", "--learn_sigma maybe; it must be of type bool"),
        ("--image_size 64 128", "it must be pairs"),
        ("'", "it must be pairs"),
        ("--image_size 48", "images of 48, whose widths are not known"),
        ("--noise_schedule sqrt", "diffusion.schedule is sqrt; it must be one of "),
        ("--attention_resolutions 0", "are numbers with commas"),
    ],
)
def test_flags_that_cannot_be(flags, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        config_from_flags(parse_flags(flags), False)


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        ("trap", BASE, "nothing was run"),
        ("text", BASE, "cannot be read as plain tensors"),
        ("optimizer", BASE, "holds no weights by name"),
        ("numbers", BASE, "holds no weights by name"),
        ("network", BASE + "--image_size 32", "weights differ: input_blocks."),
        ("missing", GOLDEN["uncond"], "weights differ: out.2.bias is missing, and (6,) in the model"),
        ("network", GOLDEN["uncond"] + " --class_cond True", "label_emb.weight is missing, and"),
        ("no columns", GOLDEN["uncond"] + " --class_cond True", "there are no classes"),
        ("network", "--num_chanels 32", "did you mean num_channels?"),
        ("network", None, "--flags is missing"),
        ("network", GOLDEN["classcond"], "of another architecture"),
    ],
)
def test_files_that_cannot_be(content, flags, message, small_weights, tmp_path, monkeypatch, capsys):
    path = tmp_path / "a.pt"
    if content == "missing":
        del small_weights["out.2.bias"]
    if content == "no columns":  # a small file, whose classes would fill the memory
        small_weights["label_emb.weight"] = torch.empty(10**12, 0)
    contents = {"trap": {"a": Trap(tmp_path / "sprung")}, "optimizer": {"state": {}}, "numbers": {0: torch.zeros(2)}}
    torch.save(contents.get(content, small_weights), path)
    if content == "text":
        path.write_text("no archive")
    flags = () if flags is None else ("--flags", flags)
    code, out, err = run_convert(monkeypatch, capsys, "openai", path, *flags, "--out", tmp_path / "run")
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "sprung").exists()


ODD = {
    "shared memory": lambda w: w | {"out.0.bias": w["out.0.weight"]},
    "not contiguous": lambda w: w | {"out.2.weight": w["out.2.weight"].transpose(2, 3).contiguous().transpose(2, 3)},
    "bfloat16": lambda w: {name: value.bfloat16() for name, value in w.items()},
    "not finite": lambda w: w | {"out.2.bias": torch.full((6,), float("inf"))},
    "too large": lambda w: w | {"out.2.bias": torch.full((6,), 1e300, dtype=torch.float64)},
    "complex": lambda w: w | {"out.2.bias": torch.zeros(6, dtype=torch.complex64)},
    "whole numbers": lambda w: w | {"out.2.bias": torch.zeros(6, dtype=torch.int64)},
    "sparse": lambda w: w | {"out.2.bias": torch.ones(6).to_sparse()},
    "huge": lambda w: w | {"out.2.bias": torch.zeros(1).expand(10**13)},
    "no axis": lambda w: w | {"label_emb.weight": torch.tensor(1.0)},
}
"""Weights that a file can hold, and the first three of which are fit for use."""


@pytest.mark.parametrize("kind", ODD)
def test_odd_tensors_become_plain_ones_or_are_refused(kind, small_weights, tmp_path, monkeypatch, capsys):
    weights = small_weights
    torch.save(ODD[kind](dict(weights)), tmp_path / "a.pt")
    flags = ("--flags", GOLDEN["uncond"], "--out", tmp_path / "run")
    code, _, err = run_convert(monkeypatch, capsys, "openai", tmp_path / "a.pt", *flags)
    if kind in list(ODD)[:3]:
        assert (code, err) == (0, "")
        saved = newest(tmp_path / "run", Checkpoint.files)[0].weights("none")
        torch.testing.assert_close(saved["out.2.weight"], weights["out.2.weight"], rtol=1e-2, atol=1e-2)
    else:
        assert code == 2
        assert err.count("\n") == 1
        assert ("label_emb" if kind == "no axis" else "out.2.bias") in err
        assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_a_damaged_archive_is_noticed(published, tmp_path, monkeypatch, capsys):
    """torch itself does not look at the checksums of what it loads."""
    content = bytearray((published / "uncond.pt").read_bytes())
    content[len(content) // 2] ^= 8
    (tmp_path / "a.pt").write_bytes(content)
    flags = ("--flags", GOLDEN["uncond"], "--out", tmp_path / "run")
    code, _, err = run_convert(monkeypatch, capsys, "openai", tmp_path / "a.pt", *flags)
    assert code == 2
    assert "a.pt is damaged: uncond/data/" in err


@pytest.mark.parametrize("target", ["openai", "diffusers", "run"])
def test_a_full_disk_leaves_nothing_half_written(target, pipeline, tmp_path, monkeypatch, capsys):
    if target == "run":
        shutil.copytree(pipeline, tmp_path / "p")
    else:
        run_of(tmp_path / "run", *SMALL)
    before = sorted(tmp_path.rglob("*"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        source, format = ("p", "diffusers") if target == "run" else ("run", target)
        code, out, err = run_convert(monkeypatch, capsys, format, tmp_path / source, "--out", tmp_path / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        signal.signal(signal.SIGXFSZ, ignored)
    assert (code, out) == (2, "")
    assert "new cannot be written" in err
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


# --- DiT and SiT ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformers(tmp_path_factory):
    """Checkpoints of the golden transformers: of DiT its weights, of SiT as its training saves them."""
    folder, case = tmp_path_factory.mktemp("transformers"), golden("heirs/dit.json")["dit_s"]
    torch.save(fill(DiT(**case["kwargs"]), case["seed"]).state_dict(), folder / "dit.pt")
    case = golden("heirs/flow.json")
    weights = fill(DiT(**case["network"]), case["seed"]).state_dict()
    torch.save({"model": {}, "ema": weights, "opt": {"step": 1}}, folder / "sit.pt")
    return folder


def test_weights_of_dit_become_a_run_with_the_published_output_and_come_back(
    transformers, tmp_path, monkeypatch, capsys
):
    argv = "dit", transformers / "dit.pt", "--num_heads", 4, "--out", tmp_path / "run"
    code, _, err = run_convert(monkeypatch, capsys, *argv)
    assert (code, err) == (0, "")
    run, arrays = load(tmp_path / "run"), golden("heirs/dit_s.npz")
    assert len(run.class_names) == 10
    y = tensor(arrays["y"])
    with torch.no_grad():
        out = run.network(tensor(arrays["x"]), tensor(arrays["t"]), torch.where(y == 10, -1, y))  # row 10 is no class
    torch.testing.assert_close(out, tensor(arrays["out"]), atol=1e-4, rtol=0)
    assert run.process.network_t(torch.tensor([0, 999])).tolist() == [0, 999]
    assert run.sample(2, steps="3").shape == (2, 3, 16, 16)
    assert run_convert(monkeypatch, capsys, "dit", tmp_path / "run", "--out", tmp_path / "back.pt")[0] == 0
    assert_same(*(torch.load(path, weights_only=True) for path in (tmp_path / "back.pt", transformers / "dit.pt")))


def test_weights_of_sit_draw_the_published_samples(transformers, tmp_path, monkeypatch, capsys):
    argv = "sit", transformers / "sit.pt", "--num_heads", 2, "--out", tmp_path / "run"
    code, _, err = run_convert(monkeypatch, capsys, *argv)
    assert (code, err) == (0, "")
    run, arrays = load(tmp_path / "run"), golden("heirs/flow.npz")
    process = run.config.diffusion.process([100 * i - 1 for i in range(1, 11)])
    samples = ode(process, partial(run.network, y=tensor(arrays["y"])), tensor(arrays["x0"]), None, order=1,
                  clip_denoised=False)  # fmt: skip
    torch.testing.assert_close(samples, tensor(arrays["ode|Linear|velocity|euler|10"]), atol=1e-3, rtol=0)


def test_the_half_of_sits_output_that_it_does_not_use_is_left_out(tmp_path, monkeypatch, capsys):
    theirs = fill(DiT(8, 2, 4, 384, 1, 6, num_classes=3), 1)
    torch.save(theirs.state_dict(), tmp_path / "a.pt")
    assert run_convert(monkeypatch, capsys, "sit", tmp_path / "a.pt", "--out", tmp_path / "run")[0] == 0
    run, x, t, y = load(tmp_path / "run"), torch.randn(2, 4, 8, 8), torch.tensor([0.1, 0.9]), torch.tensor([0, 2])
    with torch.no_grad():
        torch.testing.assert_close(run.network(x, t, y), -theirs(x, t, y)[:, :4])


def test_latents_are_written_as_the_autoencoder_takes_them(tmp_path, monkeypatch, capsys):
    """Beyond the range of images, and without the factor with which the network sees them."""
    torch.save(fill(DiT(8, 2, 4, 384, 1, 6, num_classes=3), 1).state_dict(), tmp_path / "a.pt")
    assert run_convert(monkeypatch, capsys, "dit", tmp_path / "a.pt", "--out", tmp_path / "run")[0] == 0
    run = load(tmp_path / "run")
    images = run.sample(2, steps="3")
    assert images.abs().max() > 1.5
    np.testing.assert_allclose(to_stored(images, run.config.data.range), images.numpy() / 0.18215, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "flags", "says"),
    [
        ({}, None, "--num_heads is missing: the weights do not say it, and 64 is no published width"),
        ({}, "5", "num_heads is 5, which does not divide hidden_size 64"),
        ({}, "0", "it must be a whole number from 1"),
        ({"pos_embed": torch.zeros(1, 63, 64)}, "4", "pos_embed is (1, 63, 64), and (1, 49, 64) in the"),
        ({"y_embedder.embedding_table.weight": torch.zeros(1, 64)}, "4", "there are no classes"),
        ({"x_embedder.proj.weight": None}, "4", "does not hold the weights of a DiT ('x_embedder"),
        ({"blocks.1.attn.qkv.weight": None}, "4", "blocks.1.attn.qkv.weight is missing, and"),
        ({"blocks.999999999.x": torch.zeros(1)}, "4", "model.depth is 1000000000; it must be less than"),
        ({"y_embedder.embedding_table.weight": torch.empty(10**12, 0)}, "4", "is of another architecture"),
    ],
)
def test_weights_that_are_no_transformers(change, flags, says, transformers, tmp_path, monkeypatch, capsys):
    weights = torch.load(transformers / "dit.pt", weights_only=True) | change
    torch.save({name: value for name, value in weights.items() if value is not None}, tmp_path / "a.pt")
    given = ("--num_heads", flags) if flags else ()
    code, out, err = run_convert(monkeypatch, capsys, "dit", tmp_path / "a.pt", *given, "--out", tmp_path / "run")
    assert (code, out) == (2, "")
    assert says in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("format", "overrides", "says"),
    [
        ("dit", (), "model.network is unet; only a dit can be converted"),
        ("openai", ("--model.network", "dit"), "model.network is dit; only a unet can be converted"),
        ("diffusers", ("--model.network", "dit"), "model.network is dit; only a unet can be converted"),
        ("dit", ("--model.network", "dit", "--model.class_cond", "false"), "the published DiT has classes"),
        ("sit", ("--model.network", "dit"), "sit goes one way"),
    ],
)
def test_runs_that_have_no_such_form(format, overrides, says, tmp_path, monkeypatch, capsys):
    run_of(tmp_path / "run", *overrides, classes=("a", "b") if "false" not in overrides else ())
    code, _, err = run_convert(monkeypatch, capsys, format, tmp_path / "run", "--out", tmp_path / "out")
    assert code == 2
    assert says in err
    assert err.count("\n") == 1


# --- diffusers --------------------------------------------------------------------------------------------------------

SMALL = ("--data.image_size", "16", "--model.class_cond", "false", "--model.channel_mult", "[1,2]")
EXPRESSIBLE = {
    "grey": SMALL,
    "colour, classes": ("--data.channels", "3", "--data.image_size", "16"),
    "4000 steps": (*SMALL, "--diffusion.steps", "4000"),
    "fixed variance, linear": (*SMALL, "--diffusion.variance", "fixed_large", "--diffusion.schedule", "linear"),
    "added embedding": (*SMALL, "--model.use_scale_shift_norm", "false"),
    "x_start": (*SMALL, "--diffusion.prediction", "x_start", "--diffusion.loss", "mse"),
    "v": (*SMALL, "--diffusion.prediction", "v"),
    "flow": (*SMALL, "--diffusion.schedule", "flow", "--diffusion.prediction", "velocity", "--diffusion.variance",
             "fixed_small"),
    "v, from pure noise": (*SMALL, "--diffusion.prediction", "v", "--diffusion.zero_terminal_snr", "true",
                           "--diffusion.variance", "fixed_small", "--diffusion.schedule", "linear"),
    "one head at two widths": (*SMALL, "--model.attention_resolutions", "[1,2]", "--model.num_heads", "1"),
    "sequel": (*SMALL, "--model.attention_resolutions", "[1,2]", "--model.num_head_channels", "16",
               "--model.resblock_updown", "true", "--model.use_new_attention_order", "true",
               "--diffusion.rescale_timesteps", "false", "--diffusion.steps", "400"),
    "sequel, no attention": (*SMALL, "--model.attention_resolutions", "[]", "--model.resblock_updown", "true"),
    "three levels": (*SMALL, "--model.channel_mult", "[1,1,2]", "--model.num_res_blocks", "2",
                     "--model.attention_resolutions", "[4]"),
}  # fmt: skip


@pytest.fixture(scope="module", params=EXPRESSIBLE)
def exported(request, tmp_path_factory):
    """A pipeline's folder, and the configuration, network and classes that it was made of."""
    classes = ("cat", "dog", "owl") if "classes" in request.param else ()
    return pipeline_of(tmp_path_factory.mktemp("exported"), *EXPRESSIBLE[request.param], classes=classes)


def pipeline_of(folder, *overrides, classes=()):
    config, _, average = run_of(folder / "run", *overrides, classes=classes)
    saved = newest(folder / "run", Checkpoint.files)[0]
    pipeline_writer(saved, average)(folder / "pipeline")
    return folder / "pipeline", config, saved.network(average).eval(), classes


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The folder of a pipeline and of its run, to be copied before it is changed."""
    path, *_ = pipeline_of(tmp_path_factory.mktemp("small"), *SMALL)
    return path.parent


@pytest.fixture
def pipeline(small, tmp_path):
    return shutil.copytree(small / "pipeline", tmp_path / "copy")


@torch.no_grad()
def test_diffusers_computes_what_we_compute(exported):
    path, config, network, classes = exported
    unet = diffusers.DDPMPipeline.from_pretrained(path).unet.eval()
    process = config.diffusion.process()
    x = torch.randn(3, config.data.channels, 16, 16, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 17, config.diffusion.steps - 1])
    theirs = t + 1 if config.diffusion.schedule == "flow" else t  # there, the timestep is 1000 s
    y = torch.tensor([2, 0, 1]) if classes else None
    ours = network(x, process.network_t(t), y)
    assert ours.abs().max() > 0.1
    torch.testing.assert_close(unet(x, theirs, class_labels=y).sample, ours, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_their_scheduler_reaches_our_pictures(exported):
    """10 steps of their scheduler with our noise: the loop that docs/formats.md shows."""
    path, config, network, classes = exported
    sampler = partial(ddim, clip_denoised=False) if config.diffusion.schedule == "flow" else ddpm
    pipeline = diffusers.DDPMPipeline.from_pretrained(path)
    y = torch.tensor([2, 0]) if classes else None
    shape = (config.data.channels, 16, 16)

    def noise(step):
        return image_noise(range(2), shape, torch.device("cpu"), 0, step)

    ours = sampler(config.diffusion.process("10"), lambda x, t: network(x, t, y), noise("x_T"), noise)
    scheduler, x, draws = pipeline.scheduler, noise("x_T"), iter(range(10))
    diffusers.schedulers.scheduling_ddpm.randn_tensor, kept = (
        lambda *args, **kwargs: noise(next(draws)), diffusers.schedulers.scheduling_ddpm.randn_tensor)  # fmt: skip
    try:
        scheduler.set_timesteps(10)
        for t in scheduler.timesteps:
            x = scheduler.step(pipeline.unet(x, t, class_labels=y).sample, t, x).prev_sample
    finally:
        diffusers.schedulers.scheduling_ddpm.randn_tensor = kept
    torch.testing.assert_close(x, ours, atol=1e-3, rtol=0)


def test_a_pipeline_comes_back_unchanged(exported):
    path, config, network, classes = exported
    read, names, weights = read_pipeline(path)
    assert (read, names) == (config, classes)
    assert_same(weights, network.state_dict())


def test_a_pipeline_without_our_files_becomes_a_run_too(exported):
    """As one that was made with diffusers alone: only its own settings are read."""
    path, config, network, classes = exported
    (path / "run.yaml").rename(path / "hidden")
    try:
        read, names, weights = read_pipeline(path)
    finally:
        (path / "hidden").rename(path / "run.yaml")
    assert len(names) == len(classes)
    process, again = config.diffusion.process(), read.diffusion.process()
    assert again.tables["sigma"] == pytest.approx(process.tables["sigma"])
    assert_network(read, names, weights, network, process)


@torch.no_grad()
def assert_network(config, names, weights, network, process):
    """A configuration and weights that compute what a network and process do, at the process's timesteps."""
    with torch.device("meta"):
        read = config.network(len(names))
    read.load_state_dict(weights, assign=True)
    x = torch.randn(2, config.data.channels, 16, 16)
    y = torch.tensor([2, 0]) if names else None
    t = torch.tensor([3, 99])
    ours = network(x, process.network_t(t), y)
    torch.testing.assert_close(read.eval()(x, config.diffusion.process().network_t(t), y), ours)


def test_the_command_converts_a_pipeline_there_and_back(tmp_path, monkeypatch, capsys):
    classes = ("cat", "dog", "owl")
    config, _, average = run_of(tmp_path / "run", "--data.channels", "3", classes=classes)
    code, out, err = run_convert(monkeypatch, capsys, "diffusers", tmp_path / "run", "--out", tmp_path / "pipeline")
    assert (code, err) == (0, "")
    assert "DDPMPipeline; it passes no classes: call its unet with class_labels" in out
    code, out, err = run_convert(monkeypatch, capsys, "diffusers", tmp_path / "pipeline", "--out", tmp_path / "back")
    assert (code, err) == (0, "")
    saved = newest(tmp_path / "back", Checkpoint.files)[0]
    assert (saved.config, saved.class_names) == (config, classes)
    assert_same(saved.weights(), average)


@torch.no_grad()
def test_a_pipeline_made_with_diffusers_alone_becomes_a_run(tmp_path):
    """The network of diffusers' own training example, narrower, with everything else at their defaults."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=16, in_channels=3, out_channels=3, layers_per_block=2, block_out_channels=(32, 32, 64),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    diffusers.DDPMPipeline(unet=unet, scheduler=diffusers.DDPMScheduler()).save_pretrained(tmp_path / "p")
    config, names, weights = read_pipeline(tmp_path / "p")
    assert (config.diffusion.schedule, config.diffusion.variance, names) == ("linear", "fixed_small", ())
    network = config.network(0)
    network.load_state_dict(weights)
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([5, 900])
    ours = network.eval()(x, config.diffusion.process().network_t(t))
    torch.testing.assert_close(ours, unet(x, t).sample, atol=1e-5, rtol=1e-5)


def test_a_run_and_a_pipeline_that_differ_are_told_apart(pipeline):
    """The settings of the run that lie in the folder are not believed against those of the pipeline."""
    settings = pipeline / "scheduler/scheduler_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"num_train_timesteps": 500}))
    with pytest.raises(UsageError, match="num_train_timesteps is 500, where only 1000 can be honoured"):
        read_pipeline(pipeline)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("--model.num_heads", "2", "--model.attention_resolutions", "[1,2]"), "model.num_heads 2"),
        (("--model.num_heads_upsample", "4"), "model.num_heads_upsample 4"),
        (("--model.conv_resample", "false"), "model.conv_resample False"),
        (("--model.channel_mult", "[2,4]"), "model.channel_mult (2, 4)"),
        (("--data.low_res_size", "4"), "data.low_res_size 4"),
        (("--diffusion.variance", "learned"), "diffusion.variance learned"),
        (("--diffusion.prediction", "previous_x"), "diffusion.prediction previous_x"),
        (("--diffusion.respacing", "100", "--sample.steps", "10"), "diffusion.respacing 100"),
        (("--model.use_norm", "false"), "model.use_norm False"),
        (("--model.use_norm", "false", "--model.init", "fixup"), "model.use_norm False"),
    ],
)
def test_what_diffusers_cannot_express_is_refused(overrides, says):
    config = parse_command_line([*SMALL, *overrides]).config
    with pytest.raises(UsageError, match=re.escape(f"diffusers cannot express {says}")):
        unet_config(config, 0)


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        ("unet", {"freq_shift": 1}, "freq_shift is 1, where only 0 can be honoured"),
        ("unet", {"norm_eps": 1e-6}, "norm_eps is 1e-06, where only 1e-05"),
        ("unet", {"down_block_types": ["SkipDownBlock2D", "AttnDownBlock2D"]}, "down_block_types"),
        ("unet", {"block_out_channels": []}, "without counterpart"),
        ("unet", {"num_class_embeds": 3}, "num_class_embeds is 3"),
        ("scheduler", {"prediction_type": []}, "without counterpart"),
        ("scheduler", {"beta_schedule": "sigmoid"}, "without counterpart: 'sigmoid'"),
        ("scheduler", {"beta_schedule": "linear", "beta_end": 0.01}, "beta_end is 0.01"),
        ("scheduler", {"trained_betas": [0.1] * 1000}, "trained_betas is [0.1, "),
        ("unet", {"attn_norm_num_groups": None}, "attn_norm_num_groups is None, where only 32"),
        ("scheduler", {"prediction_type": "flow_prediction"}, "without counterpart: 'flow_prediction'"),
        ("scheduler", {"clip_sample": False}, "clip_sample is False"),
        ("scheduler", {"of_a_later_version": 1}, "without counterpart: 'of_a_later_version'"),
    ],
)
def test_a_pipeline_that_has_no_counterpart_is_refused(file, change, says):
    config = parse_command_line(SMALL).config
    settings = {"unet": unet_config(config, 0), "scheduler": scheduler_config(config)}
    settings[file] |= change
    with pytest.raises(UsageError, match=re.escape(says)) as raised:
        config_from_diffusers(settings["unet"], settings["scheduler"], 0)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        ("unet/config.json", {"layers_per_block": 2}, "other weights than its config.json says"),
        ("unet/config.json", {"block_out_channels": [32, 96]}, "is of another architecture"),
        ("unet/config.json", {"freq_shift": 1}, "freq_shift is 1"),
        ("unet/config.json", {"_class_name": "UNet2DConditionModel"}, "holds UNet2DConditionModel and DDPMScheduler"),
        ("scheduler/scheduler_config.json", {"_class_name": "EulerDiscreteScheduler"}, "and EulerDiscreteScheduler"),
    ],
)
def test_the_command_refuses_a_pipeline_in_one_line(file, change, says, pipeline, tmp_path, monkeypatch, capsys):
    (pipeline / "run.yaml").unlink()
    (pipeline / file).write_text(json.dumps(json.loads((pipeline / file).read_text()) | change))
    code, _, err = run_convert(monkeypatch, capsys, "diffusers", pipeline, "--out", tmp_path / "back")
    assert code == 2
    assert says in err
    assert err.count("\n") == 1
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("change", ["missing", "more", "empty", "cut", "nan"])
def test_the_weights_of_a_pipeline_are_those_of_its_file(change, pipeline, tmp_path, monkeypatch, capsys):
    """diffusers itself would fill in what is missing with random numbers, and say so in a warning."""
    file = pipeline / "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    if change == "missing":
        del weights["conv_in.weight"]
    elif change == "more":
        weights["class_embedding.weight"] = torch.zeros(3, 128)
    elif change == "nan":
        weights["conv_in.bias"][3] = float("nan")
    save_file({} if change == "empty" else weights, file)
    if change == "cut":
        file.write_bytes(file.read_bytes()[:1000])
    code, out, err = run_convert(monkeypatch, capsys, "diffusers", pipeline, "--out", tmp_path / "back")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    says = {
        "missing": "other weights than its config.json says: 'conv_in.weight'",
        "more": "other weights than its config.json says: class_embedding.weight has no place",
        "empty": "other weights than its config.json says",
        "cut": "cannot be read",
        "nan": "input_blocks.0.0.bias (torch.float32): weights must be finite",
    }
    assert says[change] in err
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    ("file", "content"),
    [("class_names.json", "null"), ("class_names.json", '["a", "a"]'), ("class_names.json", "{"),
     ("unet/config.json", "[]"), ("scheduler/scheduler_config.json", "[" * 100_000), ("unet/config.json", "null")],
    ids=lambda value: value[:20],
)  # fmt: skip
def test_broken_json_in_a_pipeline_is_named(file, content, pipeline):
    (pipeline / file).write_text(content)
    with pytest.raises(UsageError, match="is not a pipeline folder of diffusers: ") as raised:
        read_pipeline(pipeline)
    assert "\n" not in str(raised.value)


def test_weights_that_only_a_pickle_holds_are_refused(pipeline, tmp_path):
    (pipeline / "unet/diffusion_pytorch_model.safetensors").unlink()
    torch.save({"a": Trap(tmp_path / "sprung")}, pipeline / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(UsageError, match=r"diffusion_pytorch_model\.safetensors cannot be read"):
        read_pipeline(pipeline)
    assert not (tmp_path / "sprung").exists()


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("openai", "nowhere.pt", "--flags", "", "--out", "new"), "nowhere.pt does not exist"),
        (("openai", "run", "--flags", "--lr 1", "--out", "new.pt"), "--flags has no meaning for openai from a run"),
        (("openai", "run", "--ema", "0.5", "--out", "new.pt"), "--ema is 0.5; "),
        (("openai", "run", "--out", "there"), "--out there exists: name a new one"),
        (("openai", "run", "--out", "bare"), "--out bare exists: name a new one"),
        (("openai", "run", "--out", ""), "argument --out: it is empty"),
        (("diffusers", "there", "--out", "new"), "is not a pipeline folder of diffusers"),
        (("diffusers", "there", "--ema", "none", "--out", "new"), "--ema has no meaning"),
        (("onnx", "run", "--out", "new"), "invalid choice: 'onnx'"),
    ],
)
def test_the_command_answers_bad_input_in_one_line(argv, says, small, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").symlink_to(small / "run")
    (tmp_path / "there").mkdir()
    (tmp_path / "bare").mkdir()
    (tmp_path / "there/file").touch()
    code, out, err = run_convert(monkeypatch, capsys, *argv)
    assert (code, out) == (2, "")
    assert says in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("format", "overrides", "says"),
    [
        ("openai", ("--model.use_norm", "false"), "no network without normalisation"),
        ("openai", ("--model.use_norm", "false", "--model.init", "fixup"), "without normalisation"),
        ("diffusers", ("--model.num_heads_upsample", "4"), "diffusers cannot express model.num_heads_upsample 4"),
    ],
)
def test_runs_that_only_this_project_has_are_refused(format, overrides, says, tmp_path, monkeypatch, capsys):
    run_of(tmp_path / "run", *SMALL, *overrides)
    code, _, err = run_convert(monkeypatch, capsys, format, tmp_path / "run", "--out", tmp_path / "new.pt")
    assert code == 2
    assert says in err
    assert err.count("\n") == 1
    assert not (tmp_path / "new.pt").exists()
