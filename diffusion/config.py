"""Typed configuration: the schema, with each range beside its field, and its YAML file.

`Config()` is the digits run. The docstring under a field is what `train.py --help` prints.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import os
import re
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from diffusion.errors import UsageError, in_short
from diffusion.files import replace_text
from diffusion.initialisation import InitName, initialise
from diffusion.losses import LossType
from diffusion.process import GaussianDiffusion, MeanType, VarianceType
from diffusion.samplers import SamplerName
from diffusion.schedule import Schedule, ScheduleName, space_timesteps
from diffusion.timesteps import TimestepsName
from diffusion.unet import SuperResModel, UNetModel

SCHEMA = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)
MAX_FILE_BYTES = 2**20
"""A larger YAML file is no configuration."""


def _checked_path(path: str) -> str:
    if not path:
        raise UsageError("is empty: name a file or folder, or leave it out")
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        raise UsageError("has characters that no file's name can have") from None
    if "\0" in path:
        raise UsageError("has a NUL character, which no file's name can have")
    return path


Natural = Annotated[int, Field(ge=0, le=10**9)]
Positive = Annotated[int, Field(ge=1, le=10**9)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
PathText = Annotated[
    str,
    BeforeValidator(lambda path: os.fsdecode(path) if isinstance(path, bytes) else path),  # YAML's !!binary
    AfterValidator(_checked_path),
]


@dataclass(frozen=True, config=SCHEMA)
class DataConfig:
    """The images."""

    name: Literal["digits", "mnist", "cifar10", "folder"] = "digits"
    """which data set; digits ship with the package, folder is your own images"""
    path: PathText | None = None
    """where the data lie: torchvision's root for mnist and cifar10 (not given: downloaded to data/), or your folder"""
    image_size: Annotated[int, Field(ge=1, le=8192)] = 8
    """height and width in pixels after the paper's preprocessing"""
    channels: Annotated[int, Field(ge=1, le=4096)] = 1
    """1 grey, 2 grey + alpha, 3 RGB, 4 RGB + alpha; any other number reads (height, width, channels) .npy files"""
    random_flip: bool = False
    """mirror half of the images left to right"""
    low_res_size: Annotated[int, Field(ge=1)] | None = None
    """train an upsampler: the network is given each image shrunk to this size too; null: no upsampler"""
    on_error: Literal["fail", "skip"] = "fail"
    """an image file that cannot be read ends the run, or is skipped, named and counted"""
    may_change: bool = False
    """continue a run although its images are not those that it began with"""
    workers: Annotated[int, Field(ge=0, le=256)] = 0
    """processes that read images ahead of each training process (for large folders)"""

    def __post_init__(self) -> None:
        if self.channels > 4 and self.name != "folder":
            raise UsageError(f"data.channels is {self.channels}; it must be at most 4")
        if self.low_res_size is not None and self.low_res_size >= self.image_size:
            raise UsageError(f"data.low_res_size is {self.low_res_size}; it must be at most {self.image_size - 1}")
        if self.random_flip and self.name in ("digits", "mnist"):
            raise UsageError(
                f"data.random_flip is true, but a mirrored digit is no digit: set it false for {self.name}"
            )
        if self.path is not None and self.name == "digits":
            raise UsageError(
                f"data.path is {self.path}, but data.name is digits, which ship with the package: "
                "add --data.name folder (or mnist, cifar10)"
            )


@dataclass(frozen=True, config=SCHEMA)
class ModelConfig:
    """The U-Net."""

    model_channels: Annotated[int, Field(ge=32, le=8192)] = 32
    """base width, a multiple of 32"""
    num_res_blocks: Annotated[int, Field(ge=1, le=1000)] = 1
    """residual blocks at each level"""
    channel_mult: Annotated[tuple[int | Finite, ...], Field(strict=False)] = (1, 2)
    """width of each level in multiples of the base; each level after the first halves the size"""
    attention_resolutions: Annotated[tuple[int, ...], Field(strict=False)] = (2,)
    """downsampling factors with attention: 1, 2, 4, ... (4: at a quarter of the image's size)"""
    num_heads: Positive = 2
    """attention heads"""
    num_heads_upsample: Annotated[int, Field(ge=-1)] = -1
    """attention heads on the way up; -1: as on the way down"""
    num_head_channels: Annotated[int, Field(ge=-1)] = -1
    """channels of an attention head, in place of a number of heads; -1: by number"""
    use_new_attention_order: bool = False
    """order the rows of q, k and v as some weights of the sequel (Dhariwal & Nichol 2021) do"""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
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
        if self.model_channels % 32:
            nearest = max(32, round(self.model_channels / 32) * 32)
            raise UsageError(
                f"model.model_channels is {self.model_channels}; it must be a multiple of 32, such as {nearest}, with "
                "or without normalisation, which is in 32 groups"
            )
        widths = [mult * self.model_channels for mult in self.channel_mult]
        if not widths or not all(0 < mult <= 64 for mult in self.channel_mult) or any(width % 32 for width in widths):
            raise UsageError(
                f"model.channel_mult is {list(self.channel_mult)}; it must be a list of numbers above 0 and up to 64, "
                f"each of which makes a multiple of 32 of model.model_channels {self.model_channels}"
            )
        if self.init == "fixup" and self.use_norm:
            raise UsageError("model.init is fixup, which does without normalisation: add --model.use_norm false")
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


