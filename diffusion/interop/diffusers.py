"""Weights and settings of the library diffusers: `UNet2DModel` with `DDPMScheduler`, both ways."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from diffusion.config.files import load_config, save_config
from diffusion.config.schema import Config, ModelConfig, config_of
from diffusion.errors import UsageError, one_line
from diffusion.files.tensors import load_tensors
from diffusion.models.layers import timestep_embedding
from diffusion.run.checkpoint import Checkpoint, Weights, checked_names

SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
PREDICTIONS = {"epsilon": "epsilon", "x_start": "sample", "v": "v_prediction"}


def unet_config(config: Config, num_classes: int) -> dict[str, Any]:
    """The arguments of diffusers' `UNet2DModel` for the network of `config`. Raises UsageError if there are none."""
    data, model, diffusion = config.data, config.model, config.diffusion
    attention = [2**level in model.attention_resolutions for level in range(len(model.channel_mult))]
    widths = [int(mult * model.model_channels) for mult in model.channel_mult]
    with_attention = {w for w, here in zip(widths, attention, strict=True) if here} | {widths[-1]}
    if model.init == "fixup" or not model.use_norm:
        raise _not_in_diffusers("a network without normalisation, and Fixup's scalars (model.use_norm, model.init)")
    if model.num_head_channels == -1 and len(with_attention) > 1 and model.num_heads > 1:
        raise _not_in_diffusers(f"{model.num_heads} heads at widths {sorted(with_attention)}: it fixes a head's width")
    if model.num_heads_upsample not in (-1, model.num_heads) and model.num_head_channels == -1:
        raise _not_in_diffusers("another number of heads on the way up (model.num_heads_upsample)")
    if not model.conv_resample and not model.resblock_updown:
        raise _not_in_diffusers("resampling without convolutions (model.conv_resample false)")
    if model.channel_mult[0] != 1:
        raise _not_in_diffusers(f"a first level of {model.channel_mult[0]} times the timestep embedding's width")
    if len(data.sizes) != 2 or data.range is not None:
        raise _not_in_diffusers(f"images of {list(data.sizes)} with data.range {data.range}: it has 8-bit pictures")
    if data.low_res_size is not None:
        raise _not_in_diffusers("an upsampler's second input: its pipeline gives the network noise alone")
    if diffusion.prediction not in PREDICTIONS or diffusion.variance == "learned" or diffusion.respacing:
        raise _not_in_diffusers("mean previous_x, variance learned and a respaced process")
    heads = None if model.num_head_channels == -1 and model.num_heads == 1 else widths[-1] // model.num_heads
    down, up = ("ResnetDown", "ResnetUp") if model.resblock_updown else ("Down", "Up")
    resample = "resnet" if model.resblock_updown else "conv"
    sample = "sample" if model.resblock_updown else ""
    # Only a table of sinusoids can give this network another number than the scheduler's timestep.
    table = diffusion.rescale_timesteps and diffusion.steps != 1000
    return dict(
        sample_size=data.sizes[0] if data.sizes[0] == data.sizes[1] else list(data.sizes), in_channels=data.channels,
        out_channels=data.channels * (2 if diffusion.variance == "learned_range" else 1),
        center_input_sample=False, freq_shift=0, flip_sin_to_cos=True, act_fn="silu", norm_eps=1e-5,
        time_embedding_type="learned" if table else "positional", time_embedding_dim=None,
        num_train_timesteps=diffusion.steps if table else None,
        block_out_channels=widths, layers_per_block=model.num_res_blocks, dropout=model.dropout,
        down_block_types=["AttnDownBlock2D" if here else f"{down}{sample}Block2D" for here in attention],
        up_block_types=["AttnUpBlock2D" if here else f"{up}{sample}Block2D" for here in reversed(attention)],
        mid_block_type="UNetMidBlock2D", mid_block_scale_factor=1, add_attention=True, downsample_padding=1,
        downsample_type=resample, upsample_type=resample,
        attention_head_dim=heads if model.num_head_channels == -1 else model.num_head_channels,
        norm_num_groups=32, attn_norm_num_groups=32,
        resnet_time_scale_shift="scale_shift" if model.use_scale_shift_norm else "default",
        class_embed_type=None, num_class_embeds=num_classes if model.class_cond else None,
    )  # fmt: skip


