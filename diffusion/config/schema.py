"""Typed configuration: the schema, with each range beside its field.

`Config()` is the digits run. The docstring under a field is what `train.py --help` prints. The sections of
`data` are in `diffusion.data.sources`, one per source. `diffusion.config.files` reads and writes YAML.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import field
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from pydantic import Field
from torch import nn

from diffusion.config.fields import Finite, Natural, PathText, Positive, describe, has_field, section, shown
from diffusion.data.base import DataConfig
from diffusion.data.sources import SOURCES
from diffusion.ema import EMA
from diffusion.errors import UsageError, check_name, prefixed
from diffusion.losses import LossType, Weighting
from diffusion.models.initialisation import InitName, check_init, initialise
from diffusion.models.rules import check_sizes, check_widths
from diffusion.models.unet import SuperResModel, UNetModel
from diffusion.process import PREDICTIONS, GaussianDiffusion, VarianceType
from diffusion.samplers import SAMPLERS, check_options, check_process, usual_steps
from diffusion.schedule import Schedule, ScheduleName
from diffusion.timesteps import TimestepSamplerName


@section("model")
class ModelConfig:
    """The U-Net."""

    model_channels: Annotated[int, Field(ge=32, le=8192)] = 32
    """base width, a multiple of 32"""
    num_res_blocks: Annotated[int, Field(ge=1, le=1000)] = 1
    """residual blocks at each level"""
    channel_mult: Annotated[tuple[int | Finite, ...], Field(strict=False)] = (1, 1)
    """width of each level in multiples of the base; each level after the first halves the size"""
    attention_resolutions: Annotated[tuple[int, ...], Field(strict=False)] = ()
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
    """condition on the data's classes (of a folder, its subfolders)"""
    init: InitName = "zero"
    """initial weights: zero (the paper), fixup (for networks without normalisation), default (no layer is zero), small
    (1e-5 in place of zero)"""
    use_norm: bool = True
    """normalise in groups"""

    def __post_init__(self) -> None:
        with prefixed("model."):
            check_widths(self.model_channels, self.channel_mult, self.attention_resolutions, self.num_heads,
                         self.num_heads_upsample, self.num_head_channels)  # fmt: skip
            check_init(self.init, self.use_norm)


@section("diffusion")
class DiffusionConfig:
    """The diffusion process and the loss."""

    steps: Annotated[int, Field(ge=1, le=100_000)] = 1000
    """T, the number of steps"""
    schedule: ScheduleName = "cosine"
    """noise schedule"""
    zero_terminal_snr: bool = False
    """rescale the schedule so that its last step is pure noise, for prediction v or x_start"""
    respacing: int | str = ""
    """train on some of the steps only: a count, sections like 10,15,20, or ddim50; empty: all"""
    prediction: Literal[tuple(PREDICTIONS)] = "v"  # type: ignore[valid-type]
    """output of the network: v and the schedules below train fastest; the paper predicts epsilon"""
    variance: VarianceType = "learned_range"
    """variance of the reverse process"""
    loss: LossType = "rescaled_mse"
    """mse and rescaled_mse: the simple loss, hybrid if the variance is learned; kl: the variational bound"""
    weighting: Weighting = "none"
    """min_snr: weight the simple loss by min(signal-to-noise ratio, 5) in terms of x_0"""
    rescale_timesteps: bool = True
    """give the network the timestep on a scale of 0 to 1000 for any T"""

    def __post_init__(self) -> None:
        self.process()
        if self.weighting != "none" and "mse" not in self.loss:
            raise UsageError(
                f"diffusion.weighting {self.weighting} is for mse losses, and diffusion.loss is {self.loss}"
            )

    def process(self, respacing: int | str = "") -> GaussianDiffusion:
        """The process, with `respacing` in place of the training's if given. Raises UsageError if it is impossible."""
        schedule = Schedule.named(self.schedule, self.steps, str(respacing or self.respacing), self.zero_terminal_snr)
        return GaussianDiffusion(schedule, self.prediction, self.variance, self.rescale_timesteps)


