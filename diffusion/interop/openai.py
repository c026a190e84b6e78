"""Weights and flags of improved-diffusion and guided-diffusion, the code of the first paper and of its sequel.

Their state dicts have our names, so only the flags need translation.
"""

import shlex
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from diffusion.config.fields import has_field
from diffusion.config.schema import Config, TrainConfig, config_of
from diffusion.errors import UsageError, did_you_mean, refusing
from diffusion.files.tensors import load_plain
from diffusion.models.networks import UNet

IMPROVED: dict[str, Any] = dict(
    image_size=64, num_channels=128, num_res_blocks=2, num_heads=4, num_heads_upsample=-1, dropout=0.0,
    attention_resolutions="16,8", class_cond=False, use_checkpoint=False, use_scale_shift_norm=True,
    learn_sigma=False, sigma_small=False, diffusion_steps=1000, noise_schedule="linear", timestep_respacing="",
    use_kl=False, predict_xstart=False, rescale_timesteps=True, rescale_learned_sigmas=True, large_size=256,
    small_size=64, lr=1e-4, batch_size=128, microbatch=-1, weight_decay=0.0, ema_rate="0.9999",
    schedule_sampler="uniform", num_samples=16, use_ddim=False, use_fp16=False,
)  # fmt: skip
"""The defaults of improved-diffusion's flags that can be honoured. (use_fp16 says nothing about the model.)"""
ONLY_GUIDED = dict(channel_mult="", num_head_channels=-1, resblock_updown=False, use_new_attention_order=False)
"""The defaults of the flags that only guided-diffusion has."""
GUIDED = IMPROVED | ONLY_GUIDED | dict(rescale_timesteps=False, rescale_learned_sigmas=False)
"""The defaults of guided-diffusion."""
CHANNEL_MULT = {512: "0.5,1,1,2,2,4,4", 256: "1,1,2,2,4,4", 128: "1,1,2,3,4", 64: "1,2,3,4", 32: "1,2,2,2"}
"""By image size. (An upsampler to 512 uses those of 256.)"""
TRAIN = dict(steps=500_000, optimizer="adamw", lr_schedule="constant", warmup_steps=0, ema_warmup=False, log_every=100)
EVERY = dict(every=10_000)
"""The papers' training, and how often it samples and saves: the sections of a foreign model's configuration."""


def unet_of(config: Config) -> UNet:
    """The settings of a run's U-Net. Raises UsageError if its network is another."""
    if not isinstance(config.model, UNet):
        raise UsageError(f"model.network is {config.model.network}; only a unet can be converted")
    return config.model


def check_unet(config: Config) -> str:
    """The published class with the network of `config`. Raises UsageError if there is none."""
    if not unet_of(config).use_norm:
        raise UsageError("model.use_norm is false; the published UNetModel has no network without normalisation")
    return "UNetModel"


def parse_flags(text: str) -> dict[str, Any]:
    """Their flags, typed, with the defaults of the repository whose flags they are. Raises UsageError, naming the flag.

    Flags count as guided-diffusion's if one of them exists only there.
    """
    pairs = "it must be pairs like --image_size 64 --learn_sigma True"
    with refusing(lambda reason: f"--flags is {text!r}; {pairs}", ValueError):
        words = shlex.split(text.replace("=", " "))
        given = {flag.removeprefix("--"): value for flag, value in zip(words[::2], words[1::2], strict=True)}
    flags = dict(GUIDED if ONLY_GUIDED.keys() & given.keys() else IMPROVED)
    for name, value in given.items():
        if name not in flags:
            raise UsageError(f"--flags has --{name}, which cannot be honoured: {did_you_mean(name, flags)}")
        kind = type(flags[name])
        try:
            flags[name] = TypeAdapter(kind).validate_python(value)
        except ValueError:
            raise UsageError(f"--flags has --{name} {value}; it must be of type {kind.__name__}") from None
    return flags


