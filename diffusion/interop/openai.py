"""Weights and flags of improved-diffusion and guided-diffusion, the code of the first paper and of its sequel.

Their state dicts have our names, so only the flags need translation.
"""

from __future__ import annotations

import difflib
import shlex
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from diffusion.config.schema import Config, config_of
from diffusion.errors import UsageError
from diffusion.files.tensors import load_plain

IMPROVED: dict[str, Any] = dict(
    image_size=64, num_channels=128, num_res_blocks=2, num_heads=4, num_heads_upsample=-1, dropout=0.0,
    attention_resolutions="16,8", class_cond=False, use_checkpoint=False, use_scale_shift_norm=True,
    learn_sigma=False, sigma_small=False, diffusion_steps=1000, noise_schedule="linear", timestep_respacing="",
    use_kl=False, predict_xstart=False, rescale_timesteps=True, rescale_learned_sigmas=True, large_size=256,
    small_size=64, lr=1e-4, batch_size=128, microbatch=-1, weight_decay=0.0, ema_rate="0.9999",
    schedule_sampler="uniform", num_samples=16, use_ddim=False, use_fp16=False, clip_denoised=True,
)  # fmt: skip
"""The defaults of improved-diffusion's flags that can be honoured here."""
GUIDED = IMPROVED | dict(
    rescale_timesteps=False, rescale_learned_sigmas=False, channel_mult="", num_head_channels=-1, resblock_updown=False,
    use_new_attention_order=False,
)  # fmt: skip
"""The defaults of guided-diffusion."""
ONLY_GUIDED = {"channel_mult", "num_head_channels", "resblock_updown", "use_new_attention_order"}
BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
CHANNEL_MULT = {512: "0.5,1,1,2,2,4,4", 256: "1,1,2,2,4,4", 128: "1,1,2,3,4", 64: "1,2,3,4", 32: "1,2,2,2"}
"""By image size. (An upsampler to 512 uses those of 256.)"""


def parse_flags(text: str) -> dict[str, Any]:
    """Their flags, typed, with the defaults of the repository whose flags they are. Raises UsageError, naming the flag.

    Flags count as guided-diffusion's if one of them exists only there. (use_fp16 exists in both, and says nothing about
    the model.)
    """
    try:
        words = [part for word in shlex.split(text) for part in (word.split("=", 1) if word[:2] == "--" else [word])]
    except ValueError as error:
        raise UsageError(f"--flags cannot be split into words: {str(error).lower()}") from None
    if len(words) % 2 or not all(name.startswith("--") for name in words[::2]):
        raise UsageError(f"--flags is {text!r}; it must be pairs like --image_size 64 --learn_sigma True")
    given = {name[2:]: value for name, value in zip(words[::2], words[1::2], strict=True)}
    if len(given) < len(words) // 2:
        raise UsageError("--flags gives a flag twice")
    flags = dict(GUIDED if ONLY_GUIDED & given.keys() else IMPROVED)
    for name, value in given.items():
        if name not in flags:
            near = difflib.get_close_matches(name, flags, n=1, cutoff=0.75)
            hint = f": did you mean --{near[0]}?" if near else ""
            raise UsageError(f"--flags has --{name}, which is not known or cannot be honoured here{hint}")
        kind = type(flags[name])
        try:
            flags[name] = BOOLEANS[value.lower()] if kind is bool else kind(value)
        except (ValueError, KeyError):
            raise UsageError(f"--flags has --{name} {value}; it must be of type {kind.__name__}") from None
    if not flags["clip_denoised"]:
        raise UsageError("--flags has --clip_denoised False, which cannot be honoured here: x_0 is always clipped")
    return flags


