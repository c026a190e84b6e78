"""Weights and settings of the library diffusers, both ways: `UNet2DModel` with `DDPMScheduler` or, of flow matching,
with `FlowMatchEulerDiscreteScheduler`."""

import inspect
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from diffusion.config.files import load_config, save_config
from diffusion.config.schema import Config, config_of
from diffusion.errors import UsageError, refusing
from diffusion.files.tensors import load_tensors
from diffusion.interop.openai import EVERY, TRAIN, unet_of
from diffusion.models.layers import timestep_embedding
from diffusion.models.networks import UNet
from diffusion.run.checkpoint import Checkpoint, Weights
from diffusion.run.loaded import Run

Settings = Mapping[str, Any]
DIFFUSION, FLOW = "DDPMScheduler", "FlowMatchEulerDiscreteScheduler"
SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
PREDICTIONS = {"epsilon": "epsilon", "x_start": "sample", "v": "v_prediction"}
MODULES = {
    "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
    "label_emb": "class_embedding", "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out",
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
    "out_layers.3": "conv2", "skip_connection": "conv_shortcut", "norm": "group_norm", "qkv": "to_qkv",
    "proj_out": "to_out.0", "op": "conv", "conv": "conv",
}  # fmt: skip
"""Our modules with weights, and diffusers': of the network, then inside its blocks. (It has to_q, to_k and to_v.)"""


def check_plain(run: Run, to: str) -> None:
    """Raise UsageError if a run has what other formats cannot express."""
    if run.vectors.size or run.config.data.condition_channels:
        raise UsageError(f"{run.path} has condition vectors or images, which {to} cannot express")
    if run.config.is_consistency_model:
        raise UsageError(f"{run.path} is a consistency model, which their samplers would take for a diffusion model")


def unet_config(config: Config, num_classes: int) -> dict[str, Any]:
    """The arguments of diffusers' `UNet2DModel`, where they are not its defaults, for the network of `config`. Raises
    UsageError, with the first setting that diffusers cannot express."""
    data, model, diffusion = config.data, unet_of(config), config.diffusion
    attention = [2**level in model.attention_resolutions for level in range(len(model.channel_mult))]
    widths = [int(mult * model.model_channels) for mult in model.channel_mult]
    # diffusers has one width for all heads, or a single head of any width.
    by_number, one_head = model.num_head_channels == -1, model.num_heads == 1
    several_widths = any(has and width != widths[-1] for width, has in zip(widths, attention, strict=True))
    inexpressible = {
        "model.use_norm": not model.use_norm,
        "model.num_heads": by_number and several_widths and not one_head,
        "model.num_heads_upsample": by_number and model.num_heads_upsample not in (-1, model.num_heads),
        "model.conv_resample": not (model.conv_resample or model.resblock_updown),
        "model.channel_mult": model.channel_mult[0] != 1,
        "data.image_size": len(data.sizes) != 2,
        "data.range": data.range is not None,
        "data.low_res_size": data.low_res_size is not None,
        "diffusion.schedule": diffusion.schedule not in (*SCHEDULES, "flow"),
        "diffusion.prediction": diffusion.prediction not in (["velocity"] if _kind(config) == FLOW else PREDICTIONS),
        "diffusion.variance": diffusion.variance == "learned",
        "diffusion.respacing": diffusion.respacing != "",
        "diffusion.rescale_timesteps": _kind(config) == FLOW and not diffusion.rescale_timesteps,
        "diffusion.s_max": diffusion.options.get("s_max", 1.0) != 1.0,
    }
    if refused := [name for name, it_is in inexpressible.items() if it_is]:
        raise UsageError(f"diffusers cannot express {refused[0]} {config.flat()[refused[0]]}")
    head_width = model.num_head_channels if not by_number else None if one_head else widths[-1] // model.num_heads
    plain, resample = ("ResnetDownsampleBlock2D", "resnet") if model.resblock_updown else ("DownBlock2D", "conv")
    down = ["AttnDownBlock2D" if has else plain for has in attention]
    up = [name.replace("Down", "Up") for name in reversed(down)]
    outputs = data.channels * (2 if diffusion.variance == "learned_range" else 1)
    shift = "scale_shift" if model.use_scale_shift_norm else "default"
    size = data.sizes[0] if data.sizes[0] == data.sizes[1] else list(data.sizes)
    table = dict(time_embedding_type="learned", num_train_timesteps=diffusion.steps) if _timestep_table(config) else {}
    settings: dict[str, Any] = dict(sample_size=size, in_channels=data.channels, out_channels=outputs)
    settings |= dict(block_out_channels=widths, down_block_types=down, up_block_types=up, attention_head_dim=head_width)
    settings |= dict(downsample_type=resample, upsample_type=resample, resnet_time_scale_shift=shift)
    settings |= dict(layers_per_block=model.num_res_blocks, dropout=model.dropout, attn_norm_num_groups=32)
    return settings | dict(num_class_embeds=num_classes if model.class_cond else None) | table


