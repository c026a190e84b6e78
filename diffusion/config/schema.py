"""Typed configuration: the schema, with each range beside its field.

`Config()` is the digits run. The docstring under a field is what `train.py --help` prints. The sections `data` and
`model` are those of a source (`diffusion.data.sources`) and of a network (`diffusion.models.networks`).
"""

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import field
from itertools import chain
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, Union

from pydantic import Field
from torch import nn

from diffusion.config import fields
from diffusion.config.fields import Finite, Natural, PathText, Positive, Section, section, shown
from diffusion.data.base import DataConfig
from diffusion.data.sources import SOURCES
from diffusion.ema import EMA
from diffusion.errors import UsageError, check_name, did_you_mean, options_of, prefixed
from diffusion.losses import LOSSES, WEIGHTINGS
from diffusion.models.base import ModelConfig
from diffusion.models.networks import NETWORKS
from diffusion.optimizers import LR_SCHEDULES, OPTIMIZERS
from diffusion.process import PREDICTIONS, GaussianDiffusion, VarianceType
from diffusion.samplers import SAMPLERS, check_process, noise_between, usual_steps
from diffusion.schedule import SCHEDULES, Respacing, Schedule
from diffusion.timesteps import TIMESTEP_SAMPLERS


@section("diffusion")
class DiffusionConfig(Section):
    """The diffusion process and the loss."""

    choices: ClassVar = dict(schedule=SCHEDULES, prediction=PREDICTIONS, loss=LOSSES, weighting=WEIGHTINGS)

    steps: Annotated[int, Field(ge=1, le=100_000)] = 1000
    """T, the number of steps"""
    schedule: str = "cosine"
    """noise schedule: linear and cosine are diffusions; flow (the straight path) and gvp are paths of flow matching,
    with variance fixed_small, which they do not use"""
    zero_terminal_snr: bool = False
    """rescale the schedule so that its last step is pure noise, for prediction v or x_start"""
    respacing: int | str = ""
    """train on some of the steps only: a count, sections like 10,15,20, or ddim50; empty: all"""
    prediction: str = "v"
    """output of the network: v and the schedules below train fastest; the paper predicts epsilon, flow matching
    velocity"""
    variance: VarianceType = "learned_range"
    """variance of the reverse process"""
    loss: str = "rescaled_mse"
    """mse and rescaled_mse: the simple loss, hybrid if the variance is learned; kl: the variational bound; consistency:
    for a finished run (train.init_from), to draw in 1, 2 or 4 evaluations"""
    weighting: str = "none"
    """weights of the simple loss by timestep; min_snr: min(signal-to-noise ratio, gamma) in terms of x_0"""
    rescale_timesteps: bool = True
    """give the network the timestep on a scale of 0 to 1000 for any T; of a flow, else from 0 (noise) to 1 (data)"""
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if "kl" in self.loss:
            self.process().check_diffusion(f"loss {self.loss}")
        self.process()
        if self.weighting != "none" and "mse" not in self.loss:
            right = f"which is for mse losses, not for {self.loss}: set it to none"
            raise UsageError(f"diffusion.weighting is {self.weighting}, {right}")
        if self.loss == "consistency" and (self.prediction == "previous_x" or self.respacing != ""):
            raise UsageError("diffusion.loss is consistency, which takes no prediction previous_x and no respacing")

    def process(self, respacing: Respacing = "") -> GaussianDiffusion:
        """The process, with `respacing` in place of the training's if given. Raises UsageError if it is impossible."""
        kept = self.respacing if respacing == "" else respacing
        kept = kept if isinstance(kept, str | int) else tuple(kept)
        options = tuple((name, self.options[name]) for name in options_of(SCHEDULES[self.schedule]))
        schedule = self.schedule, self.steps, kept, self.zero_terminal_snr
        return _process(schedule, options, (self.prediction, self.variance, self.rescale_timesteps))


@functools.lru_cache(32)
def _process(schedule: Any, options: Any, meaning: Any) -> GaussianDiffusion:
    """A process, built once: settings are validated by building it."""
    return GaussianDiffusion(Schedule.named(*schedule, **dict(options)), *meaning)