@dataclass(frozen=True, config=SCHEMA)
class DiffusionConfig:
    """The diffusion process and the loss."""

    steps: Annotated[int, Field(ge=1, le=100_000)] = 1000
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
        self.process()

    def process(self, respacing: int | str = "") -> GaussianDiffusion:
        """The process, with `respacing`, if any, in place of the training's. Raises UsageError where it cannot be."""
        schedule = Schedule.named(self.schedule, self.steps, str(respacing or self.respacing))
        return GaussianDiffusion(schedule, self.mean, self.variance, self.rescale_timesteps)


@dataclass(frozen=True, config=SCHEMA)
class TrainConfig:
    """The training run."""

    steps: Positive = 1500
    """optimizer steps"""
    batch_size: Positive = 64
    """images in an optimizer step, over all processes and accumulation"""
    accumulation: Positive | None = None
    """accumulate gradients over this many parts of each process's share of the batch, to fit in memory; null: what
    accelerate launch was told, or 1"""
    lr: Annotated[Finite, Field(gt=0)] = 1e-3
    """learning rate of AdamW, after warm-up"""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """stay at lr, or fall to 0 by the last step"""
    warmup_steps: Natural = 0
    """optimizer steps over which the learning rate grows from 0"""
    scalar_lr_factor: Annotated[Finite, Field(ge=0)] = 1.0
    """what the learning rate of Fixup's scalars is multiplied by (0.1 in its paper)"""
    weight_decay: Annotated[Finite, Field(ge=0)] = 0.0
    """decoupled weight decay"""
    grad_clip: Annotated[float, Field(gt=0)] | None = None
    """largest norm of the gradient; null: what accelerate launch was told, or no clipping"""
    max_skipped: Positive = 20
    """stop after so many steps in a row whose loss or gradient is not finite; each is skipped, and counted"""
    precision: Literal["no", "bf16", "fp16"] | None = None
    """mixed precision of accelerate; null: what accelerate launch was told, or no"""
    ema_rates: Annotated[tuple[float, ...], Field(strict=False)] = (0.999,)
    """moving averages of the weights to keep; pictures are drawn with the first"""
    ema_warmup: bool = True
    """begin the averages at a low rate, (1 + step) / (10 + step), so that short runs forget the start"""
    timesteps: TimestepsName = "uniform"
    """which timesteps to train on: uniform, or by importance (meant for the kl losses)"""
    label_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """share of the images that are trained on without their class, for guidance in sampling (0.1 is usual)"""
    init_from: PathText | None = None
    """begin with the weights (the first average) of this run, checkpoint or converted model: what fits is copied"""
    seed: Natural = 0
    """everything random follows from it"""
    log_every: Positive = 50
    """steps between lines of metrics.jsonl"""

    def __post_init__(self) -> None:
        if self.batch_size % (self.accumulation or 1):
            raise UsageError(
                f"train.accumulation {self.accumulation} does not divide train.batch_size {self.batch_size}"
            )
        if not self.ema_rates or not all(0 <= rate < 1 for rate in self.ema_rates):
            raise UsageError(f"train.ema_rates is {list(self.ema_rates)}; it needs one or more rates from 0 to below 1")
        if len(set(self.ema_rates)) < len(self.ema_rates):
            raise UsageError(f"train.ema_rates is {list(self.ema_rates)}; each rate may stand there once")


