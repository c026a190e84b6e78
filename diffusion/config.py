"""Typed configuration: one YAML file a run, dotted overrides, and every check that needs no data.

`Config()` is the digits run. The field's docstrings are what `train.py --help` prints.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import math
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from diffusion.errors import UsageError, in_short
from diffusion.initialisation import InitName, initialise
from diffusion.losses import LossType
from diffusion.process import GaussianDiffusion, MeanType, VarianceType
from diffusion.samplers import SamplerName
from diffusion.schedule import Schedule, ScheduleName, space_timesteps
from diffusion.timesteps import TimestepsName
from diffusion.unet import SuperResModel, UNetModel


@dataclass(frozen=True)
class DataConfig:
    """The images."""

    name: Literal["digits", "mnist", "cifar10", "folder"] = "digits"
    """which data set; digits ship with the package, folder is your own images"""
    path: str | None = None
    """where the data lie: torchvision's root for mnist and cifar10 (not given: downloaded to data/), or your folder"""
    image_size: int = 8
    """height and width in pixels after the paper's preprocessing"""
    channels: int = 1
    """1 grey, 2 grey + alpha, 3 RGB, 4 RGB + alpha; any other number reads (height, width, channels) .npy files"""
    random_flip: bool = False
    """mirror half of the images left to right"""
    low_res_size: int | None = None
    """train an upsampler: the network is given each image shrunk to this size too; null: no upsampler"""
    on_error: Literal["fail", "skip"] = "fail"
    """an image file that cannot be read ends the run, or is skipped, named and counted"""
    may_change: bool = False
    """continue a run although its images are not those that it began with"""
    workers: int = 0
    """processes that read images ahead of each training process (for large folders)"""

    def __post_init__(self) -> None:
        check_range("data.image_size", self.image_size, 1, most=8192)
        check_range("data.channels", self.channels, 1, most=4 if self.name != "folder" else 4096)
        check_range("data.workers", self.workers, 0, most=256)
        if self.low_res_size is not None:
            check_range("data.low_res_size", self.low_res_size, 1, most=self.image_size - 1)
        if self.random_flip and self.name in ("digits", "mnist"):
            raise UsageError(
                f"data.random_flip is true, but a mirrored digit is no digit: set it false for {self.name}"
            )
        if self.path == "":
            raise UsageError("data.path is empty: name a folder")
        if self.path is not None and self.name == "digits":
            raise UsageError(
                f"data.path is {self.path}, but data.name is digits, which ship with the package: "
                "add --data.name folder (or mnist, cifar10)"
            )


@dataclass(frozen=True)
class ModelConfig:
    """The U-Net."""

    model_channels: int = 32
    """base width, a multiple of 32"""
    num_res_blocks: int = 1
    """residual blocks at each level"""
    channel_mult: tuple[int | float, ...] = (1, 2)
    """width of each level in multiples of the base; each level after the first halves the size"""
    attention_resolutions: tuple[int, ...] = (2,)
    """downsampling factors with attention: 1, 2, 4, ... (4: at a quarter of the image's size)"""
    num_heads: int = 2
    """attention heads"""
    num_heads_upsample: int = -1
    """attention heads on the way up; -1: as on the way down"""
    num_head_channels: int = -1
    """channels of an attention head, in place of a number of heads; -1: by number"""
    use_new_attention_order: bool = False
    """order the rows of q, k and v as some weights of the sequel (Dhariwal & Nichol 2021) do"""
    dropout: float = 0.0
    """dropout probability in the residual blocks"""
    conv_resample: bool = True
    """down- and upsample with learned convolutions"""
    resblock_updown: bool = False
    """down- and upsample inside residual blocks, as the sequel does"""
    use_scale_shift_norm: bool = True
    """the timestep scales and shifts the normalisation instead of being added"""
    use_checkpoint: bool = False
    """recompute activations in the backward pass: less memory, a third more work"""
    class_cond: bool = True
    """condition on the data's classes; in a folder of images, these are its folders"""
    init: InitName = "zero"
    """weights at the start: zero (the paper), fixup (for a network without normalisation), default (no layer zero),
    small (1e-5 in place of zero), constant and all_zero (which do not learn)"""
    use_norm: bool = True
    """normalise in groups"""

    def __post_init__(self) -> None:
        check_range("model.model_channels", self.model_channels, 32, most=8192)
        if self.model_channels % 32:
            nearest = max(32, round(self.model_channels / 32) * 32)
            raise UsageError(
                f"model.model_channels is {self.model_channels}; it must be a multiple of 32, such as {nearest}, with "
                "or without normalisation, which is in 32 groups"
            )
        check_range("model.num_res_blocks", self.num_res_blocks, 1, most=1000)
        check_range("model.num_heads", self.num_heads, 1)
        if self.num_heads_upsample != -1:
            check_range("model.num_heads_upsample", self.num_heads_upsample, 1)
        check_range("model.num_head_channels", self.num_head_channels, -1)
        widths = [mult * self.model_channels for mult in self.channel_mult]
        if not widths or not all(0 < mult <= 64 for mult in self.channel_mult) or any(width % 32 for width in widths):
            raise UsageError(
                f"model.channel_mult is {list(self.channel_mult)}; it must be a list of numbers above 0 and up to 64, "
                f"each of which makes a multiple of 32 of model.model_channels {self.model_channels}"
            )
        if self.init == "fixup" and self.use_norm:
            raise UsageError("model.init is fixup, which does without normalisation: add --model.use_norm false")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"model.dropout is {self.dropout}; it must be at least 0 and below 1")
        factors = [2**level for level in range(len(self.channel_mult))]
        for factor in self.attention_resolutions:
            if factor not in factors:
                raise UsageError(
                    f"model.attention_resolutions has {factor}, which is no downsampling factor of "
                    f"{len(factors)} levels: choose from {', '.join(map(str, factors))}"
                )
        with_attention = {int(width) for width, factor in zip(widths, factors, strict=True)
                          if factor in self.attention_resolutions or width == widths[-1]}  # fmt: skip
        by_width = self.num_head_channels != -1
        for name in ("num_head_channels",) if by_width else ("num_heads", "num_heads_upsample"):
            value = self.num_heads if getattr(self, name) == -1 else getattr(self, name)
            for width in with_attention:
                if value == 0 or width % value:
                    raise UsageError(f"model.{name} is {value}, which does not divide {width} channels")


