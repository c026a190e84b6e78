"""The training run over accelerate: one process or many, exact about what each step sees."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import (
    DistributedType,
    GradientAccumulationPlugin,
    broadcast_object_list,
    gather,
    gather_object,
)
from safetensors import SafetensorError
from torch import Tensor, nn

from diffusion import checkpoint, pictures
from diffusion.config import Config, TrainConfig
from diffusion.data import Batch, batch_indices, load, micro_batches, open_dataset, shrink, to_x_start
from diffusion.ema import EMA
from diffusion.errors import Died, NotWritten, Stopped, UsageError, in_short
from diffusion.initialisation import NEVER_LEARN, scalars
from diffusion.launch import accelerate_starts, launcher, on_cpu
from diffusion.losses import Denoiser, training_losses
from diffusion.randomness import generator_for, seed_for
from diffusion.run_folder import RunFolder, append_line, check_is_run, check_out
from diffusion.samplers import batches, draw
from diffusion.sharding import cut_like, full
from diffusion.signals import CutOff, StopSignals
from diffusion.timesteps import LossSecondMoment
from diffusion.transfer import copy_weights, origin_of, plain

MAY_CHANGE = {
    "data": {"path", "workers", "may_change", "on_error"},
    "model": {"use_checkpoint"},
    "train": {"steps", "accumulation", "lr", "lr_schedule", "scalar_lr_factor", "warmup_steps", "weight_decay",
              "grad_clip", "precision", "ema_warmup", "log_every", "max_skipped"},
    "sample": {"every", "n", "sampler", "steps", "guidance"},
    "checkpoint": {"every", "keep_last", "keep_every", "on_error"},
}  # fmt: skip
"""What a continued run may set anew; anything else would make it another run."""
WAIT_SECONDS = 20
"""How long one of several processes that heard a signal waits for images, before it ends without the others."""
LOSS_SCALES = 1.0, 2.0**24
"""Bounds of fp16's loss scale. Below, gradients vanish unseen; torch lets it grow until steps are lost to it."""