@dataclass(frozen=True, config=SCHEMA)
class SampleConfig:
    """The pictures drawn during training, and what sample.py draws where its flags say nothing else."""

    every: Natural = 500
    """optimizer steps between grids; 0: only after the last step"""
    n: Annotated[int, Field(ge=1, le=10_000)] = 100
    """pictures in a grid"""
    sampler: SamplerName = "ddpm"
    """sampler"""
    steps: int | str = 50
    """steps of the sampler: a count, sections like 10,15,20, or ddim50; empty: all"""
    guidance: Annotated[float, Field(ge=0, le=1000)] = 1.0
    """classifier-free guidance, for runs with train.label_dropout: 1 none, above 1 clearer classes and less variety"""


@dataclass(frozen=True, config=SCHEMA)
class CheckpointConfig:
    """Checkpoints."""

    every: Natural = 500
    """optimizer steps between checkpoints; 0: only after the last step"""
    keep_last: Natural = 0
    """remove all but the last so many once a new one is safe; 0: keep all"""
    keep_every: Natural = 0
    """of those removed, spare each of a step that this divides; 0: none"""
    on_error: Literal["stop", "continue"] = "stop"
    """when a checkpoint or a grid cannot be written, as on a full disk; what was saved before stays either way"""


@dataclass(frozen=True, config=SCHEMA)
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
        """Write the configuration as YAML, every field spelled out, atomically.

        The text is read back first. Raises UsageError if that does not give the same configuration.
        """
        text = yaml.dump(dataclasses.asdict(self), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**6)
        if config_of(_parse_yaml(text, str(path))) != self:
            raise UsageError(f"the configuration cannot be written to {path} so that it reads back as the same")
        replace_text(path, text)


SECTIONS: dict[str, Any] = {f.name: f.default_factory for f in dataclasses.fields(Config)}
FIELDS = [f"{name}.{f.name}" for name, section in SECTIONS.items() for f in dataclasses.fields(section)]


def _raises_usage_error(cls: Any) -> None:
    """Let `cls(...)`, and so `dataclasses.replace`, raise UsageError instead of pydantic's ValidationError."""
    validated = cls.__init__
    section = "" if cls is Config else next(name for name, kind in SECTIONS.items() if kind is cls)

    @functools.wraps(validated)
    def init(self: Any, **values: Any) -> None:
        try:
            validated(self, **values)
        except ValidationError as error:
            raise UsageError(_one_line(error, values, section)) from None

    cls.__init__ = init


for _cls in (*SECTIONS.values(), Config):
    _raises_usage_error(_cls)


def config_of(sections: Mapping[str, Any]) -> Config:
    """The configuration of plain values; what is left out has its default. Raises UsageError, in one line, for an
    unknown key, a wrong type, a value out of range or an impossible combination."""
    _check_keys(sections)
    return Config(**{name: SECTIONS[name](**values) for name, values in sections.items()})


def _check_keys(sections: Mapping[Any, Any]) -> None:
    """Raise UsageError for the first section or key that does not exist."""
    for name, values in sections.items():
        if name not in SECTIONS:
            raise unknown(f"{name}.{next(iter(values))}" if isinstance(values, Mapping) and values else str(name))
        if not isinstance(values, Mapping):
            raise UsageError(f"{name} is {_shown(values)}; it must be a section of keys")
        for key in values:
            if f"{name}.{key}" not in FIELDS:
                raise unknown(f"{name}.{key}")


def load_config(path: Path) -> Config:
    """Read a configuration that `Config.save` or a person wrote. Raises UsageError where it is not one."""
    return config_of(read_yaml(path))


def read_yaml(path: Path) -> dict[str, dict[str, Any]]:
    """The sections of a YAML file, as they stand there. Raises UsageError where it is not made of sections."""
    try:
        if path.exists() and not path.is_file():
            raise UsageError(f"--config {path} is no file")
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"--config {path}: {in_short(error).lower()}") from None
    if len(content) > MAX_FILE_BYTES:
        raise UsageError(f"--config {path} is larger than {MAX_FILE_BYTES} bytes: it is no configuration")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"--config {path} is not YAML: {in_short(error)}") from None
    return _parse_yaml(text, str(path))


@functools.cache
def json_schema() -> dict[str, Any]:
    """The JSON schema of a configuration's file, for editors."""
    return TypeAdapter(Config).json_schema()