@dataclass(frozen=True)
class DiffusionConfig:
    """The diffusion process and the loss."""

    steps: int = 1000
    """T, the number of steps"""
    schedule: ScheduleName = "cosine"
    """noise schedule"""
    respacing: int | str = ""
    """train on some of the steps only: a count, sections like 10,15,20, or ddim50; empty: all"""
    mean: MeanType = "epsilon"
    """what the network predicts"""
    variance: VarianceType = "learned_range"
    """variance of the reverse process"""
    loss: LossType = "rescaled_mse"
    """mse and rescaled_mse are the simple loss, hybrid where the variance is learned; kl is the variational bound"""
    rescale_timesteps: bool = True
    """tell the network the timestep on a scale of 0 to 1000, whatever T is"""

    def __post_init__(self) -> None:
        check_range("diffusion.steps", self.steps, 1, most=100_000)
        self.process()

    def process(self, respacing: int | str = "") -> GaussianDiffusion:
        """The process, with `respacing`, if any, in place of the training's. Raises UsageError where it cannot be."""
        schedule = Schedule.named(self.schedule, self.steps, str(respacing or self.respacing))
        return GaussianDiffusion(schedule, self.mean, self.variance, self.rescale_timesteps)


@dataclass(frozen=True)
class TrainConfig:
    """The training run."""

    steps: int = 1500
    """optimizer steps"""
    batch_size: int = 64
    """images in an optimizer step, over all processes and accumulation"""
    accumulation: int = 1
    """cut each process's share of the batch in this many parts, to fit in memory"""
    lr: float = 1e-3
    """learning rate of AdamW, after warm-up"""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """stay at lr, or fall to 0 by the last step"""
    warmup_steps: int = 0
    """optimizer steps over which the learning rate grows from 0"""
    scalar_lr_factor: float = 1.0
    """what the learning rate of Fixup's scalars is multiplied by (0.1 in its paper)"""
    weight_decay: float = 0.0
    """decoupled weight decay"""
    grad_clip: float | None = None
    """largest norm of the gradient; null: no clipping"""
    max_skipped: int = 20
    """stop after so many steps in a row whose loss or gradient is not finite; each is skipped, and counted"""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """mixed precision of accelerate"""
    ema_rates: tuple[float, ...] = (0.999,)
    """moving averages of the weights to keep; pictures are drawn with the first"""
    ema_warmup: bool = True
    """begin the averages at a low rate, (1 + step) / (10 + step), so that short runs forget the start"""
    timesteps: TimestepsName = "uniform"
    """which timesteps to train on: uniform, or by importance (meant for the kl losses)"""
    label_dropout: float = 0.0
    """share of the images that are trained on without their class, for guidance in sampling (0.1 is usual)"""
    seed: int = 0
    """everything random follows from it"""
    log_every: int = 50
    """steps between lines of metrics.jsonl"""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "log_every", "max_skipped"):
            check_range(f"train.{name}", getattr(self, name), 1)
        for name in ("warmup_steps", "weight_decay", "seed"):
            check_range(f"train.{name}", getattr(self, name), 0)
        if not 0 < self.lr < math.inf:
            raise UsageError(f"train.lr is {self.lr}; it must be a finite number above 0")
        if not 0 <= self.scalar_lr_factor < math.inf:
            raise UsageError(f"train.scalar_lr_factor is {self.scalar_lr_factor}; it must be a finite number from 0")
        if not 0 <= self.label_dropout < 1:
            raise UsageError(f"train.label_dropout is {self.label_dropout}; it must be at least 0 and below 1")
        if self.grad_clip is not None and not self.grad_clip > 0:
            raise UsageError(f"train.grad_clip is {self.grad_clip}; it must be above 0, or null for no clipping")
        if self.batch_size % self.accumulation:
            raise UsageError(
                f"train.accumulation {self.accumulation} does not divide train.batch_size {self.batch_size}"
            )
        if not self.ema_rates or not all(0 <= rate < 1 for rate in self.ema_rates):
            raise UsageError(f"train.ema_rates is {list(self.ema_rates)}; it needs one or more rates from 0 to below 1")
        if len(set(self.ema_rates)) < len(self.ema_rates):
            raise UsageError(f"train.ema_rates is {list(self.ema_rates)}; each rate may stand there once")