class Trainer:
    """A run: made new in the folder `out`, or continued from its newest checkpoint.

    `step` counts the optimizer steps that are done. `close` lets others train in the folder; `run` does so at its end.
    `tell` hears, in the main process, of what went wrong and was got over. Raises UsageError where it cannot begin.
    """

    def __init__(self, config: Config, out: Path, tell: Callable[[str], None] = lambda message: None):
        self.config, self.out, self.tell = config, out, tell
        with accelerate_starts():
            self.accelerator = accelerator = Accelerator(
                mixed_precision=config.train.precision or "no",
                cpu=on_cpu(),
                # Else accelerate would divide gradients by what the environment says, a second time.
                gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            )
        _check_known(accelerator)
        self.parts = _parts(config.train, accelerator.process_index, accelerator.num_processes)
        self._own = torch.cat([torch.arange(part.start, part.stop) for part in self.parts]).to(accelerator.device)
        if config.train.precision == "fp16" and accelerator.device.type == "cpu":
            raise UsageError("train.precision is fp16, which needs a GPU: use bf16 or no on a CPU")
        check_out(out)
        with ExitStack() as at_an_error:
            # Locked before a checkpoint is chosen: another process may just be saving one.
            self._folder = RunFolder(out, tell) if accelerator.is_main_process else None
            at_an_error.callback(self.close)
            accelerator.wait_for_everyone()
            saved = checkpoint.open_checkpoint(out) if checkpoint.folders(out) else None
            self._prepare(saved)
            self._signals = StopSignals(accelerator.num_processes, launcher())
            if self._folder:
                damaged = [path for path, _ in saved.passed_over] if saved else []
                dropped = self._folder.begin(self.config, self.step, damaged)
                if dropped and not saved:
                    tell(
                        f"no checkpoint is left of the run in {out}, which had reached step {dropped}: it begins "
                        "again, and the metrics of before are in metrics_superseded.jsonl"
                    )
            accelerator.wait_for_everyone()
            at_an_error.pop_all()

    def _prepare(self, saved: checkpoint.Checkpoint | None) -> None:
        """Data, network, optimizer and averages, as `saved` has them. Raises UsageError where they do not fit."""
        accelerator, out = self.accelerator, self.out
        if saved:
            self.config = _same_run(saved, self.config, out)
        config = self.config
        with accelerator.main_process_first():  # one process downloads, the others find it there
            self.dataset = open_dataset(config.data)
        if len(self.dataset) < config.train.batch_size:
            raise UsageError(
                f"the data hold {len(self.dataset)} images, fewer than train.batch_size {config.train.batch_size}: "
                f"make it {len(self.dataset)} or less"
            )
        self.class_names = self.dataset.class_names if config.model.class_cond else ()
        if saved and saved.class_names != self.class_names:
            raise UsageError(
                f"the data's classes are {_names(self.class_names)}, and {_names(saved.class_names)} in {out}"
            )
        self.fingerprint = self.dataset.fingerprint()
        newest, settings = saved.path.name if saved else "none", json.dumps(dataclasses.asdict(config))
        _check_agreed(
            ("the newest checkpoint is", newest, f"--out {out} must be a folder that all machines share"),
            ("the data are", self.fingerprint, "they must be the same for all processes"),
            ("the configuration is", settings, "give all processes the same command"),
        )
        if saved and saved.data not in (None, self.fingerprint) and not config.data.may_change:
            wrong = self.dataset.left_out
            unread = f"; {len(wrong)} cannot be read, the first is {wrong[0]}" if wrong else ""
            raise UsageError(
                f"the data are not those that the run in {out} began with ({saved.data} then, {self.fingerprint} now"
                f"{unread}): continue on these with --data.may_change true, or begin another run with --out"
            )
        self.process = config.diffusion.process()
        by_importance = config.train.timesteps == "loss_second_moment"
        self.importance = LossSecondMoment(self.process.num_timesteps) if by_importance else None
        torch.manual_seed(seed_for(config.train.seed, "weights"))
        self.network = config.network(len(self.class_names))
        self.origin: dict[str, Any] | None = saved.origin if saved else None
        notes: list[str] = []
        if saved:
            weights = saved.weights()
            checkpoint.check_fits(self.network, weights, saved.path)
            self.network.load_state_dict(weights)
        elif config.train.init_from is not None:
            check_is_run(Path(config.train.init_from))
            source, weights = checkpoint.open_weights(Path(config.train.init_from))
            notes = copy_weights(self.network, weights, source, config, self.class_names)
            self.origin = origin_of(source)
        self.network.to(accelerator.device)
        optimizer = torch.optim.AdamW(
            parameter_groups(self.network, config.train.scalar_lr_factor),
            lr=config.train.lr,
            weight_decay=config.train.weight_decay,
            fused=True,
        )
        # Only `model` is wrapped (DDP, autocast); names and averages stay those of `network`, which FSDP2 shards.
        self.model, self.optimizer = accelerator.prepare(self.network, optimizer)
        self.ema = EMA(self.network, config.train.ema_rates, config.train.ema_warmup)
        self.meter = _Meter(accelerator)
        self.step = 0
        if saved:
            self._restore(saved)
            notes += self._changes(saved)
        if accelerator.is_main_process:
            self._warn(saved, notes)

    def _warn(self, saved: checkpoint.Checkpoint | None, notes: Sequence[str]) -> None:
        """Say what a person should know before the first step."""
        for _, damage in saved.passed_over if saved else ():
            self.tell(f"{damage}; it is put away as damaged_..., and that of step {self.step} is used")
        self._tell_of("of the image files left out, since they cannot be read", self.dataset.left_out)
        for note in notes:
            self.tell(note)
        if self.config.model.init in NEVER_LEARN:
            self.tell(
                f"model.init is {self.config.model.init}, a demonstration: all channels of a layer stay alike (but for "
                "dropout), and it will not learn what a network can (docs/zero-init.md)"
            )
        elif not self.config.model.use_norm and self.config.train.grad_clip is None:
            self.tell("without normalisation the first steps can throw a run far back: --train.grad_clip 1 holds them "
                      "(docs/zero-init.md)")  # fmt: skip

    @property
    def environment(self) -> dict[str, Any]:
        """What the rounding of a step depends on."""
        return {"device": self.accelerator.device.type, "processes": self.accelerator.num_processes,
                "threads": torch.get_num_threads(), "torch": torch.__version__}  # fmt: skip

    def _changes(self, saved: checkpoint.Checkpoint) -> list[str]:
        """What is not as it was when `saved` was written, although the run continues."""
        here, there = dataclasses.asdict(self.config), dataclasses.asdict(saved.config)
        settings = [f"{section}.{name} was {plain(before)} and is {plain(here[section][name])}"
                    for section, values in there.items() for name, before in values.items()
                    if before != here[section][name]]  # fmt: skip
        rounding = [f"{name} {saved.environment.get(name)} then, {now} now"
                    for name, now in self.environment.items() if saved.environment.get(name) != now]  # fmt: skip
        return [f"changed since step {saved.step}: {'; '.join(settings)}"] * bool(settings) + [
            f"the run continues with other rounding than it would have had: {'; '.join(rounding)}"
        ] * bool(rounding)

    def run(self, on_step: Callable[[int, dict[str, Any] | None], None] = lambda step, metrics: None) -> None:
        """Train to the last step. `on_step` hears each step done, and the metrics at those that log.

        Raises Stopped after a signal, when all is saved, and UsageError where the loss is not finite any more.
        """
        data, train = self.config.data, self.config.train
        images = micro_batches(self.dataset, train.batch_size, train.seed, range(self.step, train.steps), self.parts,
                               data.workers, skipped=self.meter.unreadable.extend,
                               waiting=self._check_waiting)  # fmt: skip
        with closing(self), self._signals, closing(images):
            try:
                self._run(images, on_step)
            except RuntimeError as error:  # by a signal handler of torch's, at any place
                if "DataLoader worker" not in str(error):
                    raise
                raise Died(
                    f"a process that read images ahead died ({in_short(error)}): the same command continues; if memory "
                    "is short, with fewer --data.workers"
                ) from None

    def _check_waiting(self) -> None:
        """Obey a signal although the next images are not there: what was done is saved."""
        waited = self._signals.waited()
        if waited and self.accelerator.num_processes == 1:
            self.optimizer.zero_grad()
            self.save()
            raise self._stopped()
        if waited > WAIT_SECONDS:  # the others are inside a step, and cannot save with this process
            raise Died("stopped by a signal while images were waited for: the steps since the last checkpoint are not "
                       "saved, and the same command continues from it")  # fmt: skip

    def close(self) -> None:
        """Let others go on with the run's folder."""
        if self._folder is not None:
            self._folder.close()

    def _run(self, data: Iterator[Batch], on_step: Callable[[int, dict[str, Any] | None], None]) -> None:
        train, accelerator, meter = self.config.train, self.accelerator, self.meter
        parameters = list(self.network.parameters())
        self.model.train()
        meter.start()
        for step in range(self.step, train.steps):
            lr = learning_rate(train, step)
            for group in self.optimizer.param_groups:
                group["lr"] = lr * group["factor"]
            t, weights, noise, flip, unlabelled = self._random(step)
            seen = torch.zeros_like(weights)
            for part in self.parts:
                images, y = (tensor.to(accelerator.device, non_blocking=True) for tensor in next(data))
                x_start = to_x_start(images)
                x_start = torch.where(flip[part, None, None, None], x_start.flip(-1), x_start)
                if self.config.model.dropout:
                    torch.manual_seed(seed_for(train.seed, "dropout", step, part.start))
                with nullcontext() if part == self.parts[-1] else accelerator.no_sync(self.model):
                    denoiser = self._denoiser(x_start, torch.where(unlabelled[part], -1, y))
                    loss = training_losses(
                        self.process, denoiser, x_start, t[part], noise[part], self.config.diffusion.loss
                    )["loss"]
                    accelerator.backward((loss * weights[part]).mean() / len(self.parts))
                seen[part] = loss.detach()
            meter.see(seen[self._own], t[self._own] * 4 // self.process.num_timesteps)
            if self.importance:
                self.importance.update(t, accelerator.reduce(seen))  # every process learns of the whole batch
            accelerator.unscale_gradients(self.optimizer)
            grad_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            if train.grad_clip is not None:
                torch.nn.utils.clip_grads_with_norm_(parameters, train.grad_clip, grad_norm)
            grad_norm = full(grad_norm)
            finite = torch.isfinite(grad_norm) & torch.isfinite(seen).all()
            bad = (accelerator.reduce((~finite).float()) > 0).float()  # the same for all processes, and not waited for
            if accelerator.scaler is None:  # else it finds that out by itself
                self.optimizer.optimizer.found_inf = bad
            self.optimizer.step()
            bound_loss_scale(accelerator.scaler)
            self.optimizer.zero_grad()
            if not accelerator.optimizer_step_was_skipped:
                self.ema.update(step, 1 - bad)
            meter.judge(step, bad)
            self.step = step + 1
            saves = _due(self.config.checkpoint.every, self.step, train.steps)
            logs = saves or self.step % train.log_every == 0
            metrics, not_written = None, None
            try:
                metrics = self._log(meter, grad_norm, lr) if logs else None
            except NotWritten as error:  # the disk of the checkpoints may be another
                not_written = error
            on_step(self.step, metrics)
            # Weights that may be at fault do not push out good ones.
            saves = (saves or not_written is not None) and not meter.in_a_row
            if saves:
                try:
                    with meter.paused():
                        self.save()
                except NotWritten as error:
                    raise NotWritten(f"{not_written}; {error}" if not_written else str(error)) from None
            if not_written is None and _due(self.config.sample.every, self.step, train.steps):
                try:
                    with meter.paused(), suppress(CutOff):
                        self.sample()
                except NotWritten as error:
                    not_written = error
                    if not saves:
                        self.save()
            if not_written is not None:
                raise NotWritten(f"{not_written}; {self._last_checkpoint()}")
            if self._signals.asked():
                if not saves:
                    self.save()
                raise self._stopped()

    def _stopped(self) -> Stopped:
        return self._signals.stopped(f"after step {self.step}, which is saved: the same command continues")

    @property
    def last_grid(self) -> Path:
        """Where the grid of the present step belongs."""
        return self.out / "samples" / f"step_{self.step:08d}.png"

    def sample(self) -> None:
        """Draw the grid of fixed noise with the first moving average; the weights in training stay what they are."""
        config, accelerator = self.config, self.accelerator
        share = math.ceil(config.sample.n / accelerator.num_processes)
        # Every process draws as many, so that gathering is one call; the surplus of the last is cut off.
        indices = range(accelerator.process_index * share, (accelerator.process_index + 1) * share)
        classes = len(self.class_names)
        labels = torch.tensor(indices) % classes if classes else None
        low_res = None
        if config.data.low_res_size is not None:  # the first images of the data, shrunk, are enlarged
            images, y = load(self.dataset, [i % len(self.dataset) for i in indices])
            low_res, labels = shrink(to_x_start(images), config.data.low_res_size), y if classes else None
        self.network.eval()
        with self.ema.in_place(config.train.ema_rates[0]):
            drawn = [
                draw(
                    config.sample.sampler,
                    config.diffusion.process(config.sample.steps),
                    self.network,
                    (config.data.channels, config.data.image_size, config.data.image_size),
                    batch=batch,
                    labels=None if labels is None else labels[here],
                    low_res=None if low_res is None else low_res[here],
                    guidance=config.sample.guidance,
                    seed=config.train.seed,
                    device=accelerator.device,
                    progress=self._signals.watched,
                )
                for batch, here in batches(indices, self.parts[0].stop - self.parts[0].start)
            ]
        self.network.train()
        images = gather(pictures.to_uint8(torch.cat(drawn)).to(accelerator.device))[: config.sample.n]
        columns = pictures.grid_columns(config.sample.n, classes)
        chosen = gather(labels.to(accelerator.device))[: config.sample.n].tolist() if labels is not None else None
        self._write(lambda: pictures.save_grid(images, self.last_grid, columns, chosen), self.last_grid)

    def save(self) -> None:
        """Write a checkpoint of the run as it is."""
        config, scaler = self.config.checkpoint, self.accelerator.scaler
        folder = checkpoint.checkpoint_folder(self.out, self.step)

        # What all processes have to gather, before the first one writes.
        weights = self._collected(self.network.state_dict())
        broken = [next((name for name, weight in weights.items() if not weight.isfinite().all()), None)]
        broadcast_object_list(broken)
        if broken[0]:
            raise UsageError(f"after step {self.step}, {broken[0]} is no longer finite, and nothing is saved: "
                             f"{self._again_with('a lower train.lr or with train.grad_clip')}")  # fmt: skip
        averages = {rate: self._collected(average) for rate, average in self.ema.averages.items()}
        optimizer = self.optimizer.state_dict()
        optimizer["state"] = {i: self._collected(moments) for i, moments in optimizer["state"].items()}
        training = {
            "optimizer": optimizer,
            "scaler": scaler.state_dict() if scaler else None,
            "importance": self.importance.state_dict() if self.importance else None,
            "meter": self.meter.state_dict(),
        }

        def write() -> None:
            checkpoint.save(
                folder,
                step=self.step,
                config=self.config,
                class_names=self.class_names,
                weights=weights,
                averages=averages,
                training=training,
                data=self.fingerprint,
                origin=self.origin,
                environment=self.environment,
            )
            checkpoint.prune(self.out, config.keep_last, config.keep_every)

        try:
            self._write(write, folder)
        except NotWritten as error:
            raise NotWritten(f"{error}; {self._last_checkpoint()}") from None

    def _last_checkpoint(self) -> str:
        """What is saved of the run, and how it goes on."""
        found = checkpoint.folders(self.out)
        if not found:
            return "no checkpoint was saved before, so the same command begins again"
        return f"the checkpoints up to step {checkpoint.step_of(found[0])} are whole, and the same command continues"

    def _again_with(self, what: str) -> str:
        """How a run that went astray is mended."""
        found = checkpoint.folders(self.out)
        last = f"continue from the checkpoint of step {checkpoint.step_of(found[0])}" if found else "begin again"
        return f"{last} with {what}" if found else f"no checkpoint was saved before, so {last} with {what}"

    def _collected(self, tensors: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
        """The whole tensors, in the main process's memory; nothing in the others, which have to ask too."""
        whole = ((name, full(value)) for name, value in tensors.items())
        return {name: value.cpu() for name, value in whole if self.accelerator.is_main_process}

    def _write(self, write: Callable[[], None], path: Path) -> None:
        """Let the main process write. Where it cannot, all raise NotWritten, or all go on with a message."""
        failed: list[str | None] = [None]
        if self.accelerator.is_main_process:
            try:
                write()
            except (OSError, SafetensorError, RuntimeError) as error:  # torch.save has a RuntimeError for a full disk
                failed = [f"{path} cannot be written: {in_short(error)}"]
        broadcast_object_list(failed)
        if failed[0] is not None:
            if self.config.checkpoint.on_error == "stop":
                raise NotWritten(failed[0])
            if self.accelerator.is_main_process:
                self.tell(failed[0])

    def _restore(self, saved: checkpoint.Checkpoint) -> None:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        training = saved.training(parameters)
        groups = self.optimizer.state_dict()["param_groups"]  # as configured now: the rates may be new
        state = {
            i: {name: cut_like(value, parameter) for name, value in training["optimizer"]["state"][i].items()}
            for i, parameter in enumerate(parameters)
        }
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        if self.accelerator.scaler and training["scaler"]:
            self.accelerator.scaler.load_state_dict(training["scaler"])
        if self.importance:
            self.importance.load_state_dict(training["importance"])
        for rate, average in self.ema.averages.items():
            kept = saved.ema(rate)
            checkpoint.check_fits(self.network, kept, saved.path / f"ema_{rate}.safetensors")
            for name, value in average.items():
                value.copy_(cut_like(kept[name], value))
        self.meter.load_state_dict(training["meter"])
        self.step = saved.step

    def _tell_of(self, what: str, wrong: Sequence[str]) -> None:
        """Name up to five of what went wrong, and count all."""
        if wrong:
            more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            self.tell(f"{len(wrong)} {what}: {'; '.join(wrong[:5])}{more}")

    def _random(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Timesteps, their weights, noise, flips and which images lose their class, of the whole global batch of
        `step`: the same in every process."""
        data, device = self.config.data, self.accelerator.device
        batch = self.config.train.batch_size
        generator = generator_for(device, self.config.train.seed, "step", step)
        t = torch.randint(self.process.num_timesteps, (batch,), device=device, generator=generator)
        weights = torch.ones(batch, device=device)
        if self.importance:
            t, weights = self.importance.draw(batch, generator_for("cpu", self.config.train.seed, "timesteps", step))
            t, weights = t.to(device), weights.to(device)
        noise = torch.randn(batch, data.channels, data.image_size, data.image_size, device=device, generator=generator)
        flip = torch.rand(batch, device=device, generator=generator) < (0.5 if data.random_flip else 0.0)
        unlabelled = torch.rand(batch, device=device, generator=generator) < self.config.train.label_dropout
        return t, weights, noise, flip, unlabelled

    def _denoiser(self, x_start: Tensor, y: Tensor) -> Denoiser:
        """The wrapped model with the conditions of these images."""
        inputs: dict[str, Tensor] = {"y": y} if self.class_names else {}
        if self.config.data.low_res_size is not None:
            inputs["low_res"] = shrink(x_start, self.config.data.low_res_size)
        return partial(self.model, **inputs)

    def _describe(self, step: int) -> str:
        """The timesteps and the images of a step, both a function of it (uniform timesteps only)."""
        batch = batch_indices(len(self.dataset), self.config.train.batch_size, self.config.train.seed, step)[:8]
        paths = getattr(self.dataset, "paths", None)
        images = ", ".join(str(paths[i]) if paths else f"number {i}" for i in batch)
        t = "" if self.importance else f"t {', '.join(map(str, self._random(step)[0][:8].tolist()))}, ... and "
        return f"{t}images {images}, ..."

    def _log(self, meter: _Meter, grad_norm: Tensor, lr: float) -> dict[str, Any]:
        unreadable = gather_object(list(meter.unreadable)) if self.config.data.on_error == "skip" else []
        metrics: dict[str, Any] = {"step": self.step, **meter.read(), "grad_norm": grad_norm.item(), "lr": lr}
        metrics["unreadable"] = len(unreadable)
        if self.accelerator.is_main_process:
            self._tell_of(
                "of the image files passed over, since they cannot be read; others take their places",
                sorted(set(unreadable)),
            )
        if metrics["skipped"] and self.accelerator.is_main_process:
            self.tell(f"{metrics['skipped']} steps by step {self.step} had a loss or gradient that is not finite "
                      "and were skipped")  # fmt: skip
        in_a_row = int(meter.in_a_row)
        if in_a_row >= self.config.train.max_skipped or (in_a_row and self.step == self.config.train.steps):
            last = int(meter.last_bad)
            raise UsageError(
                f"{in_a_row} steps in a row had a loss or gradient that is not finite. The last was step {last}, "
                f"with {self._describe(last - 1)}. Nothing since is saved: "
                f"{self._again_with('a lower train.lr or with train.grad_clip')}"
            )
        metrics = {name: value if value is None or math.isfinite(value) else None for name, value in metrics.items()}
        self._write(lambda: append_line(self.out / "metrics.jsonl", metrics), self.out / "metrics.jsonl")
        return metrics


class _Meter:
    """Sums of the loss by quarter of t, kept on the device and read only when it is time to log."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.sums = torch.zeros(2, 4, device=accelerator.device)
        self.skipped, self.in_a_row = torch.zeros(2, device=accelerator.device)
        self.last_bad = torch.zeros((), dtype=torch.int64, device=accelerator.device)
        self.unreadable: list[str] = []
        self.before = 0.0  # images seen before the clock started
        self.started = time.perf_counter()

    def start(self) -> None:
        """Begin to count time."""
        self.started = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count this time, which goes into something else than training."""
        began = time.perf_counter()
        yield
        self.started += time.perf_counter() - began

    def see(self, loss: Tensor, quarter: Tensor) -> None:
        in_quarter = F.one_hot(quarter, 4).float()
        in_quarter = in_quarter * torch.isfinite(loss)[:, None]
        self.sums += torch.stack([torch.where(in_quarter > 0, loss[:, None], 0).sum(0), in_quarter.sum(0)])

    def judge(self, step: int, bad: Tensor) -> None:
        """Count a step that was skipped (`bad` 1) or not (0)."""
        self.skipped = self.skipped + bad
        self.in_a_row = (self.in_a_row + bad) * bad
        self.last_bad = torch.where(bad > 0, step + 1, self.last_bad)

    def read(self) -> dict[str, Any]:
        """What there is to log, of all processes; and begin anew. (How many steps were bad in a row is kept.)"""
        sums = self.accelerator.reduce(self.sums.clone()).tolist()  # waits for the device
        images, seconds = sum(sums[1]), time.perf_counter() - self.started
        metrics: dict[str, Any] = {"loss": sum(sums[0]) / images if images else None}
        metrics |= {"images_per_second": (images - self.before) / seconds, "skipped": int(self.skipped)}
        quarters = {f"loss_q{q + 1}": total / n if n else None for q, (total, n) in enumerate(zip(*sums, strict=True))}
        self.sums.zero_()
        self.skipped = torch.zeros_like(self.skipped)
        self.unreadable.clear()
        self.before = 0.0
        self.start()
        return metrics | quarters

    def state_dict(self) -> dict[str, Any]:
        """What a run that is broken off between two lines of the log needs to write the next one."""
        return {
            "sums": gather(self.sums[None]),
            "bad": torch.stack([self.skipped, self.in_a_row, self.last_bad]),
            "unreadable": gather_object(list(self.unreadable)),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave, of as many processes or of others."""
        sums = state["sums"].to(self.sums.device)
        if len(sums) == self.accelerator.num_processes:
            self.sums.copy_(sums[self.accelerator.process_index])
        elif self.accelerator.is_main_process:
            self.sums.copy_(sums.sum(0))
        if self.accelerator.is_main_process:
            self.unreadable.extend(state["unreadable"])
        bad = state["bad"].to(self.sums.device)
        self.skipped, self.in_a_row, self.last_bad = bad[0], bad[1], bad[2].long()
        self.before = float(sums[:, 1].sum())


def bound_loss_scale(scaler: torch.amp.GradScaler | None) -> None:
    """Keep fp16's loss scale within `LOSS_SCALES`."""
    if scaler is not None:
        scale = scaler.get_scale()
        if not LOSS_SCALES[0] <= scale <= LOSS_SCALES[1]:
            scaler.update(min(max(scale, LOSS_SCALES[0]), LOSS_SCALES[1]))


def parameter_groups(network: nn.Module, scalar_lr_factor: float) -> list[dict[str, Any]]:
    """The optimizer's: all weights, then Fixup's scalars, if there are any, which do not decay."""
    few = scalars(network)
    weights = [p for p in network.parameters() if not any(p is scalar for scalar in few)]
    groups: list[dict[str, Any]] = [{"params": weights, "factor": 1.0}]
    return [*groups, {"params": few, "factor": scalar_lr_factor, "weight_decay": 0.0}] if few else groups


def learning_rate(train: TrainConfig, step: int) -> float:
    """The learning rate of optimizer step `step` (0, 1, ...): linear warm-up, then constant or half a cosine."""
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    if train.lr_schedule == "constant":
        return train.lr
    done = (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps)
    return train.lr * 0.5 * (1 + math.cos(math.pi * done))


def _check_known(accelerator: Accelerator) -> None:
    """Raise UsageError where accelerate is set up to share the work in a way that saving and averaging do not know."""
    kind = accelerator.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM) or (
        kind == DistributedType.FSDP and not accelerator.is_fsdp2
    ):
        name = "FSDP 1" if kind == DistributedType.FSDP else kind.value
        raise UsageError(
            f"accelerate is set up for {name}, which this trainer does not know: to cut a network up over GPUs, "
            "use accelerate launch --config_file configs/accelerate/fsdp2.yaml"
        )


def _check_agreed(*claims: tuple[str, str, str]) -> None:
    """Raise UsageError, in every process, where one of (what, mine, hint) is not the same in all of them."""
    said = gather_object([[mine for _, mine, _ in claims]])
    for (what, _, hint), answers in zip(claims, zip(*said, strict=True), strict=True):
        for i, theirs in enumerate(answers):
            if theirs != answers[0]:
                raise UsageError(f"{what}: {answers[0]} in process 0, and {theirs} in process {i}: {hint}")


def _parts(train: TrainConfig, rank: int, processes: int) -> list[slice]:
    """This process's slices of the global batch, one for each accumulated micro-batch."""
    accumulation = train.accumulation or 1
    size, rest = divmod(train.batch_size, processes * accumulation)
    if rest:
        raise UsageError(
            f"train.batch_size {train.batch_size} does not divide into {processes} processes "
            f"times train.accumulation {accumulation}"
        )
    starts = [(micro * processes + rank) * size for micro in range(accumulation)]
    return [slice(start, start + size) for start in starts]


def _due(every: int, step: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def _same_run(saved: checkpoint.Checkpoint, now: Config, out: Path) -> Config:
    """The configuration to continue with. Raises UsageError where it is another run's than the one in `out`."""
    if saved.step == 0:
        raise UsageError(f"{out} is a converted model: begin a run with its weights with "
                         f"--config {out / 'config.yaml'} --train.init_from {out} --out NEW")  # fmt: skip
    if now.train.init_from is None:  # it matters no more
        now = dataclasses.replace(now, train=dataclasses.replace(now.train, init_from=saved.config.train.init_from))
    for section in dataclasses.fields(Config):
        old, new = getattr(saved.config, section.name), getattr(now, section.name)
        for entry in dataclasses.fields(old):
            before, after = getattr(old, entry.name), getattr(new, entry.name)
            if before != after and entry.name not in MAY_CHANGE.get(section.name, set()):
                raise UsageError(
                    f"{section.name}.{entry.name} is {plain(after)}, and {plain(before)} in the run {out} that this "
                    "would continue: set it back, or begin another run with --out NEW (with these weights, with "
                    f"--train.init_from {out})"
                )
    return now


def _names(class_names: tuple[str, ...]) -> str:
    return ", ".join(class_names) or "none"