@section("train")
class TrainConfig(Section):
    """The training run."""

    choices: ClassVar = {"optimizer": OPTIMIZERS, "lr_schedule": LR_SCHEDULES, "timestep_sampler": TIMESTEP_SAMPLERS}

    steps: Positive = 750
    """optimizer steps"""
    batch_size: Positive = 64
    """images in an optimizer step, over all processes and accumulation"""
    gradient_accumulation: Positive | None = None
    """micro-batches per process and step, to fit in memory; null: the launcher's setting, or 1"""
    optimizer: str = "muon"
    """adamw; or muon: orthogonalised momentum for hidden matrices and convolutions, adamw for the rest"""
    lr: Annotated[Finite, Field(gt=0)] = 5e-3
    """learning rate, after warm-up"""
    lr_base_width: Positive | None = None
    """model_channels (unet) or hidden_size (dit) of the smaller network on which lr was found: weights with n times the
    inputs of that network's learn at lr / n (muP), biases and the first layer at lr; null: all at lr"""
    lr_schedule: str = "wsd"
    """after the warm-up: constant; half a cosine to 0 at the last step; or constant, then linearly to 0 over the last
    decay_share of the steps (wsd: warm-up, stable, decay)"""
    warmup_steps: Natural = 30
    """optimizer steps of linear warm-up"""
    scalar_lr_factor: Annotated[Finite, Field(ge=0)] = 1.0
    """factor of the learning rate for Fixup's scalars (0.1 in its paper)"""
    grad_clip: Annotated[float, Field(gt=0)] | None = None
    """largest norm of the gradient; null: the launcher's setting, or no clipping"""
    max_skipped: Positive = 20
    """stop after this many steps in a row with a non-finite loss or gradient, each of which is skipped and counted"""
    precision: Literal["no", "bf16", "fp16", "auto"] | None = None
    """mixed precision; auto: bf16 on devices that multiply it, else no; null: the launcher's setting, or no"""
    compile: bool = False
    """compile the network: faster steps, after half a minute or more at the start"""
    ema_rates: Annotated[tuple[float, ...], Field(strict=False)] = (0.999,)
    """moving averages of the weights to keep; images are sampled with the first"""
    ema_lengths: Annotated[tuple[float, ...], Field(strict=False)] = ()
    """power-function averages to keep, by their length relative to the run, usually [0.05, 0.1]: from those in the
    checkpoints, sample.py --ema length0.07 reconstructs any other length"""
    ema_warmup: bool = True
    """start the averages at a low rate, (1 + step) / (10 + step), so that short runs forget the initial weights"""
    timestep_sampler: str = "uniform"
    """timesteps to train on: uniform, by importance (for the kl losses), or logit_normal: often from the middle (for
    flows)"""
    label_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """share of images trained on without their class and other conditions, for guidance in sampling (usually 0.1)"""
    init_from: PathText | None = None
    """start from the weights (the first average) of this run, checkpoint or converted model; what fits is copied"""
    seed: Natural = 0
    """seed of all randomness"""
    log_every: Positive = 50
    """steps between lines of metrics.jsonl"""
    log_with: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """trackers that metrics and grids are also sent to: tensorboard, wandb, ... (all that accelerate knows)"""
    options: dict[str, Any] = field(default_factory=dict)

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
class SampleConfig(Section):
    """The grids sampled during training, and the defaults of sample.py."""

    choices: ClassVar = {"sampler": {name: sampler.run for name, sampler in SAMPLERS.items()}}

    every: Natural = 250
    """optimizer steps between grids; 0: only after the last step"""
    n: Annotated[int, Field(ge=1, le=10_000)] = 100
    """images in a grid"""
    sampler: str = "dpmpp"
    """sampler: dpmpp, ipndm and heun need few steps; ddpm and ddim are the paper's"""
    steps: int | str | Annotated[tuple[int, ...], Field(strict=False)] | None = None
    """steps of the sampler: a count, sections like 10,15,20, ddim50, logsnr10, karras10, or a list; empty: all;
    null: the sampler's usual ones (ddpm 250, ddim 50, dpmpp and ipndm logsnr12, heun logsnr10)"""
    guidance: Annotated[Finite, Field(ge=0, le=1000)] = 1.0
    """classifier-free guidance, for runs with train.label_dropout: 1 none, above 1 clearer classes and less variety"""
    guide_between: Annotated[tuple[Finite, Finite], Field(strict=False)] | None = None
    """noise levels sigma / alpha that are guided, such as [0.3, 5]; null: all"""
    options: dict[str, Any] = field(default_factory=dict)


@section("checkpoint")
class CheckpointConfig(Section):
    """Checkpoints."""

    every: Natural = 250
    """optimizer steps between checkpoints; 0: only after the last step"""
    keep_last: Natural = 0
    """number of checkpoints to keep; 0: all"""
    keep_every: Natural = 0
    """also keep the checkpoints of every so many steps; 0: none"""