def _kind(config: Config) -> str:
    """The class of the scheduler for the process of `config`."""
    return FLOW if config.diffusion.schedule == "flow" else DIFFUSION


def scheduler_config(config: Config) -> dict[str, Any]:
    """The arguments of diffusers' scheduler, where they are not its defaults, for the process of `config`."""
    diffusion, steps = config.diffusion, config.diffusion.steps
    if _kind(config) == FLOW:
        return {}  # 1000 steps, whatever ours are: the network is given 1000 s
    betas = dict(beta_schedule=SCHEDULES[diffusion.schedule], beta_start=0.1 / steps, beta_end=20 / steps)
    types = dict(variance_type=diffusion.variance, prediction_type=PREDICTIONS[diffusion.prediction])
    zero_snr, spacing = diffusion.zero_terminal_snr, "linspace"  # as a count of steps is spaced here
    return betas | types | dict(num_train_timesteps=steps, rescale_betas_zero_snr=zero_snr, timestep_spacing=spacing)


def config_from_diffusers(unet: Settings, scheduler: Settings, classes: int, config: Config | None = None) -> Config:
    """The configuration of a pipeline's network and process, or `config` if the pipeline is of that one. Raises
    UsageError, with the first setting that has no counterpart."""
    with refusing(lambda reason: f"the pipeline has a setting without counterpart: {reason}"):
        kind = scheduler.get("_class_name", DIFFUSION)
        settings = _settings(unet, scheduler, kind)
        config = config or _translate(settings, kind)
        written = _settings(unet_config(config, classes), scheduler_config(config), _kind(config))
        for name, value in settings.items():
            if not (math.isclose(value, written[name]) if isinstance(value, float) else value == written[name]):
                raise UsageError(f"{name} is {value}, where only {written[name]} can be honoured")
    return config


def _settings(unet: Settings, scheduler: Settings, kind: str) -> dict[str, Any]:
    """The settings of a pipeline that have an effect, with diffusers' defaults. (Of num_train_timesteps, the
    scheduler's: the unet's is the length of its table, whose values are compared.)"""
    diffusers, settings = _import_diffusers(), dict[str, Any]()
    for cls, given in (diffusers.UNet2DModel, unet), (getattr(diffusers, kind), scheduler):
        defaults = {name: parameter.default for name, parameter in inspect.signature(cls).parameters.items()}
        settings |= json.loads(json.dumps(defaults | dict(given)))  # tuples become lists
    if settings["resnet_time_scale_shift"] == "default" and settings["attn_norm_num_groups"] is None:
        settings["attn_norm_num_groups"] = settings["norm_num_groups"]
    # Choices for sampling, and options of a thresholding that is off.
    unused = ["timestep_spacing", "steps_offset", "dynamic_thresholding_ratio", "sample_max_value"]
    unused += ["beta_start", "beta_end"] if settings.get("beta_schedule") != "linear" else []
    return {name: value for name, value in settings.items() if name not in unused and not name.startswith("_")}