def scheduler_config(config: Config) -> dict[str, Any]:
    """The arguments of diffusers' `DDPMScheduler` for the process of `config`."""
    diffusion = config.diffusion
    return dict(
        num_train_timesteps=diffusion.steps, beta_schedule=SCHEDULES[diffusion.schedule], trained_betas=None,
        beta_start=1e-4 * 1000 / diffusion.steps, beta_end=0.02 * 1000 / diffusion.steps,
        variance_type=diffusion.variance, prediction_type=PREDICTIONS[diffusion.prediction], clip_sample=True,
        clip_sample_range=1.0, thresholding=False, rescale_betas_zero_snr=diffusion.zero_terminal_snr,
        timestep_spacing="linspace",  # as ours spaces a count of steps
    )  # fmt: skip


def config_from_diffusers(unet: Mapping[str, Any], scheduler: Mapping[str, Any]) -> Config:
    """The configuration of a pipeline's network and process. Raises UsageError, with the first setting that has no
    counterpart here."""
    try:
        widths, heads = unet["block_out_channels"], unet["attention_head_dim"]
        channels, steps = unet["in_channels"], scheduler["num_train_timesteps"]
        mult = [width / widths[0] for width in widths]
        attention = tuple(2**i for i, block in enumerate(unet["down_block_types"]) if block == "AttnDownBlock2D")
        schedules, predictions = ({v: k for k, v in names.items()} for names in (SCHEDULES, PREDICTIONS))
        config = config_of(dict(
            data=dict(source="folder", image_size=unet["sample_size"], channels=channels),
            model=dict(model_channels=widths[0], num_res_blocks=unet["layers_per_block"],
                       channel_mult=tuple(int(m) if m == int(m) else m for m in mult),
                       attention_resolutions=attention, dropout=unet["dropout"] or 0.0,
                       num_heads=1, num_head_channels=-1 if heads is None else heads,
                       resblock_updown=unet["downsample_type"] == "resnet",
                       use_scale_shift_norm=unet["resnet_time_scale_shift"] == "scale_shift",
                       class_cond=unet["num_class_embeds"] is not None),
            diffusion=dict(steps=steps, schedule=schedules[scheduler["beta_schedule"]],
                           prediction=predictions[scheduler["prediction_type"]], variance=scheduler["variance_type"],
                           zero_terminal_snr=scheduler["rescale_betas_zero_snr"],
                           rescale_timesteps=unet["time_embedding_type"] == "learned" or steps == 1000),
            train=dict(steps=500_000, optimizer="adamw", lr=1e-4, lr_schedule="constant", warmup_steps=0,
                       batch_size=128, ema_rates=(0.9999,), ema_warmup=False, log_every=100),
            sample=dict(every=10_000, n=16), checkpoint=dict(every=10_000),
        ))  # fmt: skip
        _check_settings("unet", unet, unet_config(config, unet["num_class_embeds"] or 0))
        _check_settings("scheduler", scheduler, scheduler_config(config))
    except UsageError:
        raise
    except (LookupError, TypeError, ArithmeticError, AttributeError, ValueError) as error:  # any value may stand there
        raise UsageError(f"the pipeline has a setting without counterpart here: {one_line(error)}") from None
    return config