def types_of(key: str) -> dict[str, list[str]]:
    """The JSON types that a field "section.name" takes, each with the words that it is limited to, if any."""
    definitions = json_schema()["$defs"]
    section, name = key.split(".")
    entry = definitions[SECTIONS[section].__name__]["properties"][name]
    return {option.get("type", "string"): option.get("enum", []) for option in entry.get("anyOf", [entry])}


def unknown(key: str, known: list[str] | None = None) -> UsageError:
    """What to say of a key that does not exist, with the nearest that does."""
    near = difflib.get_close_matches(key, known or FIELDS, n=1, cutoff=0.4)
    return UsageError(f"unknown key {key}" + (f": did you mean {near[0]}?" if near else "; --help lists them all"))


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


# --- YAML -------------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Plain values as in YAML 1.2: 1e-4 is a number, no is a word. A key that stands twice is an error."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [getattr(key, "value", None) for key, _ in node.value]
        if len(set(map(str, keys))) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise UsageError(f"has the key {twice} twice")
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML would not read as a text."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: list(rules) for first, rules in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }


for _tag, _pattern, _first in (
    ("null", r"null|~|", ["n", "~", ""]),
    ("bool", r"true|false", ["t", "f"]),
    ("int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
              r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
     list("-+0123456789.")),
):  # fmt: skip
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)
_Dumper.add_representer(tuple, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, True))
_Dumper.add_representer(
    str,  # a file's name may be any bytes
    lambda dumper, text: (
        dumper.represent_str(text) if text.isprintable() else dumper.represent_binary(os.fsencode(text))
    ),
)


def parse_value(text: str) -> Any:
    """A value as YAML reads it. Raises UsageError where it cannot be read."""
    try:
        return yaml.load(text, _Loader)
    except Exception as error:  # YAML's constructors raise whatever an odd tag or number gives
        raise UsageError(f"a value cannot be read: {in_short(error)}") from None


def _parse_yaml(text: str, path: str) -> dict[str, dict[str, Any]]:
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, _Loader)):
            raise UsageError("uses an alias (*name): write the value out")
        content = yaml.load(text, _Loader)
    except UsageError as error:
        raise UsageError(f"--config {path} {error}") from None
    except Exception as error:  # YAML's constructors raise whatever an odd tag or number gives
        raise UsageError(f"--config {path} is not YAML: {in_short(error)}") from None
    if not isinstance(content, dict) or not all(isinstance(content.get(name, {}), dict) for name in SECTIONS):
        raise UsageError(
            f"--config {path} must be made of sections ({', '.join(SECTIONS)}) of keys, as configs/digits.yaml is"
        )
    _check_keys(content)
    return content


# --- messages ---------------------------------------------------------------------------------------------------------


def _one_line(error: ValidationError, values: Mapping[str, Any], section: str) -> str:
    """The first thing that is wrong with a section's values: its key, the value, and what would be right."""
    first = error.errors(include_url=False)[0]
    name, kind = str(first["loc"][0]) if first["loc"] else "", first["type"]
    key = f"{section}.{name}" if section else name
    if kind == "value_error":
        said = str(first["ctx"]["error"])
        return f"{key} {said}" if name else said
    if key not in FIELDS:
        return str(unknown(key)) if section else f"{key} must be a section of keys"
    value = values[name]
    ctx, types = first.get("ctx", {}), types_of(key)
    limits = {"greater_than_equal": ("at least", "ge"), "greater_than": ("above", "gt"),
              "less_than_equal": ("at most", "le"), "less_than": ("below", "lt")}  # fmt: skip
    options = next((words for words in types.values() if words), [])
    names = {"integer": "int", "number": "float", "boolean": "bool", "string": "str", "array": "list"}
    if kind in limits:
        right = f"{limits[kind][0]} {ctx[limits[kind][1]]:g}"
    elif kind == "finite_number":
        right = "a finite number"
    elif options:
        near = difflib.get_close_matches(str(value), options, n=1)
        right = f"one of {', '.join(options)}" + (f" (did you mean {near[0]}?)" if near else "")
    elif "array" in types and isinstance(value, int | float):
        right = f"a list: [{_shown(value)}]"
    else:
        right = "of type " + " or ".join(names.get(name, name) for name in types)
    return f"{key} is {_shown(value)}; it must be {right}"


def _shown(value: Any) -> str:
    if value == "" or value is None:
        return "empty" if value == "" else "null"
    plain = isinstance(value, str | float)
    text = str(value) if plain else json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