@section("train")
class TrainConfig:
    """The training run."""

    steps: Positive = 750
    """optimizer steps"""
    batch_size: Positive = 64
    """images in an optimizer step, over all processes and accumulation"""
    gradient_accumulation: Positive | None = None
    """micro-batches per process and step, to fit in memory; null: the launcher's setting, or 1"""
    optimizer: Literal["adamw", "muon"] = "muon"
    """adamw; or muon: orthogonalised momentum for hidden matrices and convolutions, adamw for the rest"""
    lr: Annotated[Finite, Field(gt=0)] = 5e-3
    """learning rate, after warm-up"""
    lr_schedule: Literal["constant", "cosine", "wsd"] = "wsd"
    """after the warm-up: constant; half a cosine to 0 at the last step; or constant, then linearly to 0 over the last
    40% of the steps (wsd: warm-up, stable, decay)"""
    warmup_steps: Natural = 30
    """optimizer steps of linear warm-up"""
    scalar_lr_factor: Annotated[Finite, Field(ge=0)] = 1.0
    """factor of the learning rate for Fixup's scalars (0.1 in its paper)"""
    weight_decay: Annotated[Finite, Field(ge=0)] = 0.0
    """decoupled weight decay"""
    grad_clip: Annotated[float, Field(gt=0)] | None = None
    """largest norm of the gradient; null: the launcher's setting, or no clipping"""
    max_skipped: Positive = 20
    """stop after this many steps in a row with a non-finite loss or gradient, each of which is skipped and counted"""
    precision: Literal["no", "bf16", "fp16"] | None = None
    """mixed precision; null: the launcher's setting, or no"""
    compile: bool = False
    """compile the network: faster steps, after half a minute or more at the start"""
    ema_rates: Annotated[tuple[float, ...], Field(strict=False)] = (0.999,)
    """moving averages of the weights to keep; images are sampled with the first"""
    ema_lengths: Annotated[tuple[float, ...], Field(strict=False)] = ()
    """power-function averages to keep, by their length relative to the run, usually [0.05, 0.1]: from those in the
    checkpoints, sample.py --ema length0.07 reconstructs any other length"""
    ema_warmup: bool = True
    """start the averages at a low rate, (1 + step) / (10 + step), so that short runs forget the initial weights"""
    timestep_sampler: TimestepSamplerName = "uniform"
    """timesteps to train on: uniform, or by importance (for the kl losses)"""
    label_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """share of images trained on without their class, for guidance in sampling (usually 0.1)"""
    init_from: PathText | None = None
    """start from the weights (the first average) of this run, checkpoint or converted model; what fits is copied"""
    seed: Natural = 0
    """seed of all randomness"""
    log_every: Positive = 50
    """steps between lines of metrics.jsonl"""
    log_with: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """trackers that metrics and grids are also sent to: tensorboard, wandb, ... (all that accelerate knows)"""

    def __post_init__(self) -> None:
        batch, parts = self.batch_size, self.gradient_accumulation or 1
        if batch % parts:
            raise UsageError(f"train.gradient_accumulation {parts} does not divide train.batch_size {batch}")
        with prefixed("train.ema_"):
            EMA(nn.Module(), self.ema_rates, lengths=self.ema_lengths)
        if not self.averages:
            raise UsageError("train.ema_rates is [], and train.ema_lengths too: one of them must have an average")

    @property
    def averages(self) -> tuple[float | str, ...]:
        """The moving averages, by rate, or by "length" and the length; images are sampled with the first."""
        return *self.ema_rates, *(f"length{length}" for length in self.ema_lengths)