def _check_settings(name: str, given: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise UsageError if a setting of diffusers has no counterpart here."""
    for key, value in wanted.items():
        there = list(given[key]) if isinstance(given.get(key), tuple) else given.get(key)
        if key in ("beta_start", "beta_end"):  # of the linear schedule; decimal and binary fractions differ a little
            same = given["beta_schedule"] != "linear" or abs(there - value) < 1e-9
        elif key == "attn_norm_num_groups" and there is None:  # then the resnets' number, in this case only
            same = given["resnet_time_scale_shift"] == "default"
        else:  # what is of no effect: a number that only a table needs, and a choice for sampling
            same = there == value or f"{name} {key}" in ("unet num_train_timesteps", "scheduler timestep_spacing")
        if not same:
            raise UsageError(f"the pipeline's {name} has {key} {there}, where only {value} can be honoured here")


def _modules(model: ModelConfig) -> dict[str, str]:
    """Our modules with weights -> diffusers'. (qkv stands for three of theirs.)"""
    names = {
        "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
        "label_emb": "class_embedding", "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out",
    }  # fmt: skip
    res = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
           "out_layers.3": "conv2", "skip_connection": "conv_shortcut"}  # fmt: skip
    attention = {"norm": "group_norm", "qkv": "to_", "proj_out": "to_out.0"}
    resample = res if model.resblock_updown else {"op": "conv", "conv": "conv"}

    def add(ours: str, theirs: str, inside: dict[str, str]) -> None:
        names.update({f"{ours}.{a}": f"{theirs}.{b}" for a, b in inside.items()})

    def add_level(ours: str, theirs: str, i: int, with_attention: bool) -> None:
        add(f"{ours}.0", f"{theirs}.resnets.{i}", res)
        if with_attention:
            add(f"{ours}.1", f"{theirs}.attentions.{i}", attention)

    levels = len(model.channel_mult)
    block = 1
    for level in range(levels):
        for i in range(model.num_res_blocks):
            add_level(f"input_blocks.{block}", f"down_blocks.{level}", i, 2**level in model.attention_resolutions)
            block += 1
        if level < levels - 1:
            add(f"input_blocks.{block}.0", f"down_blocks.{level}.downsamplers.0", resample)
            block += 1
    add_level("middle_block", "mid_block", 0, True)
    add("middle_block.2", "mid_block.resnets.1", res)
    for up, level in enumerate(reversed(range(levels))):
        for i in range(model.num_res_blocks + 1):
            block = up * (model.num_res_blocks + 1) + i
            here = 2**level in model.attention_resolutions
            add_level(f"output_blocks.{block}", f"up_blocks.{up}", i, here)
            if level and i == model.num_res_blocks:
                add(f"output_blocks.{block}.{1 + here}", f"up_blocks.{up}.upsamplers.0", resample)
    return names


def _qkv_rows(model: ModelConfig, channels: int) -> tuple[str, int]:
    """How the rows of qkv are laid out, and the number of heads."""
    heads = model.num_heads if model.num_head_channels == -1 else channels // model.num_head_channels
    return "(three heads c)" if model.use_new_attention_order else "(heads three c)", heads