def _any_of(components: Mapping[str, Any], chooser: str) -> Any:
    """The type of a section that is one of several classes."""
    return Annotated[Union[tuple(components.values())], Field(discriminator=chooser)]  # noqa: UP007


if TYPE_CHECKING:
    _Data = DataConfig
    _Model = ModelConfig
else:
    _Data, _Model = _any_of(SOURCES, "source"), _any_of(NETWORKS, "network")


@section("")
class Config:
    """A whole run."""

    data: _Data = field(default_factory=SOURCES["digits"])
    model: _Model = field(default_factory=NETWORKS["unet"])
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        if self.data.image_size is not None:
            with prefixed("data.image_"):
                self.model.check_sizes(self.data.sizes)
        factor = self.train.scalar_lr_factor
        if factor != 1 and getattr(self.model, "init", None) != "fixup":
            raise UsageError(f"train.scalar_lr_factor is {factor}, but only model.init fixup has scalars")
        if self.train.lr_base_width is not None:
            with prefixed(f"train.lr_base_width {self.train.lr_base_width} is of no such network: "):
                self.model.at_width(self.train.lr_base_width)
        if self.data.unbounded and self.sample.options["clip_denoised"]:
            both = "sample.clip_denoised is true, and data.unbounded too"
            raise UsageError(f"{both}, whose values it cuts: set it to false")
        sampler, loss = self.sample.sampler, self.diffusion.loss
        if self.is_consistency_model != (sampler == "consistency"):
            right = "the sampler consistency goes with the loss consistency, and no other with it"
            raise UsageError(f"sample.sampler is {sampler}, and diffusion.loss {loss}: {right}")
        if self.is_consistency_model and self.train.init_from is None:
            right = "which trains a finished run further: name it in train.init_from"
            raise UsageError(f"diffusion.loss is consistency, {right}")
        with prefixed("sample.steps: "):
            check_process(self.sample.sampler, self.sample.options, self.sampling_process())
        if self.sample.guide_between is not None:
            with prefixed("sample."):
                noise_between(self.sampling_process(), *self.sample.guide_between)

    @property
    def is_consistency_model(self) -> bool:
        """Whether the network predicts the end of a path instead of a mean: it has no likelihood, and a sampler of its
        own."""
        return self.diffusion.loss == "consistency"

    def resolved(self) -> Self:
        """This configuration with the size of the first image of the data, if `data.image_size` is null."""
        if self.data.image_size is not None:
            return self
        return dataclasses.replace(self, data=dataclasses.replace(self.data, image_size=self.data.found_sizes()))

    def sections(self) -> dict[str, dict[str, Any]]:
        """Every setting, as plain values by section and name."""
        return {f.name: fields.settings_of(getattr(self, f.name)) for f in dataclasses.fields(self)}

    def flat(self) -> dict[str, Any]:
        """Every setting by "section.name"."""
        return {f"{name}.{key}": value for name, values in self.sections().items() for key, value in values.items()}

    def sample_steps(self) -> Respacing:
        """The steps of the section `sample`: its own, or the sampler's usual ones."""
        steps, sampler = self.sample.steps, self.sample.sampler
        steps = usual_steps(sampler, self.diffusion.steps) if steps is None else steps
        placed = SAMPLERS[sampler].placed
        return f"{placed}{steps}" if placed and str(steps).isdecimal() else steps

    def sampling_process(self) -> GaussianDiffusion:
        """The process with the steps of the section `sample`."""
        return self.diffusion.process(self.sample_steps())

    def network(self, num_classes: int, vector_size: int = 0) -> nn.Module:
        """The network with fresh weights, for data of `num_classes` classes and condition vectors of `vector_size`
        numbers (0: none)."""
        if self.model.class_cond and not num_classes:
            raise UsageError("model.class_cond is true, and there are no classes: set it to false")
        outputs = self.data.channels * (2 if self.diffusion.variance in ("learned", "learned_range") else 1)
        channels = sum(shape[0] for shape in self.data.condition_shapes.values())
        conditions = dict(num_classes=num_classes if self.model.class_cond else 0, vector_size=vector_size)
        return self.model.build(self.data.shape, outputs, **conditions, image_channels=channels)


SECTIONS: dict[str, Any] = {f.name: f.default_factory for f in dataclasses.fields(Config)}
"""The class of each section; of data and model, the default one."""
UNIONS: dict[str, tuple[str, Mapping[str, Any]]] = {"data": ("source", SOURCES), "model": ("network", NETWORKS)}
"""Sections that are one of several classes: the field that chooses, and the classes."""