@section("sample")
class SampleConfig:
    """The grids sampled during training, and the defaults of sample.py."""

    every: Natural = 250
    """optimizer steps between grids; 0: only after the last step"""
    n: Annotated[int, Field(ge=1, le=10_000)] = 100
    """images in a grid"""
    sampler: Literal[tuple(SAMPLERS)] = "dpmpp"  # type: ignore[valid-type]
    """sampler: dpmpp, ipndm and heun need few steps; ddpm and ddim are the paper's"""
    options: dict[str, Any] = field(default_factory=dict)
    """options of the sampler"""
    steps: int | str | Annotated[tuple[int, ...], Field(strict=False)] | None = None
    """steps of the sampler: a count, sections like 10,15,20, ddim50, logsnr10, karras10, or a list; empty: all;
    null: the sampler's usual ones (ddpm 250, ddim 50, dpmpp and ipndm logsnr12, heun logsnr10)"""
    guidance: Annotated[Finite, Field(ge=0, le=1000)] = 1.0
    """classifier-free guidance, for runs with train.label_dropout: 1 none, above 1 clearer classes and less variety"""

    def __post_init__(self) -> None:
        with prefixed("sample.options."):
            check_options(self.sampler, self.options)


@section("checkpoint")
class CheckpointConfig:
    """Checkpoints."""

    every: Natural = 250
    """optimizer steps between checkpoints; 0: only after the last step"""
    keep_last: Natural = 0
    """number of checkpoints to keep; 0: all"""
    keep_every: Natural = 0
    """also keep the checkpoints of every so many steps; 0: none"""
    on_error: Literal["stop", "continue"] = "stop"
    """if a checkpoint or grid cannot be written, e.g. on a full disk; earlier ones are kept either way"""


if TYPE_CHECKING:
    _Data = DataConfig
else:
    _Data = Annotated[Union[tuple(SOURCES.values())], Field(discriminator="source")]  # noqa: UP007


@section("")
class Config:
    """A whole run."""

    data: _Data = field(default_factory=SOURCES["digits"])
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        if self.data.image_size is not None:
            with prefixed("data.image_"):
                check_sizes(self.data.sizes, len(self.model.channel_mult))
        if self.train.label_dropout and not self.model.class_cond:
            share = self.train.label_dropout
            raise UsageError(f"train.label_dropout is {share}, but model.class_cond is false: no class to drop")
        if self.train.scalar_lr_factor != 1 and self.model.init != "fixup":
            factor = self.train.scalar_lr_factor
            raise UsageError(f"train.scalar_lr_factor is {factor}, but only model.init fixup has scalars")
        if self.sample.guidance != 1 and not self.train.label_dropout:
            guidance = self.sample.guidance
            raise UsageError(f"sample.guidance is {guidance}; without train.label_dropout, it can only be 1")
        with prefixed("sample.steps: "):
            check_process(self.sample.sampler, self.sample.options, self.sampling_process())

    def resolved(self) -> Config:
        """This configuration with the size of the first image of the data, if `data.image_size` is null."""
        if self.data.image_size is not None:
            return self
        found = list(self.data.found_sizes())
        return dataclasses.replace(self, data=dataclasses.replace(self.data, image_size=found))

    def flat(self) -> dict[str, Any]:
        """Every setting by "section.name"."""
        sections = dataclasses.asdict(self).items()
        return {f"{section}.{name}": value for section, values in sections for name, value in values.items()}

    def sample_steps(self) -> str:
        """The steps of the section `sample`, as a respacing string: its own, or the sampler's usual ones."""
        steps = self.sample.steps
        if steps is None:
            return usual_steps(self.sample.sampler, self.diffusion.steps)
        return str(steps if isinstance(steps, int | str) else list(steps))

    def sampling_process(self) -> GaussianDiffusion:
        """The process with the steps of the section `sample`."""
        return self.diffusion.process(self.sample_steps())

    def network(self, num_classes: int) -> UNetModel:
        """The network with fresh weights, for data of `num_classes` classes (0: none)."""
        options = dataclasses.asdict(self.model)
        class_cond, init = options.pop("class_cond"), options.pop("init")
        if class_cond and not num_classes:
            raise UsageError("model.class_cond is true, and there are no classes: set it to false")
        outputs = 2 if self.diffusion.variance in ("learned", "learned_range") else 1
        kind = UNetModel if self.data.low_res_size is None else SuperResModel
        channels, dims, classes = self.data.channels, len(self.data.shape) - 1, num_classes if class_cond else None
        network = kind(channels, out_channels=outputs * channels, num_classes=classes, dims=dims, **options)
        initialise(network, init)
        return network


