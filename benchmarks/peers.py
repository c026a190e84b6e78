"""Complete training and sampling steps of this project and of the peers that PyPI has, in alternation.

    pip install diffusers
    pip install --no-deps guided-diffusion-sdk denoising-diffusion-pytorch ema-pytorch pytorch-fid
    python benchmarks/peers.py small --rounds 9       # 7.28M parameters, 32x32, batch 16
    python benchmarks/peers.py paper --rounds 5       # the paper's CIFAR-10 network, 52.5M, batch 4

A training step is what each one's own training loop does with a batch in memory: noise, loss, backward, clipping or
norms, optimizer and moving averages. A sampling step is one evaluation with ancestral sampling around it. Peers that
are not installed are left out. guided-diffusion (a re-upload of OpenAI's) is checked to be the same network, by its
output for the same weights; diffusers by its number of parameters; denoising-diffusion-pytorch builds another network
of the same widths. Peak memory is that of a process of its own. Each result is appended to benchmarks/peers.jsonl.
On a processor with AVX-512, all is measured once more as on one without: its instructions are switched off.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from step import flops, peak_flops
from torch import Tensor, nn

from diffusion.config.schema import Config, config_of
from diffusion.interop.diffusers import unet_config
from diffusion.parallel.compilation import compile_network
from diffusion.parallel.launchers import keep_freed_memory
from diffusion.sampling import sample_batch
from diffusion.training.build import build_step

warnings.filterwarnings("ignore", category=FutureWarning)
RESULTS = Path(__file__).parent / "peers.jsonl"
SIZE, SAMPLING_STEPS, LR, RATE = 32, 4, 1e-4, 0.9999
SMALL = dict(model_channels=64, num_res_blocks=2, channel_mult=(1, 2, 2), attention_resolutions=(2, 4), num_heads=4)
PAPER = SMALL | dict(model_channels=128, num_res_blocks=3, channel_mult=(1, 2, 2, 2))
WITHOUT_AVX512 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
NETWORKS = {"small": (SMALL, 16), "paper": (PAPER, 4)}


class Peer(NamedTuple):
    """What is measured: one training step, and `SAMPLING_STEPS` steps of sampling."""

    package: str
    parameters: int
    train: Callable[[], Any]
    sample: Callable[[], Any]


def configuration(name: str) -> Config:
    return config_of({
        "data": {"source": "folder", "image_size": SIZE, "channels": 3, "path": "."},
        "model": NETWORKS[name][0] | {"class_cond": False},
        "train": {"batch_size": NETWORKS[name][1], "optimizer": "adamw", "lr": LR, "ema_rates": (RATE,),
                  "ema_warmup": False},
    })  # fmt: skip


def _on(network: Any, device: torch.device) -> Any:
    return network.to(device)


def size_of(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def ours(config: Config, x: Tensor, compiled: bool) -> Peer:
    keep_freed_memory()
    network = config.network(0)
    step = build_step(config, network, config.diffusion.process(), Accelerator())
    sampled = config.network(0).to(x.device).eval()
    if compiled:
        assert compile_network(network, x.device) is compile_network(sampled, x.device) is None
    process = config.diffusion.process(SAMPLING_STEPS)
    return Peer("improved-ddpm", size_of(network), lambda: step(x),
                lambda: sample_batch(process, sampled, x.shape[1:], range(len(x)), device=x.device))  # fmt: skip


def diffusers(config: Config, x: Tensor, compiled: bool) -> Peer:
    """As its examples/unconditional_image_generation does, with its EMA; its loss learns no variance."""
    from diffusers import DDPMScheduler, UNet2DModel
    from diffusers.training_utils import EMAModel

    settings = unet_config(config, 0) | dict(time_embedding_type="positional")
    unet, sampled = (_on(UNet2DModel(**settings), x.device) for _ in range(2))
    if compiled:
        unet.compile()
        sampled.compile()
    optimizer = torch.optim.AdamW(unet.parameters(), LR, (0.95, 0.999), 1e-8, 1e-6)
    scheduler: Any = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    sampling: Any = DDPMScheduler(beta_schedule="squaredcos_cap_v2", variance_type="learned_range")
    ema = EMAModel(unet.parameters(), decay=RATE, model_cls=UNet2DModel, model_config=unet.config)
    sampled.eval()

    def train() -> None:
        noise = torch.randn_like(x)
        t = torch.randint(1000, (len(x),), device=x.device)
        predicted = unet(scheduler.add_noise(x, noise, t), t).sample[:, :3]
        nn.functional.mse_loss(predicted, noise).backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())

    @torch.no_grad()
    def sample() -> None:
        sampling.set_timesteps(SAMPLING_STEPS)
        image = torch.randn_like(x)
        for t in sampling.timesteps:
            image = sampling.step(sampled(image, t).sample, t, image).prev_sample

    return Peer("diffusers", size_of(unet), train, sample)


def guided_diffusion(config: Config, x: Tensor, compiled: bool) -> Peer:
    """As its TrainLoop does, in full precision."""
    from guided_diffusion.fp16_util import MixedPrecisionTrainer
    from guided_diffusion.nn import update_ema
    from guided_diffusion.script_util import create_gaussian_diffusion
    from guided_diffusion.unet import UNetModel

    model: Any = config.model
    arguments = dict(image_size=SIZE, in_channels=3, model_channels=model.model_channels, out_channels=6,
                     num_res_blocks=model.num_res_blocks, attention_resolutions=model.attention_resolutions,
                     channel_mult=model.channel_mult, num_heads=model.num_heads, use_scale_shift_norm=True)  # fmt: skip
    network, sampled = (UNetModel(**arguments).to(x.device) for _ in range(2))
    same = config.network(0).to(x.device)
    for p in same.parameters():
        nn.init.normal_(p, std=0.05)
    sampled.load_state_dict(same.state_dict())
    with torch.no_grad():
        t = torch.full((len(x),), 100.0, device=x.device)
        torch.testing.assert_close(sampled(x, t), same(x, t), rtol=1e-3, atol=1e-3)
    sampled.eval()
    trainer = MixedPrecisionTrainer(model=network, use_fp16=False)
    optimizer = torch.optim.AdamW(trainer.master_params, lr=LR, weight_decay=0.0)
    averages = [p.clone().detach() for p in trainer.master_params]
    flags = dict(steps=1000, learn_sigma=True, noise_schedule="cosine", rescale_learned_sigmas=True)
    process = create_gaussian_diffusion(**flags)
    spaced = create_gaussian_diffusion(**flags, timestep_respacing=str(SAMPLING_STEPS))

    def train() -> None:
        trainer.zero_grad()
        t = torch.randint(1000, (len(x),), device=x.device)
        trainer.backward(process.training_losses(network, x, t)["loss"].mean())
        trainer.optimize(optimizer)
        update_ema(averages, trainer.master_params, rate=RATE)

    return Peer("guided-diffusion-sdk", size_of(network), train,
                lambda: spaced.p_sample_loop(sampled, tuple(x.shape), device=x.device))  # fmt: skip


def denoising_diffusion_pytorch(config: Config, x: Tensor, compiled: bool) -> Peer:
    """As its Trainer does; its sampler has no learned variance."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    from ema_pytorch import EMA

    model: Any = config.model
    mult = tuple(int(m) for m in model.channel_mult)
    unet = Unet(dim=model.model_channels, dim_mults=mult, flash_attn=False)
    process = GaussianDiffusion(unet, image_size=SIZE, timesteps=1000, beta_schedule="cosine").to(x.device)
    optimizer = torch.optim.Adam(process.parameters(), lr=LR, betas=(0.9, 0.99))
    ema = EMA(process, beta=0.995, update_every=10)
    images = (x + 1) / 2

    def train() -> None:
        process(images).backward()
        torch.nn.utils.clip_grad_norm_(process.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()

    @torch.no_grad()
    def sample() -> None:
        image = torch.randn_like(x)
        for t in range(SAMPLING_STEPS - 1, -1, -1):
            image, _ = ema.ema_model.p_sample(image, t)

    return Peer("denoising-diffusion-pytorch", size_of(unet), train, sample)


PEERS: dict[str, Callable[[Config, Tensor, bool], Peer]] = {
    "ours": ours,
    "diffusers": diffusers,
    "guided-diffusion": guided_diffusion,
    "denoising-diffusion-pytorch": denoising_diffusion_pytorch,
}


def build(name: str, network: str, batch: int, device: torch.device, compiled: bool) -> Peer | None:
    x = torch.rand(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)).to(device) * 2 - 1
    try:
        return PEERS[name](configuration(network), x, compiled)
    except ImportError as error:
        print(f"{name} is left out: {error}", file=sys.stderr)
        return None


