"""A compiled network computes the same, under its own names; where nothing can be compiled, one line says so."""

import shutil
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from helpers import losses, tensors, together
from test_trainer import assert_same_bits, small, train
from torch._dynamo.testing import CompileCounterWithBackend

from diffusion import GaussianDiffusion, Schedule, UNetModel
from diffusion.config.schema import Config
from diffusion.models.dit import DiT
from diffusion.parallel.compilation import compile_network
from diffusion.run import checkpoint
from diffusion.sampling import sample_batch
from diffusion.training.step import TrainingStep
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


@pytest.mark.parametrize(
    "build",
    [lambda: UNetModel(1, 32, 2, 1, (2,), 0.1, (1, 2), num_classes=3), lambda: DiT(8, 2, 1, 32, 2, 2, num_classes=3)],
    ids=["unet", "dit"],
)
def test_a_step_is_one_graph_and_is_compiled_once(build, monkeypatch):
    """Over steps, micro-batches, evaluations in between, and a last batch that is smaller."""
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    torch._dynamo.reset()

    def compiled():
        torch.manual_seed(0)
        network = build()
        assert compile_network(network, torch.device("cpu")) is None
        counter.clear()
        return network

    process, network = GaussianDiffusion(Schedule.named("cosine", 100)), compiled()
    options = dict(ema_rates=[0.9], gradient_accumulation=2, label_dropout=0.5, grad_clip=1.0)
    step = TrainingStep(network, process, torch.optim.AdamW(network.parameters(), fused=True),
                        accelerator=Accelerator(cpu=True), **options)  # fmt: skip
    x, y = torch.rand(16, 1, 8, 8) * 2 - 1, torch.arange(16) % 3
    for _ in range(3):
        step(x, y)
        network.eval()
        with torch.compiler.set_stance("force_eager"):
            sample_batch(process, network, (1, 8, 8), range(3), sampler="ddim", labels=y[:3])
        network.train()
    assert counter.frame_count == 1
    fast, network = GaussianDiffusion(Schedule.named("cosine", 100, "5")), compiled().eval()
    drawn = {}
    for batch in (range(8), range(8, 16), range(16, 19)):
        for sampler in ("ddim", "ddpm"):
            drawn[sampler] = sample_batch(
                fast, network, (1, 8, 8), batch, sampler=sampler, labels=y[:3].repeat(8)[: len(batch)]
            )
    assert counter.frame_count == 1
    assert drawn["ddim"].shape == (3, 1, 8, 8)