SECTIONS: dict[str, Any] = {f.name: f.default_factory for f in dataclasses.fields(Config)}
"""The class of each section; of data, that of the default source."""
CLASSES: dict[str, list[Any]] = {name: [kind] for name, kind in SECTIONS.items()} | {"data": list(SOURCES.values())}
"""Every class of each section."""
FIELDS = list(
    {f"{name}.{f.name}": None for name, kinds in CLASSES.items() for kind in kinds for f in dataclasses.fields(kind)}
)


def config_of(sections: Mapping[str, Any]) -> Config:
    """The configuration of plain values; what is left out has its default. Raises UsageError, in one line, for an
    unknown key, a wrong type, a value out of range or an impossible combination."""
    check_keys(sections)
    return Config(**{name: _section_class(name, values)(**values) for name, values in sections.items()})


def _section_class(name: str, values: Mapping[str, Any]) -> Any:
    """The class of a section with these values. Raises UsageError for a field of another source."""
    if name != "data":
        return SECTIONS[name]
    source = values.get("source", "digits")
    check_name("data.source", source if isinstance(source, str) else shown(source), SOURCES)
    for key in values:
        having = [other for other, cls in SOURCES.items() if has_field(cls, key)]
        if source not in having:
            owners = f"source{'s' * (len(having) > 1)} {', '.join(having)}"
            hint = f"add --data.source {'folder' if 'folder' in having else having[0]}, or a --config that has it"
            raise UsageError(f"data.{key} belongs to the {owners}, and data.source is {source}: {hint}")
    return SOURCES[source]


def shared_fields(data: DataConfig, other: type[DataConfig]) -> dict[str, Any]:
    """The values of those fields of a source that mean the same in another one."""
    names = [f.name for f in dataclasses.fields(data) if f.name != "source" and has_field(other, f.name)]
    return {name: getattr(data, name) for name in names if describe(type(data), name)[0] == describe(other, name)[0]}


def override(base: dict[str, dict[str, Any]], sections: Mapping[str, Mapping[str, Any]]) -> None:
    """Override values of `base` in place. With another data source, fields that mean the same in both, such as the
    image size, stay as the old one has them, and others are dropped."""
    source, before = sections.get("data", {}).get("source"), base.get("data", {})
    if isinstance(source, str) and before.get("source", source) != source:
        base["data"] = shared_fields(
            _section_class("data", before)(**before), _section_class("data", {"source": source})
        )
    for name, values in sections.items():
        base.setdefault(name, {}).update(values)


def check_keys(sections: Mapping[Any, Any]) -> None:
    """Raise UsageError for the first section or key that does not exist."""
    for name, values in sections.items():
        if name not in SECTIONS:
            raise unknown(f"{name}.{next(iter(values))}" if isinstance(values, Mapping) and values else str(name))
        if not isinstance(values, Mapping):
            raise UsageError(f"{name} is {shown(values)}; it must be a section of keys")
        for key in values:
            if f"{name}.{key}" not in FIELDS:
                raise unknown(f"{name}.{key}")


def classes_with(key: str) -> list[Any]:
    """The classes that have a field "section.name": of data, perhaps only some sources."""
    section, name = key.split(".")
    return [kind for kind in CLASSES[section] if has_field(kind, name)]


def unknown(key: str, known: list[str] | None = None) -> UsageError:
    """What to say of a key that does not exist, with the nearest that does."""
    near = difflib.get_close_matches(key, known or FIELDS, n=1, cutoff=0.4)
    return UsageError(f"unknown key {key}" + (f": did you mean {near[0]}?" if near else "; --help lists them all"))