def config_from_flags(flags: Mapping[str, Any], upsampler: bool) -> Config:
    """The configuration that flags (see `parse_flags`) describe. Raises UsageError if it is impossible."""
    size = flags["large_size"] if upsampler else flags["image_size"]
    mult = flags.get("channel_mult") or CHANNEL_MULT.get(256 if upsampler and size == 512 else size)
    if mult is None:
        raise UsageError(f"--flags has images of {size}, whose widths are not known: {sorted(CHANNEL_MULT)} are")
    numbers = "channel_mult, attention_resolutions and ema_rate are numbers with commas"
    with refusing(lambda reason: f"--flags: {numbers}", (ValueError, ZeroDivisionError)):
        channel_mult = tuple(float(m) if "." in m else int(m) for m in mult.split(","))
        factors = [size // int(resolution) for resolution in flags["attention_resolutions"].split(",")]
        rates = tuple(float(rate) for rate in flags["ema_rate"].split(","))
    attention = tuple(factor for factor in factors if 0 < factor < 2 ** len(channel_mult))
    low_res = flags["small_size"] if upsampler else None
    data = dict(source="folder", image_size=size, channels=3, random_flip="channel_mult" in flags, low_res_size=low_res)
    model = _of_section(UNet, flags)
    model |= dict(model_channels=flags["num_channels"], channel_mult=channel_mult, attention_resolutions=attention)
    prediction = "x_start" if flags["predict_xstart"] else "epsilon"
    variance = "learned_range" if flags["learn_sigma"] else "fixed_small" if flags["sigma_small"] else "fixed_large"
    loss = "rescaled_kl" if flags["use_kl"] else "rescaled_mse" if flags["rescale_learned_sigmas"] else "mse"
    process = dict(steps=flags["diffusion_steps"], schedule=flags["noise_schedule"], prediction=prediction)
    process |= dict(variance=variance, loss=loss, rescale_timesteps=flags["rescale_timesteps"])
    accumulation = flags["batch_size"] // flags["microbatch"] if flags["microbatch"] > 0 else 1
    train = TRAIN | _of_section(TrainConfig, flags) | dict(ema_rates=rates, gradient_accumulation=accumulation)
    train |= dict(timestep_sampler=flags["schedule_sampler"].replace("-", "_"))
    steps = flags["timestep_respacing"] or min(250, flags["diffusion_steps"])
    sample = EVERY | dict(n=flags["num_samples"], sampler="ddim" if flags["use_ddim"] else "ddpm", steps=steps)
    return config_of(dict(data=data, model=model, diffusion=process, train=train, sample=sample, checkpoint=EVERY))


def _of_section(section: Any, flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that have the name and the meaning of a section's fields."""
    return {name: value for name, value in flags.items() if has_field(section, name)}


def load_state_dict(path: Path) -> dict[str, Tensor]:
    """The weights by name in a file of `torch.save`: its average, if the file is a checkpoint of more. No code in it is
    run. Raises UsageError if it holds none."""
    weights = load_plain(path)
    weights = weights.get("ema", weights) if isinstance(weights, dict) else weights
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # torch does not look at the checksums
                raise UsageError(f"{path} is damaged: {damaged} has another checksum")
    named = isinstance(weights, dict) and all(isinstance(name, str) for name in weights)
    if not named or not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UsageError(f"{path} holds no weights by name: take their model*.pt or ema_*.pt, not opt*.pt")
    return weights


def from_openai(path: Path, flag_text: str) -> tuple[Config, tuple[str, ...], dict[str, Tensor]]:
    """Read their checkpoint and flags: the configuration, the classes by number, and the weights as stored."""
    flags, weights = parse_flags(flag_text), load_state_dict(path)
    upsampler = weights.get("input_blocks.0.0.weight", torch.empty(0)).shape[1:2] == (6,)
    label_emb = weights.get("label_emb.weight", torch.empty(1000))
    # Rows without columns take no room in a file.
    names = tuple(map(str, range(min(label_emb.shape[:1].numel(), label_emb.numel())))) if flags["class_cond"] else ()
    return config_from_flags(flags, upsampler), names, weights