@dataclass(frozen=True)
class SampleConfig:
    """The pictures drawn during training, and what sample.py draws where its flags say nothing else."""

    every: int = 500
    """optimizer steps between grids; 0: only after the last step"""
    n: int = 100
    """pictures in a grid"""
    sampler: SamplerName = "ddpm"
    """sampler"""
    steps: int | str = 50
    """steps of the sampler: a count, sections like 10,15,20, or ddim50; empty: all"""
    guidance: float = 1.0
    """classifier-free guidance, for runs with train.label_dropout: 1 none, above 1 clearer classes and less variety"""

    def __post_init__(self) -> None:
        check_range("sample.every", self.every, 0)
        check_range("sample.guidance", self.guidance, 0, most=1000)
        check_range("sample.n", self.n, 1, most=10_000)


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints."""

    every: int = 500
    """optimizer steps between checkpoints; 0: only after the last step"""
    keep_last: int = 0
    """remove all but the last so many once a new one is safe; 0: keep all"""
    keep_every: int = 0
    """of those removed, spare each of a step that this divides; 0: none"""
    on_error: Literal["stop", "continue"] = "stop"
    """when a checkpoint or a grid cannot be written, as on a full disk; what was saved before stays either way"""

    def __post_init__(self) -> None:
        for name in ("every", "keep_last", "keep_every"):
            check_range(f"checkpoint.{name}", getattr(self, name), 0)


@dataclass(frozen=True)
class Config:
    """A whole run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        levels = len(self.model.channel_mult)
        divisor = 2 ** (levels - 1)
        if self.data.image_size % divisor:
            nearest = max(divisor, round(self.data.image_size / divisor) * divisor)
            raise UsageError(
                f"data.image_size is {self.data.image_size}, which the {levels} levels of model.channel_mult "
                f"do not divide: the nearest size that they do is {nearest}"
            )
        if self.train.label_dropout and not self.model.class_cond:
            raise UsageError(
                f"train.label_dropout is {self.train.label_dropout}, but model.class_cond is false: no class to drop"
            )
        if self.train.scalar_lr_factor != 1 and self.model.init != "fixup":
            raise UsageError(
                f"train.scalar_lr_factor is {self.train.scalar_lr_factor}, but only model.init fixup has scalars: "
                "leave it at 1"
            )
        check_guidance("sample.guidance", self.sample.guidance, self)
        try:
            space_timesteps(self.diffusion.steps, str(self.sample.steps))
        except UsageError as error:
            raise UsageError(f"sample.steps: {error}") from None

    def network(self, num_classes: int) -> UNetModel:
        """The network with fresh weights, for data of `num_classes` classes (0: none)."""
        options = dataclasses.asdict(self.model)
        class_cond, init = options.pop("class_cond"), options.pop("init")
        if class_cond and not num_classes:
            raise UsageError(
                f"model.class_cond is true, but the data ({self.data.name}) have no classes: "
                "set --model.class_cond false, or put the images into one folder a class"
            )
        outputs = 2 if self.diffusion.variance in ("learned", "learned_range") else 1
        kind = UNetModel if self.data.low_res_size is None else SuperResModel
        network = kind(
            in_channels=self.data.channels,
            out_channels=outputs * self.data.channels,
            num_classes=num_classes if class_cond else None,
            **options,
        )
        initialise(network, init)
        return network

    def save(self, path: Path) -> None:
        """Write the configuration as YAML, every field spelled out; the file is whole or what it was."""
        plain = json.loads(json.dumps(dataclasses.asdict(self)))  # YAML has no tuples
        replace_text(path, yaml.safe_dump(plain, sort_keys=False))