def peak_memory(name: str, network: str, batch: int) -> float:
    """MB at the most, of a process that takes three training steps."""
    command = [sys.executable, __file__, network, "--batch_size", str(batch), "--memory_of", name]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--compile", action="store_true", help="compile ours and diffusers'")
    parser.add_argument("--memory_of", choices=PEERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    batch = args.batch_size or NETWORKS[args.network][1]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.memory_of:
        alone = build(args.memory_of, args.network, batch, device, False)
        assert alone
        for _ in range(3):
            alone.train()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    memory = {}
    if device.type == "cpu":
        for name in PEERS:
            try:
                memory[name] = peak_memory(name, args.network, batch)
            except subprocess.CalledProcessError:
                print(f"{name}: its memory cannot be measured", file=sys.stderr)
    peers = {name: peer for name in PEERS if (peer := build(name, args.network, batch, device, args.compile))}

    def seconds(work: Callable[[], Any]) -> float:
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    config = configuration(args.network)
    network, x = config.network(0).to(device), torch.zeros(1, 3, SIZE, SIZE, device=device)
    forward = flops(lambda: network(x, x[:, 0, 0, 0]))
    costs = {"train": flops(lambda: network(x, x[:, 0, 0, 0]).sum().backward()) * batch,
             "sample": forward * batch * SAMPLING_STEPS}  # fmt: skip
    peak = peak_flops(device, torch.float32)
    processor = torch.backends.cpu.get_cpu_capability()
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()}, {processor}"
    result: dict[str, Any] = dict(
        date=time.strftime("%Y-%m-%d"), network=args.network, batch=batch, rounds=args.rounds, compiled=args.compile,
        device=where, cores=os.cpu_count(), threads=torch.get_num_threads(), torch=torch.__version__,
        peak_gflops=peak / 1e9,
    )  # fmt: skip
    print(json.dumps(result))
    for kind in ("train", "sample"):
        times: dict[str, list[float]] = {name: [] for name in peers}
        for peer in peers.values():
            getattr(peer, kind)()
        for _ in range(args.rounds):
            for name, peer in peers.items():
                times[name].append(seconds(getattr(peer, kind)))
        for name, peer in peers.items():
            ratios = [theirs / mine for theirs, mine in zip(times[name], times["ours"], strict=True)]
            share = costs[kind] / statistics.median(times[name]) / peak
            entry: dict[str, Any] = dict(
                seconds=statistics.median(times[name]), ours_is_faster_by=statistics.median(ratios),
                lowest=min(ratios), highest=max(ratios), peak_mb=memory.get(name), parameters=peer.parameters,
                version=version(peer.package),
            )  # fmt: skip
            if peer.parameters == peers["ours"].parameters:
                entry["share_of_peak"] = share
            result.setdefault(kind, {})[name] = entry
            print(kind, name, json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in entry.items()}))
    with RESULTS.open("a") as file:
        file.write(json.dumps(result) + "\n")
    if device.type == "cpu" and processor == "AVX512":
        subprocess.run([sys.executable, *sys.argv], check=True, env=os.environ | WITHOUT_AVX512)


if __name__ == "__main__":
    main()