def _translate(settings: Settings, kind: str) -> Config:
    """The nearest configuration to the settings of a pipeline."""
    widths, head_width = settings["block_out_channels"], settings["attention_head_dim"]
    mult = tuple(width / widths[0] if width % widths[0] else width // widths[0] for width in widths)
    blocks, steps = settings["down_block_types"], settings["num_train_timesteps"]
    attention = tuple(2**level for level, name in enumerate(blocks) if name == "AttnDownBlock2D")
    schedules, predictions = ({value: name for name, value in names.items()} for names in (SCHEDULES, PREDICTIONS))
    data = dict(source="folder", image_size=settings["sample_size"], channels=settings["in_channels"])
    model = dict(model_channels=widths[0], channel_mult=mult, attention_resolutions=attention, num_heads=1)
    model |= dict(num_head_channels=-1 if head_width is None else head_width, dropout=settings["dropout"])
    model |= dict(num_res_blocks=settings["layers_per_block"], resblock_updown=settings["downsample_type"] == "resnet")
    model |= dict(use_scale_shift_norm=settings["resnet_time_scale_shift"] == "scale_shift")
    model |= dict(class_cond=settings["num_class_embeds"] is not None)
    if kind == FLOW:
        process = dict(steps=steps, schedule="flow", prediction="velocity", variance="fixed_small")
    else:
        process = dict(steps=steps, rescale_timesteps=settings["time_embedding_type"] == "learned" or steps == 1000)
        process |= dict(schedule=schedules[settings["beta_schedule"]], variance=settings["variance_type"])
        process |= dict(prediction=predictions[settings["prediction_type"]])
        process |= dict(zero_terminal_snr=settings["rescale_betas_zero_snr"])
    train, sample = TRAIN | dict(lr=1e-4, batch_size=128, ema_rates=(0.9999,)), EVERY | dict(n=16)
    return config_of(dict(data=data, model=model, diffusion=process, train=train, sample=sample, checkpoint=EVERY))


def _names(name: str, model: UNet) -> list[str]:
    """diffusers' name of one of our weights; of qkv, its three names."""
    module, leaf = name.rsplit(".", 1)
    if module in MODULES:
        return [f"{MODULES[module]}.{leaf}"]
    side, block, part, inner = re.findall(r"(\w+?)_blocks?\.(\d+)\.(?:(\d+)\.)?(.+)", module)[0]
    # A level is some residual blocks, each perhaps with attention, and then perhaps one that resamples.
    level, i = divmod(int(block) - (side == "input"), model.num_res_blocks + 1)
    attention = inner in ("norm", "qkv", "proj_out")
    if side == "middle":
        place = f"mid_block.{'attentions.0' if attention else f'resnets.{int(block) // 2}'}"
    else:
        way, resamples = ("up", part != "0") if side == "output" else ("down", i == model.num_res_blocks)
        kind = f"attentions.{i}" if attention else f"{way}samplers.0" if resamples else f"resnets.{i}"
        place = f"{way}_blocks.{level}.{kind}"
    names = [f"to_{letter}" for letter in "qkv"] if inner == "qkv" else [MODULES[inner]]
    return [f"{place}.{name}.{leaf}" for name in names]


def _qkv_rows(model: UNet, channels: int) -> tuple[str, int]:
    """How the rows of qkv are laid out, and the number of heads."""
    heads = model.num_heads if model.num_head_channels == -1 else channels // model.num_head_channels
    return "(three heads c)" if model.use_new_attention_order else "(heads three c)", heads


def to_diffusers(weights: Weights, model: UNet) -> dict[str, Tensor]:
    """Our state dict under diffusers' names."""
    state: dict[str, Tensor] = {}
    for name, value in weights.items():
        names, parts = _names(name, model), value[None]
        if len(names) == 3:
            rows, heads = _qkv_rows(model, len(value) // 3)
            parts = rearrange(value, f"{rows} ... -> three (heads c) ...", three=3, heads=heads)
        # Attention's convolutions of size 1 are linear layers.
        state |= {name: part.squeeze(-1) if value.ndim == 3 else part for name, part in zip(names, parts, strict=True)}
    return state


def _timestep_table(config: Config) -> dict[str, Tensor]:
    """The sinusoids as a weight, which alone gives diffusers' network another number than the scheduler's timestep."""
    if not config.diffusion.rescale_timesteps or config.diffusion.steps == 1000 or _kind(config) == FLOW:
        return {}
    network_t = torch.from_numpy(config.diffusion.process().tables["network_t"])
    return {"time_proj.weight": timestep_embedding(network_t, unet_of(config).model_channels)}


def from_diffusers(state: Weights, config: Config, num_classes: int) -> dict[str, Tensor]:
    """diffusers' state dict under our names. Raises UsageError if it has other names than the network of `config`."""
    rest, weights, model = dict(state), {}, unet_of(config)
    with torch.device("meta"):
        network = config.network(num_classes)
    with refusing(lambda reason: f"the unet has other weights than its config.json says: {reason}"):
        for name, table in _timestep_table(config).items():
            if not torch.allclose(rest.pop(name), table, atol=1e-4):
                raise UsageError(f"{name} is not a table of sinusoids")
        for name, ours in network.state_dict().items():
            value, *others = (rest.pop(part) for part in _names(name, model))
            if others:
                rows, heads = _qkv_rows(model, len(value))
                value = rearrange([value, *others], f"three (heads c) ... -> {rows} ...", heads=heads)
            weights[name] = value.unsqueeze(-1) if ours.ndim == 3 else value
        if rest:
            raise UsageError(f"{min(rest)} has no place")
    return weights


def pipeline_writer(saved: Checkpoint, weights: Weights) -> Callable[[Path], None]:
    """A function that writes the folder of a `DDPMPipeline`. Raises UsageError if diffusers cannot express the run."""
    config = saved.config
    settings = unet_config(config, len(saved.class_names))
    diffusers = _import_diffusers()
    kind = getattr(diffusers, _kind(config))
    unet, scheduler = diffusers.UNet2DModel(**settings), kind(**scheduler_config(config))
    unet.load_state_dict(to_diffusers(weights, unet_of(config)) | _timestep_table(config))

    def write(out: Path) -> None:
        diffusers.DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(out, safe_serialization=True)
        save_config(config, out / "run.yaml")  # ignored by diffusers; they make the way back exact
        (out / "class_names.json").write_text(json.dumps(saved.class_names))

    return write


def read_pipeline(path: Path) -> tuple[Config, tuple[str, ...], dict[str, Tensor]]:
    """Read a pipeline's folder: the configuration, class names (numbers if it has none), and weights. Raises
    UsageError for settings without counterpart. Only safetensors are read."""
    config = None
    with refusing(lambda reason: f"{path} is not a pipeline folder of diffusers: {reason}"):
        files = "unet/config.json", "scheduler/scheduler_config.json"
        unet, scheduler = (json.loads((path / file).read_text()) for file in files)
        kinds = unet["_class_name"], scheduler["_class_name"]
        if (path / "run.yaml").exists():
            names = tuple(map(str, json.loads((path / "class_names.json").read_text())))
            if len(set(names)) < len(names):
                raise ValueError("class names must be unique")
            config = load_config(path / "run.yaml")
    if kinds[0] != "UNet2DModel" or kinds[1] not in (DIFFUSION, FLOW):
        right = f"only UNet2DModel and {DIFFUSION} or {FLOW} can be read"
        raise UsageError(f"{path} holds {kinds[0]} and {kinds[1]}; {right}")
    state = load_tensors(path / "unet/diffusion_pytorch_model.safetensors")
    if config is None:
        embedding = state.get("class_embedding.weight", torch.empty(0))
        # Rows without columns take no room in a file.
        names = tuple(map(str, range(min(embedding.shape[:1].numel(), embedding.numel()))))
    config = config_from_diffusers(unet, scheduler, len(names), config)
    return config, names, from_diffusers(state, config, len(names))


def _import_diffusers() -> Any:
    with refusing(lambda reason: "diffusers is not installed: pip install 'diffusers>=0.35'", ImportError):
        import diffusers
    diffusers.utils.logging.set_verbosity_error()
    return diffusers