def config_from_flags(flags: Mapping[str, Any], upsampler: bool) -> Config:
    """The configuration that flags (see `parse_flags`) describe. Raises UsageError if it is impossible."""
    guided = "channel_mult" in flags  # which repository's flags these are
    size = flags["large_size"] if upsampler else flags["image_size"]
    mult = flags.get("channel_mult") or CHANNEL_MULT.get(256 if upsampler and size == 512 else size)
    if mult is None:
        raise UsageError(f"--flags has images of {size}, whose widths are not known: {sorted(CHANNEL_MULT)} are")
    try:
        channel_mult = tuple(float(m) if "." in m else int(m) for m in mult.split(","))
        factors = tuple(size // int(resolution) for resolution in flags["attention_resolutions"].split(","))
        rates = tuple(float(rate) for rate in str(flags["ema_rate"]).split(","))
    except (ValueError, ZeroDivisionError):
        raise UsageError("--flags: channel_mult, attention_resolutions and ema_rate are numbers with commas") from None
    accumulation = flags["batch_size"] // flags["microbatch"] if flags["microbatch"] > 0 else 1
    fixed = "fixed_small" if flags["sigma_small"] else "fixed_large"
    return config_of(dict(
        data=dict(source="folder", image_size=size, channels=3, random_flip=guided,
                  low_res_size=flags["small_size"] if upsampler else None),
        model=dict(model_channels=flags["num_channels"], channel_mult=channel_mult,
                   attention_resolutions=tuple(f for f in factors if 0 < f < 2 ** len(channel_mult)),
                   **{name: flags[name] for name in (
                       "num_res_blocks", "num_heads", "num_heads_upsample", "dropout", "use_checkpoint",
                       "use_scale_shift_norm", "class_cond")},
                   **{name: flags[name] for name in ONLY_GUIDED - {"channel_mult"} if guided}),
        diffusion=dict(
            steps=flags["diffusion_steps"], schedule=flags["noise_schedule"],
            prediction="x_start" if flags["predict_xstart"] else "epsilon",
            variance="learned_range" if flags["learn_sigma"] else fixed,
            loss="rescaled_kl" if flags["use_kl"] else "rescaled_mse" if flags["rescale_learned_sigmas"] else "mse",
            rescale_timesteps=flags["rescale_timesteps"]),
        train=dict(steps=500_000, optimizer="adamw", lr=flags["lr"], lr_schedule="constant", warmup_steps=0,
                   batch_size=flags["batch_size"], ema_rates=rates, ema_warmup=False,
                   gradient_accumulation=accumulation, weight_decay=flags["weight_decay"],
                   timestep_sampler=flags["schedule_sampler"].replace("-", "_"), log_every=100),
        sample=dict(every=10_000, n=flags["num_samples"], sampler="ddim" if flags["use_ddim"] else "ddpm",
                    steps=flags["timestep_respacing"] or min(250, flags["diffusion_steps"])),
        checkpoint=dict(every=10_000),
    ))  # fmt: skip


def flags_from_config(config: Config, num_classes: int) -> str:
    """guided-diffusion's flags for the network and process of `config`. Raises UsageError if it has none for them."""
    data, model, diffusion = config.data, config.model, config.diffusion
    if data.channels != 3 or num_classes not in (0, 1000):
        raise UsageError(
            f"their networks have 3 channels and 0 or 1000 classes, and this {data.channels} and {num_classes}"
        )
    foreign = diffusion.prediction not in ("epsilon", "x_start") or diffusion.variance == "learned"
    if foreign or diffusion.zero_terminal_snr or not model.conv_resample:
        raise UsageError("their scripts have no flag for conv_resample false, prediction v and previous_x, variance "
                         "learned and zero_terminal_snr")  # fmt: skip
    if not isinstance(data.image_size, int) or data.range is not None:
        raise UsageError(f"their scripts take square 8-bit images, and data.image_size is {data.image_size}")
    # Twice the image's size is at no level: their scripts cannot read an empty list.
    resolutions = [data.image_size // factor for factor in model.attention_resolutions] or [2 * data.image_size]
    pairs = dict(
        num_channels=model.model_channels, channel_mult=",".join(map(str, model.channel_mult)),
        attention_resolutions=",".join(map(str, resolutions)),
        **{name: getattr(model, name) for name in (
            "num_res_blocks", "num_heads", "num_heads_upsample", "num_head_channels", "dropout", "class_cond",
            "resblock_updown", "use_new_attention_order", "use_scale_shift_norm")},
        learn_sigma=diffusion.variance == "learned_range", sigma_small=diffusion.variance == "fixed_small",
        diffusion_steps=diffusion.steps, noise_schedule=diffusion.schedule,
        predict_xstart=diffusion.prediction == "x_start", rescale_timesteps=diffusion.rescale_timesteps,
        use_kl=diffusion.loss in ("kl", "rescaled_kl"), rescale_learned_sigmas=diffusion.loss == "rescaled_mse",
    )  # fmt: skip
    if data.low_res_size is None:
        pairs["image_size"] = data.image_size
    else:
        pairs |= dict(large_size=data.image_size, small_size=data.low_res_size)
    return " ".join(f"--{name} {value}" for name, value in pairs.items())


def from_openai(path: Path, flag_text: str) -> tuple[Config, int, dict[str, Tensor]]:
    """Read their checkpoint and flags: the configuration, the number of classes, and the weights as stored.

    No code in the file is run. Raises UsageError if it is not a state dict of the network of the flags.
    """
    flags = parse_flags(flag_text)
    _check_crcs(path)
    loaded = load_plain(path)
    named = isinstance(loaded, dict) and all(isinstance(v, Tensor) and not v.is_nested for v in loaded.values())
    if not named or not loaded:
        raise UsageError(f"{path} holds no weights by name: take their model*.pt or ema_*.pt, not opt*.pt")
    shapes = {str(name): value.shape for name, value in loaded.items()}
    upsampler = shapes.get("input_blocks.0.0.weight", ())[1:2] == (6,)
    num_classes = (shapes.get("label_emb.weight", (0,))[:1] or (0,))[0] or 1000
    return config_from_flags(flags, upsampler), num_classes if flags["class_cond"] else 0, loaded


def _check_crcs(path: Path) -> None:
    """Raise UsageError if a download is damaged, which torch does not check."""
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise UsageError(f"{path} is damaged: its checksum of {damaged} is another")
    except (OSError, zipfile.BadZipFile):
        pass  # missing, or in the older format: reported below