def replace_text(path: Path, text: str) -> None:
    """Write a text file that, whenever this process is killed, is whole: the old one or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load_config(path: Path) -> Config:
    """Read a configuration that `Config.save` or a person wrote. Raises UsageError where it is not one."""
    return parse_command_line([f"--config={path}"])[0]


def config_of(**sections: dict[str, Any]) -> Config:
    """The configuration of plain values, checked in every way that a file's are."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "config.yaml")
        file.write_text(json.dumps(sections))  # JSON is YAML
        return load_config(file)


def parse_command_line(argv: Sequence[str], prog: str = "train.py") -> tuple[Config, Path]:
    """`--config FILE`, `--out FOLDER` and dotted overrides -> the configuration and the run's folder.

    Raises UsageError, in one line, for an unknown key, a wrong type or an impossible combination.
    """
    # The docstring under each field is its --help.
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=prog,
        exit_on_error=False,
        allow_abbrev=False,
        description="Train a diffusion model. The same command again continues the run.",
    )
    parser.add_argument("--config", action="config", help="the run's YAML file; not given: the digits run")
    parser.add_argument("--out", type=str, default=None, help="the run's folder; not given: runs/<name of --config>")
    parser.add_argument("--verify_resume", action="store_true", help="train a few steps, break them off, continue, and "
                        "say whether that ends with the same bits as at one go; nothing is kept")  # fmt: skip
    parser.add_class_arguments(Config)
    try:
        config_files, overrides = _split(argv)
        for file in config_files:
            _check_file(file)
        parsed = parser.parse_args([*(f"--config={file}" for file in config_files), *overrides])
        parsed.pop("config")
        parsed.pop("verify_resume")  # train.py's own
        out = parsed.pop("out")
        if out == "":
            raise UsageError("--out is empty: name the run's folder")
        out = out or _default_out(Path(config_files[-1] if config_files else "digits"))
        values = parser.instantiate(parsed)
    except UsageError:
        raise
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets of thousands of levels
        raise UsageError(f"a value cannot be read: {in_short(error)}") from None
    except argparse.ArgumentError as error:
        known = [action.dest for action in parser._actions if "." in action.dest]
        raise UsageError(_one_line(str(error), known)) from None
    sections = {f.name: values[f.name] for f in dataclasses.fields(Config)}
    return Config(**sections), Path(out)


def check_range(name: str, value: float, least: int, most: int = 10**9) -> None:
    """Raise UsageError, with the setting's name, where its value is out of range or no number."""
    if not value >= least:
        raise UsageError(f"{name} is {value}; it must be at least {least}")
    if value > most:
        raise UsageError(f"{name} is {value}; it must be at most {most}")


def check_guidance(name: str, guidance: float, config: Config) -> None:
    """Raise UsageError where a run that was trained as `config` says cannot be guided so."""
    if guidance != 1 and not config.train.label_dropout:
        raise UsageError(
            f"{name} is {guidance}, which needs a network that was trained with train.label_dropout above 0 "
            "(the share of images without their class); without, it can only be 1"
        )


def _default_out(config_file: Path) -> Path:
    is_runs_own = (config_file.parent / "metrics.jsonl").exists()
    return config_file.parent if is_runs_own else Path("runs") / config_file.stem


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The files of --config, and the other arguments, which beat them wherever they stand."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--config", action="append", default=[])
    found, others = finder.parse_known_args(list(argv))
    for flag in others:
        section = flag.removeprefix("--").split("=")[0]
        if flag.startswith("--") and section in {f.name for f in dataclasses.fields(Config)}:
            raise UsageError(f"--{section} is a section: set its keys one by one, --{section}.KEY VALUE")
    return found.config, others


