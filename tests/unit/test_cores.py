"""Cores that other processes keep busy: fewer threads, and the same bits."""

import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from diffusion import GaussianDiffusion, Schedule, UNetModel
from diffusion.likelihood import bits_per_dim
from diffusion.models.initialisation import initialise
from diffusion.optimizers import ANY_THREADS, Muon
from diffusion.parallel import cores
from diffusion.parallel.cores import CORES, Cores
from diffusion.sampling import sample_batch
from diffusion.training.step import TrainingStep

PROCESS = GaussianDiffusion(Schedule.named("cosine", 100))


@pytest.fixture
def shared(monkeypatch):
    """The cores of this process, as at its start; torch calls those of one object alone."""
    for name in ("others", "_before", "_busy_since", "_said"):
        monkeypatch.setattr(CORES, name, getattr(Cores(), name))
    return CORES


@pytest.fixture
def threads():
    """Sets a number of threads, which the test may leave."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def unet(dims=2, **options):
    torch.manual_seed(0)
    return UNetModel(1, 32, 2, 1, (1,), channel_mult=(1, 2), dims=dims, **options)


def weights_after(steps, frees, monkeypatch, network, optimizer, sizes, used=None, batch=24, precision=None, **options):
    """The weights after a number of steps in which `frees` cores are free in turn, and the threads that were used."""
    free = iter(frees * 100)
    monkeypatch.setattr(CORES, "free", lambda: next(free))
    if used is not None:
        network.register_forward_pre_hook(lambda *_: used.add(torch.get_num_threads()))
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    step = TrainingStep(network, PROCESS, optimizer, accelerator=accelerator, ema_rates=[0.5], **options)
    x = torch.rand(batch, 1, *sizes, generator=torch.Generator().manual_seed(1)) * 2 - 1
    for _ in range(steps):
        step(x)
    averages = step.ema.averages.values()
    return [p.clone() for p in network.parameters()] + [p for average in averages for p in average.values()]


@pytest.mark.parametrize(
    ("threads_before", "frees", "dims", "sizes", "options"),
    [
        (2, [1], 2, (16, 16), {"dropout": 0.3}),
        (4, [1, 2, 3, 4, 1], 2, (16, 16), {}),
        (2, [1], 1, (256,), {}),
        (2, [1], 1, (64,), {"batch": 16}),
        (2, [1], 2, (8, 24), {"batch": 22, "resblock_updown": True}),
        (2, [1], 2, (16, 16), {"precision": "bf16"}),
        (2, [1], 3, (2, 8, 16), {}),
    ],
    ids=str,
)
def test_a_step_has_the_same_bits_on_fewer_threads(monkeypatch, threads, threads_before, frees, dims, sizes, options):
    options = dict(options)
    threads(threads_before)
    batch, precision = options.pop("batch", 24), options.pop("precision", "no")
    used, found = set(), []
    for these in ([threads_before], frees):
        network = unet(dims, **options)
        optimizer = torch.optim.AdamW(network.parameters(), 1e-3, fused=True)
        found.append(
            weights_after(3, these, monkeypatch, network, optimizer, sizes, used, batch, precision, grad_clip=0.1)
        )
        assert torch.get_num_threads() == threads_before
    assert used >= {threads_before, min(frees)}
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("optimizer", ANY_THREADS, ids=lambda kind: kind.__name__)
def test_an_optimizer_has_the_same_bits_on_fewer_threads(threads, optimizer):
    """Of matrices that are divided between threads."""
    found = []
    for number in (4, 1):
        threads(number)
        generator = torch.Generator().manual_seed(0)
        p = nn.Parameter(torch.randn(256, 1152, generator=generator))
        groups = [{"params": [p], "muon": True}] if optimizer is Muon else [p]
        steps = optimizer(groups, lr=1e-2, weight_decay=0.1)
        for _ in range(3):
            p.grad = torch.randn(p.shape, generator=generator)
            steps.step()
        found.append(p.detach())
    assert torch.equal(*found)


def test_what_would_have_other_bits_keeps_all_threads(monkeypatch, threads):
    threads(2)

    def used_by(network, sizes=(16, 16), **options):
        used = set()
        optimizer = torch.optim.AdamW(network.parameters(), 1e-3, fused=True)
        weights_after(1, [1], monkeypatch, network, optimizer, sizes, used, **options)
        return used

    assert used_by(unet()) == {1}
    fixup = unet(use_norm=False)
    initialise(fixup, "fixup")
    assert used_by(fixup) == {2}  # the gradient of a scalar is a sum over all of a tensor
    assert used_by(unet(), batch=14) == {2}  # torch has other convolutions for one thread
    assert used_by(unet(), (2, 2), batch=22) == {2}  # 88 elements do not divide into vectors
    assert used_by(unet(), batch=17) == {2}
    compiled = unet()
    compiled.compile(backend="eager", dynamic=False)
    assert used_by(compiled) == {2}
    unknown = unet()
    unknown.any_threads = False
    assert used_by(unknown) == {2}


def fake(monkeypatch, *samples):
    """Let psutil and the clocks give (time, CPU time of each core, of which at low priority, of this process)."""
    now = iter(samples)
    current = [next(now)]
    monkeypatch.setattr(cores.time, "monotonic", lambda: current[0][0])
    monkeypatch.setattr(cores.time, "process_time", lambda: current[0][3])

    def times(percpu):
        return [SimpleNamespace(user=used, system=0.0, nice=low) for used, low in zip(*current[0][1:3], strict=True)]

    monkeypatch.setattr(cores.psutil, "cpu_times", times)
    monkeypatch.setattr(cores, "_cores", lambda: [0, 1])
    return lambda: current.__setitem__(0, next(now))


def test_others_are_what_is_not_ours_and_gives_way(monkeypatch, shared):
    following = fake(
        monkeypatch,
        (0.0, (5.0, 5.0), (0.0, 0.0), 3.0),
        (1.0, (6.0, 5.9), (0.0, 0.0), 3.9),  # this process alone has used 0.9, another one a core
        (2.0, (6.7, 6.6), (0.3, 0.3), 5.1),  # this one 1.2, others 0.2 and, at low priority, 0.6
        (2.1, (9.0, 9.0), (0.0, 0.0), 5.1),  # too soon
    )
    assert shared.free() == 2
    following()
    assert shared.free() == 1
    assert shared.others == pytest.approx(1.0)
    following()
    assert shared.free() == 2
    assert shared.others == pytest.approx(0.2)
    following()
    assert shared.others == pytest.approx(0.2)


def test_a_line_says_so_while_it_lasts(monkeypatch, threads, shared):
    threads(2)
    monkeypatch.setattr(cores, "LASTING", 5.0)
    busy = [(t, (t, t), (0.0, 0.0), t) for t in (0.0, 1.0, 3.0, 7.0, 8.0, 3700.0)]
    quiet = (3701.0, (3700.5, 3700.5), (0.0, 0.0), 3701.0)
    following = fake(monkeypatch, *busy, quiet)
    said = []
    network, x = unet(), torch.zeros(16, 1, 16, 16)
    for _ in range(len(busy)):
        with torch.no_grad(), shared.followed(network) as call:
            call(x, torch.zeros(16))
        said.append(shared.news())
        following()
    line = "other processes keep 1.0 of 2 cores busy: computing on 1 of 2 threads, with the same results"
    assert said == [None, None, None, line, None, line]
    with shared.followed(network) as call:
        call(x, torch.zeros(16))
    assert shared.news() is None


@pytest.mark.parametrize("sampler", ["ddpm", "dpmpp"])
def test_samples_and_their_bound_have_the_same_bits_on_fewer_threads(monkeypatch, threads, sampler):
    threads(4)
    network, fast, found = unet().eval(), GaussianDiffusion(Schedule.named("cosine", 100, "4")), []
    torch.nn.init.normal_(network.out[2].weight, std=0.02)
    for frees in ([4], [1, 2, 4]):
        free = iter(frees * 100)
        monkeypatch.setattr(CORES, "free", lambda free=free: next(free))
        with CORES.followed(network) as call:
            x = sample_batch(fast, call, (1, 32, 32), range(24), sampler=sampler)
        assert torch.get_num_threads() == 4
        with CORES.followed(network) as call:
            bits = bits_per_dim(fast, call, x, lambda i, x=x: torch.full_like(x, 0.1 * i)).total
        found.append((x, bits))
    for all_threads, fewer in zip(*found, strict=True):
        assert torch.equal(all_threads, fewer)


def test_a_busy_process_is_noticed(shared):
    shared.free()
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        psutil.Process(busy.pid).cpu_percent()
        time.sleep(1)
        shared.free()
        busy.kill()
    assert shared.others > 0.3


def test_a_system_that_does_not_tell_keeps_all_threads(monkeypatch, shared):
    def refused(percpu):
        raise PermissionError("/proc/stat")

    monkeypatch.setattr(cores.psutil, "cpu_times", refused)
    assert shared.free() == len(cores._cores())