def to_diffusers(weights: Weights, model: ModelConfig) -> dict[str, Tensor]:
    """Our state dict under diffusers' names."""
    modules = _modules(model)
    theirs: dict[str, Tensor] = {}
    for name, value in weights.items():
        module, _, leaf = name.rpartition(".")
        value = value.squeeze(-1) if re.search(r"\.(qkv|proj_out)$", module) and leaf == "weight" else value
        if module.endswith(".qkv"):
            rows, heads = _qkv_rows(model, len(value) // 3)
            parts = rearrange(value, f"{rows} ... -> three (heads c) ...", three=3, heads=heads)
            theirs |= {f"{modules[module]}{letter}.{leaf}": part for letter, part in zip("qkv", parts, strict=True)}
        else:
            theirs[f"{modules[module]}.{leaf}"] = value
    return theirs


def from_diffusers(theirs: Weights, config: Config, num_classes: int) -> dict[str, Tensor]:
    """diffusers' state dict under our names. Raises UsageError if it is not the network of `config`."""
    modules, rest, weights = _modules(config.model), dict(theirs), {}
    try:
        if unet_config(config, num_classes)["time_embedding_type"] == "learned":
            table = timestep_embedding(
                torch.from_numpy(config.diffusion.process().tables["network_t"]), config.model.model_channels
            )
            if not torch.allclose(rest.pop("time_proj.weight"), table, atol=1e-4):
                raise UsageError("the pipeline's unet learned another embedding of timesteps than sinusoids")
        with torch.device("meta"):
            names = config.network(num_classes).state_dict()
        for name in names:
            module, _, leaf = name.rpartition(".")
            if module.endswith(".qkv"):
                parts = torch.stack([rest.pop(f"{modules[module]}{letter}.{leaf}") for letter in "qkv"])
                rows, heads = _qkv_rows(config.model, parts.shape[1])
                value = rearrange(parts, f"three (heads c) ... -> {rows} ...", heads=heads)
            else:
                value = rest.pop(f"{modules[module]}.{leaf}")
            weights[name] = value.reshape(names[name].shape) if re.search(r"\.(qkv|proj_out)$", module) else value
    except (KeyError, RuntimeError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"the pipeline's unet has other weights than its config.json says: {error}") from None
    if rest:
        raise UsageError(f"the pipeline's unet has weights that have no place here: {', '.join(sorted(rest)[:3])}")
    return weights


def pipeline_writer(saved: Checkpoint, weights: Weights, ddim: bool) -> Callable[[Path], None]:
    """A function that writes a pipeline's folder: a `DDPMPipeline`, or a `DDIMPipeline` with the mean channels only,
    since its scheduler takes no others. Raises UsageError if diffusers cannot express the run."""
    config = saved.config
    settings = unet_config(config, len(saved.class_names))
    diffusers = _import_diffusers()
    theirs = to_diffusers(weights, config.model)
    if settings["time_embedding_type"] == "learned":
        t = torch.from_numpy(config.diffusion.process().tables["network_t"])
        theirs["time_proj.weight"] = timestep_embedding(t, config.model.model_channels)
    scheduler = diffusers.DDPMScheduler(**scheduler_config(config))
    kind = diffusers.DDPMPipeline
    if ddim:
        settings["out_channels"] = config.data.channels
        theirs |= {
            f"conv_out.{leaf}": theirs[f"conv_out.{leaf}"][: config.data.channels] for leaf in ("weight", "bias")
        }
        spacing = "trailing" if config.diffusion.zero_terminal_snr else "leading"  # from the last step, pure noise
        scheduler = diffusers.DDIMScheduler.from_config(scheduler.config, timestep_spacing=spacing)
        kind = diffusers.DDIMPipeline
    unet = diffusers.UNet2DModel(**settings)
    unet.load_state_dict(theirs)

    def write(out: Path) -> None:
        kind(unet=unet, scheduler=scheduler).save_pretrained(out, safe_serialization=True)
        if not ddim:  # ignored by diffusers; they make the way back exact
            save_config(config, out / "run.yaml")
            (out / "class_names.json").write_text(json.dumps(saved.class_names))

    return write


def read_pipeline(path: Path) -> tuple[Config, tuple[str, ...], dict[str, Tensor]]:
    """Read a pipeline's folder: the configuration, class names (numbers if it has none), and weights. Raises
    UsageError for settings without counterpart here. Only safetensors are read."""
    diffusers = _import_diffusers()
    try:
        raw = {name: json.loads((path / name / file).read_text())
               for name, file in (("unet", "config.json"), ("scheduler", "scheduler_config.json"))}  # fmt: skip
        kinds = tuple(raw[name]["_class_name"] for name in ("unet", "scheduler"))
        if not all(isinstance(values, dict) for values in raw.values()):
            raise ValueError("its settings are no objects")
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is no pipeline folder of diffusers: {error}") from None
    if kinds != ("UNet2DModel", "DDPMScheduler"):
        raise UsageError(f"{path} holds {kinds[0]} and {kinds[1]}; only UNet2DModel and DDPMScheduler can be read")
    unet = _with_defaults(diffusers.UNet2DModel, raw["unet"])
    scheduler = _with_defaults(diffusers.DDPMScheduler, raw["scheduler"])
    files = [file for file in sorted((path / "unet").iterdir())
             if re.fullmatch(r"diffusion_pytorch_model(-\d+-of-\d+)?\.safetensors", file.name)]  # fmt: skip
    if not files:
        raise UsageError(f"{path / 'unet'} holds no diffusion_pytorch_model.safetensors; other formats are not read")
    theirs: dict[str, Tensor] = {}
    for file in files:
        theirs |= load_tensors(file)
    classes = len(theirs["class_embedding.weight"]) if "class_embedding.weight" in theirs else None
    if unet["num_class_embeds"] != classes:
        raise UsageError(f"{path}: config.json has num_class_embeds {unet['num_class_embeds']}, and its weights have "
                         f"{classes or 'no'} classes")  # fmt: skip
    names = tuple(map(str, range(classes or 0)))
    if (path / "run.yaml").exists() and (path / "class_names.json").exists():
        config = load_config(path / "run.yaml")
        try:
            names = checked_names(json.loads((path / "class_names.json").read_text()))
        except (OSError, ValueError, RecursionError) as error:
            raise UsageError(f"{path / 'class_names.json'} cannot be read: {error}") from None
        _check_settings("unet", unet, unet_config(config, len(names)))
        _check_settings("scheduler", scheduler, scheduler_config(config))
    else:
        config = config_from_diffusers(unet, scheduler)
    return config, names, from_diffusers(theirs, config, len(names))


def _with_defaults(kind: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The settings of a file, completed with diffusers' defaults."""
    return {name: parameter.default for name, parameter in inspect.signature(kind.__init__).parameters.items()} | given


def _not_in_diffusers(what: str) -> UsageError:
    return UsageError(f"diffusers cannot express {what}")


def _import_diffusers() -> Any:
    try:
        import diffusers
    except ImportError:
        raise UsageError("diffusers is not installed: pip install 'diffusers>=0.35'") from None
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    return diffusers