def _check_file(file: str) -> None:
    """Raise UsageError where a file is not YAML made of sections, which the parser would answer at length."""
    try:
        if Path(file).exists() and not Path(file).is_file():
            raise UsageError(f"--config {file} is no file")
        text = Path(file).read_text()
        content = yaml.safe_load(text)
        tree = yaml.compose(text, yaml.SafeLoader)
    except OSError as error:
        raise UsageError(f"--config {file}: {(error.strerror or str(error)).lower()}") from None
    except UsageError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"--config {file} is not YAML: {in_short(error)}") from None
    sections = {f.name: f.default_factory for f in dataclasses.fields(Config)}
    if not isinstance(content, dict) or not all(isinstance(content.get(name, {}), dict) for name in sections):
        raise UsageError(
            f"--config {file} must be made of sections ({', '.join(sections)}) of keys, as configs/digits.yaml is"
        )
    known = [f"{name}.{f.name}" for name, section in sections.items() for f in dataclasses.fields(section)]  # type: ignore[arg-type]
    for name, keys in content.items():
        if name not in sections:
            first = f"{name}.{next(iter(keys))}" if isinstance(keys, dict) and keys else str(name)
            raise UsageError(_unknown(first, known))
        required = {f.name: f.type for f in dataclasses.fields(sections[name]) if "None" not in str(f.type)}  # type: ignore[arg-type]
        for key, value in keys.items():
            if value is False and key == "precision":
                raise UsageError(f'{name}.{key} is false in --config {file}, as YAML reads no: write "no"')
            if value is None and key in required:
                hint = get_type_hints(sections[name])[key]
                named = get_origin(hint) is Literal
                wanted = f"one of {', '.join(get_args(hint))}" if named else f"of type {required[key]}"
                raise UsageError(f"{name}.{key} is null in --config {file}; it must be {wanted}")
    assert isinstance(tree, yaml.MappingNode)  # as its content is a dict
    for mapping in (tree, *(value for _, value in tree.value)):  # YAML itself would take the last of two
        names = [key.value for key, _ in mapping.value]
        for name in names:
            if names.count(name) > 1:
                raise UsageError(f"--config {file} has the key {name} twice")


def _one_line(message: str, known: list[str]) -> str:
    """A parser's message in one line, with the nearest valid name or the valid values."""
    message = " ".join(message.split())
    unknown = (
        re.search(r"Group '(?P<group>[\w.]+)' does not accept option '(?P<key>[\w.]+)'", message)
        or re.search(r"Option '(?P<key>[\w.]+)' is not accepted", message)
        or re.search(r"unrecognized arguments: --(?P<key>[\w.]+)", message)
    )
    if unknown:
        parts: dict[str, Any] = unknown.groupdict()
        key = ".".join(part for part in (parts.get("group"), parts["key"]) if part)
        return _unknown(key, ["config", "out", "verify_resume", *known])
    union = re.search(
        r'Parser key "(?P<key>[\w.]+)": Does not validate against any .*Given value: ?(?P<value>.*)', message
    )
    if union:
        types = [
            kind.replace("NoneType", "null")
            for kind in dict.fromkeys(re.findall(r"Expected an? <class '(\w+)'>", message))
        ]
        return f"{union['key']} is {union['value'] or 'empty'}; it must be of type {' or '.join(types)}"
    wrong = re.search(r'Parser key "(?P<key>[\w.]+)": Expected an? (?P<type>.+)\. Got value: ?(?P<value>.*)', message)
    if wrong:
        value = wrong["value"] or "empty"
        options = re.findall(r"'(\w+)'", wrong["type"]) if "Literal" in wrong["type"] else []
        if options:
            near = difflib.get_close_matches(wrong["value"], options, n=1)
            did_you_mean = f" (did you mean {near[0]}?)" if near else ""
            return f"{wrong['key']} is {value}; it must be one of {', '.join(options)}{did_you_mean}"
        wanted = re.sub(r"<class '(\w+)'>", r"\1", wrong["type"])
        if wanted == "float" and value.lower().lstrip("+-.") in ("nan", "inf", "infinity"):
            return f"{wrong['key']} is {value}; it must be a finite number"
        if wanted == "tuple":
            return f"{wrong['key']} is {value}; it must be a list: [{wrong['value']}]"
        return f"{wrong['key']} is {value}; it must be of type {wanted}"
    return message


def _unknown(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
    return f"unknown key {key}" + (f": did you mean {near[0]}?" if near else "; --help lists them all")