@dataclasses.dataclass
class Setting:
    """A setting in the help: the text and the default of each owner, its words, if it is limited to some, and its JSON
    types."""

    texts: dict[str, list[str]] = field(default_factory=dict)
    defaults: dict[str, None] = field(default_factory=dict)
    words: dict[str, None] = field(default_factory=dict)
    types: set[str] = field(default_factory=set)


@functools.cache
def all_settings() -> dict[str, Setting]:
    """Every setting that a run can have, by "section.name"."""
    settings: dict[str, Setting] = {}
    for section_name, usual in SECTIONS.items():
        _, classes = UNIONS.get(section_name, ("", {"": usual}))
        for owner, cls in classes.items():
            for name, text, default, types in fields.described(cls):
                setting = settings.setdefault(f"{section_name}.{name}", Setting())
                setting.texts.setdefault(text, []).append(owner)
                setting.defaults[shown(default)] = None
                setting.types |= set(types)
                setting.words |= dict.fromkeys(chain(*types.values()))
    return settings


def config_of(sections: Mapping[str, Any]) -> Config:
    """The configuration of plain values; what is left out has its default. Raises UsageError, in one line, for an
    unknown key, a wrong type, a value out of range or an impossible combination."""
    check_keys(sections)
    return Config(**{name: _section_class(name, values)(**values) for name, values in sections.items()})


def _section_class(name: str, values: Mapping[str, Any]) -> Any:
    """The class of a section with these values. Raises UsageError for a field of another one."""
    if name not in UNIONS:
        return SECTIONS[name]
    chooser, classes = UNIONS[name]
    chosen = values.get(chooser, getattr(SECTIONS[name], chooser))
    check_name(f"{name}.{chooser}", shown(chosen), classes)
    for key in values:
        owners = [other for other, cls in classes.items() if fields.has_field(cls, key)]
        if chosen not in owners:
            raise UsageError(f"{name}.{key} belongs to {chooser} {', '.join(owners)}, and {name}.{chooser} is {chosen}")
    return classes[chosen]


def shared_fields(settings: Any, other: Any) -> dict[str, Any]:
    """The values of those fields of a section that mean the same in another class of it."""
    texts, others = fields.help_texts(settings.__class__), fields.help_texts(other)
    choosers = {chooser for chooser, _ in UNIONS.values()}
    same = {name for name, text in texts.items() if others.get(name) == text and fields.has_field(other, name)}
    return {name: value for name, value in fields.settings_of(settings).items() if name in same - choosers}


def override(base: dict[str, dict[str, Any]], sections: Mapping[str, Mapping[str, Any]]) -> None:
    """Override values of `base` in place. Where another component is chosen, settings that mean the same in both stay,
    and those of the former one are dropped."""
    for name, values in sections.items():
        before = base.get(name, {})
        for chooser, components in [UNIONS[name]] if name in UNIONS else SECTIONS[name].choices.items():
            usual = None if name in UNIONS else getattr(SECTIONS[name], chooser)
            old, new = str(before.get(chooser, usual)), str(values.get(chooser))
            if old == new or not {old, new} <= components.keys():
                continue
            if name in UNIONS:
                before = shared_fields(components[old](**before), components[new])
            else:
                dropped = options_of(components[old]).keys() - options_of(components[new]).keys()
                before = {key: value for key, value in before.items() if key not in dropped}
        base[name] = {**before, **values}


def check_keys(sections: Mapping[Any, Any]) -> None:
    """Raise UsageError for the first section or key that does not exist."""
    for name, values in sections.items():
        if name in all_settings():
            raise UsageError(f"{name} is to be in a section: write {{{str(name).replace('.', ': {')}: ...}}}}")
        if name not in SECTIONS:
            raise unknown(f"{name}.{next(iter(values))}" if values and isinstance(values, Mapping) else str(name))
        if not isinstance(values, Mapping):
            raise UsageError(f"{name} is {shown(values)}; it must be a section of keys")
        for key in values:
            if f"{name}.{key}" not in all_settings():
                raise unknown(f"{name}.{key}")


def by_section(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Settings that are named "section.name", by section. Raises UsageError for a name without a section."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in settings.items():
        section, _, name = key.partition(".")
        if not name:
            raise unknown(key)
        sections.setdefault(section, {})[name] = value
    return sections


def unknown(key: str, known: list[str] | None = None) -> UsageError:
    """What to say of a key that does not exist, with the nearest that does."""
    hint = did_you_mean(key, known or all_settings(), "--help lists them all", cutoff=0.4)
    return UsageError(f"unknown key {key}: {hint}")
