"""The training run: when to log, save, sample and stop."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, broadcast_object_list, gather, gather_object
from safetensors import SafetensorError
from torch import Tensor
from torch.compiler import set_stance

from diffusion.config.schema import Config
from diffusion.data.base import Batch, DataSet
from diffusion.data.loader import batch_indices, step_batches
from diffusion.data.values import to_uint8
from diffusion.errors import NotWritten, Stopped, UsageError, WorkerDied, name_some, one_line
from diffusion.parallel.compilation import compile_network, precision_of
from diffusion.parallel.cores import CORES
from diffusion.parallel.launchers import accelerate_starts, check_known, keep_freed_memory, launcher, on_cpu
from diffusion.parallel.sharding import shard_like, to_host
from diffusion.parallel.signals import SamplingInterrupted, StopSignals
from diffusion.randomness import seed_for
from diffusion.run import checkpoint
from diffusion.run.checkpoint import Checkpoint, Weights
from diffusion.run.folder import RunFolder, append_line
from diffusion.run.grids import beside, save_grid
from diffusion.run.loaded import Run
from diffusion.run.start import changes, continued_config, origin_of, start_from
from diffusion.sampling import batches
from diffusion.training.build import build_step, learning_rate
from diffusion.training.data import open_run_data, seen_before
from diffusion.training.held_out import held_out_loss
from diffusion.training.meter import Meter
from diffusion.training.step import micro_batch_slices
from diffusion.training.trackers import Trackers, check_trackers

WAIT_SECONDS = 20
"""Seconds a signalled process waits for its next batch before it exits alone."""
Metrics = dict[str, Any]
Warn = Callable[[str], None]


class Trainer:
    """A run in the folder `out`: a new one, or continued from its newest checkpoint.

    `step` counts the optimizer steps that are done. `close` releases the folder; `run` does so at its end.
    `warn(message)` is called on the main process for recovered problems. Raises UsageError if the run cannot begin.
    """

    def __init__(self, config: Config, out: Path, warn: Warn = lambda message: None, dataset: DataSet | None = None):
        self.config, self.out = config, out
        self._scored: tuple[int, float | None] = -1, None
        train, accumulation = config.train, config.train.gradient_accumulation or 1
        # Without a plugin, accelerate would divide gradients by what the environment says, a second time.
        options = dict[str, Any](gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1), cpu=on_cpu())
        with accelerate_starts():
            self.accelerator = accelerator = Accelerator(mixed_precision=precision_of(train.precision), **options)
        self.warn: Warn = warn if accelerator.is_main_process else lambda message: None
        check_known(accelerator)
        if accelerator.device.type == "cpu":
            keep_freed_memory()
        processes = accelerator.num_processes
        if train.batch_size % (processes * accumulation):
            parts = f"{processes} processes times train.gradient_accumulation {accumulation}"
            raise UsageError(f"train.batch_size {train.batch_size} does not divide into {parts}")
        self._slices = micro_batch_slices(train.batch_size, accelerator.process_index, processes, accumulation)
        self._micro_batch = train.batch_size // (processes * accumulation)
        """Images that this process gives to the network at once."""
        if train.precision == "fp16" and accelerator.device.type == "cpu":
            raise UsageError("train.precision is fp16, which needs a GPU: use bf16 or no on a CPU")
        check_trackers(train.log_with)
        with ExitStack() as opened:
            # Locked before a checkpoint is chosen: another process may be saving one.
            self._folder = opened.enter_context(closing(RunFolder(out, warn))) if accelerator.is_main_process else None
            accelerator.wait_for_everyone()
            saved, files = checkpoint.newest(out, Checkpoint.files) if checkpoint.folders(out) else (None, {})
            self._prepare(saved, files, dataset)
            self._signals = StopSignals(processes, launcher())
            if self._folder:
                damaged = [path for path, _ in saved.passed_over] if saved else []
                dropped = self._folder.begin(self.config, self.step, damaged)
                if dropped and not saved:
                    again = "it begins again, and its former metrics are in metrics_superseded.jsonl"
                    warn(f"no checkpoint is left of the run in {out}, which had reached step {dropped}: {again}")
            accelerator.wait_for_everyone()
            self._trackers = opened.enter_context(closing(Trackers(accelerator, self.config, out, warn)))
            self._opened = opened.pop_all()

    @property
    def step(self) -> int:
        """How many optimizer steps are done."""
        return self.training_step.step

    def _prepare(self, saved: Checkpoint | None, files: Mapping[str, Weights], dataset: DataSet | None) -> None:
        """Open the data and build the training step, from `saved` if given. Raises UsageError if they do not fit."""
        if saved:
            self.config = continued_config(saved, self.config, self.out)
        config, accelerator, train = self.config, self.accelerator, self.config.train
        self.data = open_run_data(config, saved, self.out, accelerator, dataset)
        self.dataset, self.class_names = self.data.dataset, self.data.class_names
        self.process = config.diffusion.process()
        torch.manual_seed(seed_for(train.seed, "weights"))
        conditions = len(self.class_names), self.data.vectors.size
        self.network = config.network(*conditions)
        self.origin, notes = (saved.origin if saved else None), list[str]()
        if saved:
            checkpoint.check_fits(self.network, files["model.safetensors"], saved.path)
            self.network.load_state_dict(files["model.safetensors"])
        elif train.init_from is not None:
            source, notes = start_from(Path(train.init_from), self.network, config, self.class_names)
            if source.vectors.widths == self.data.vectors.widths:  # as its weights know them
                self.data = self.data._replace(vectors=source.vectors)
            elif source.vectors.widths and self.data.vectors.widths:
                was, now = (", ".join(one.widths) for one in (source.vectors, self.data.vectors))
                notes.append(f"train.init_from: its condition vectors were {was}, and are {now} here")
            notes, self.origin = notes + seen_before(source, self.data), origin_of(source)
        self.sampled = Run(config, self.network, self.class_names, accelerator.device, vectors=self.data.vectors)
        self.training_step = build_step(config, self.network, self.process, accelerator, *conditions)
        self.ema, self.meter = self.training_step.ema, Meter(accelerator)
        self.parts: dict[str, Any] = {"step": self.training_step, "meter": self.meter}
        if train.compile and (reason := compile_network(self.network, accelerator.device)):
            notes.append(f"train.compile: the network is not compiled, since nothing can be compiled here ({reason})")
        if saved:
            self._restore(saved, files)
            notes += changes(saved, config, self.environment)
            if saved.data not in (None, self.data.fingerprint):
                notes.append("the data have changed: held-out images may have been trained on, and losses differ")
        self._warn_at_start(saved, notes)

    def _restore(self, saved: Checkpoint, files: Mapping[str, Weights]) -> None:
        states = checkpoint.unflatten({**files["training.safetensors"], **saved.numbers})
        for name, stateful in self.parts.items():
            stateful.load_state_dict(states.get(name, {}))  # an optimizer may have no state
        for key, average in self.ema.averages.items():
            for name, value in average.items():
                value.copy_(shard_like(files[f"ema_{key}.safetensors"][name], value))
        self.training_step.step = saved.step

    def _warn_at_start(self, saved: Checkpoint | None, notes: Sequence[str]) -> None:
        for _, damage in saved.passed_over if saved else ():
            self.warn(f"{damage}; it is moved to damaged_..., and that of step {self.step} is used")
        if self.dataset.left_out:
            self.warn(name_some(self.dataset.left_out, "image files left out, since they cannot be read"))
        for note in notes:
            self.warn(note)
        train = self.config.train
        if train.warmup_steps > 0 and all(learning_rate(train, step) < train.lr for step in range(train.steps)):
            self.warn(f"train.lr is not reached: train.warmup_steps is {train.warmup_steps} of {train.steps} steps")
        if not getattr(self.config.model, "use_norm", True) and train.grad_clip is None:
            hint = "--train.grad_clip 1 prevents it (docs/zero-init.md)"
            self.warn(f"without normalisation the first steps can throw a run far back: {hint}")

    @property
    def environment(self) -> dict[str, Any]:
        """What the rounding of a step depends on."""
        device, processes = self.accelerator.device.type, self.accelerator.num_processes
        kind = torch.cuda.get_device_name() if device == "cuda" else torch.backends.cpu.get_cpu_capability()
        environment = {"device": device, "processes": processes, "threads": torch.get_num_threads()}
        environment |= {"precision": self.accelerator.mixed_precision}
        return environment | {"torch": torch.__version__, "processor": kind}

    def describe(self, about: Sequence[str]) -> None:
        """Keep lines about the run with it, for its page."""
        if self._folder:
            self._folder.describe(about)

    def run(self, on_step: Callable[[int, Metrics | None], None] = lambda step, metrics: None) -> None:
        """Train to the last step. `on_step` is called with each step done, and the metrics where they are logged.

        Raises Stopped after a signal, when all is saved, and UsageError when the loss stays non-finite.
        """
        for step, metrics in self:
            on_step(step, metrics)

    def __iter__(self) -> Iterator[tuple[int, Metrics | None]]:
        """Train, and yield each step done and the metrics where they are logged. On one process, a loop that is left
        early saves first; on several, call `save` in all of them."""
        train, steps = self.config.train, range(self.step, self.config.train.steps)
        reading = self.config.data.workers, self.meter.unreadable.extend, self._check_waiting
        images = step_batches(self.dataset, train.batch_size, train.seed, steps, self._slices, *reading)
        with closing(self), self._signals, closing(images):
            try:
                yield from self._train(images)
            except NotWritten as error:
                raise NotWritten(f"{error}; {self._saved()}") from None
            except RuntimeError as error:  # raised by a signal handler of torch's, anywhere
                if "DataLoader worker" not in str(error):
                    raise
                hint = "the same command continues; if memory is short, with fewer --data.workers"
                raise WorkerDied(f"a process that read images ahead died ({one_line(error)}): {hint}") from None

    def _train(self, data: Iterator[Batch]) -> Iterator[tuple[int, Metrics | None]]:
        train, step, meter = self.config.train, self.training_step, self.meter
        self.network.train()
        meter.start()
        while self.step < train.steps:
            lr = learning_rate(train, self.step)
            for group in step.optimizer.param_groups:
                group["lr"] = lr * group["factor"]
            x_start, given = self.sampled.given(next(data))
            result = step(x_start, **given)
            meter.update(result.losses, result.weights, result.t * 4 // self.process.num_timesteps)
            meter.count_step(self.step, result.skipped)
            yield from self._after_step(lr, result.grad_norm)
            if self.accelerator.is_main_process and (news := CORES.news()):
                self.warn(news)

    def _after_step(self, lr: float, grad_norm: Tensor) -> Iterator[tuple[int, Metrics | None]]:
        """Log, save, sample and stop, as far as they are due."""
        config, meter = self.config, self.meter
        saves, metrics, tried = self._is_due(config.checkpoint.every), None, False
        try:
            if saves or self.step % config.train.log_every == 0:
                metrics = self._log(grad_norm, lr, saves)
            if saves and not meter.in_a_row:  # weights that may be broken do not replace good ones
                tried = True
                with meter.paused():
                    self.save()
            if self._is_due(config.sample.every):
                with meter.paused(), suppress(SamplingInterrupted):
                    self.sample()
            yield self.step, metrics
        except (NotWritten, GeneratorExit) as error:  # the disk of the checkpoints may be another; a loop that was left
            together = isinstance(error, NotWritten) or self.accelerator.num_processes == 1  # one cannot save alone
            if not tried and not meter.in_a_row and together:
                self.save()
            raise
        if self._signals.stop_requested():
            if not tried:
                self.save()
            raise self._stopped()

    def _is_due(self, every: int) -> bool:
        return self.step == self.config.train.steps or (every > 0 and self.step % every == 0)

    def _check_waiting(self) -> None:
        """Obey a signal although the next images have not arrived: what was done is saved."""
        waited = self._signals.waited()
        if waited and self.accelerator.num_processes == 1:
            self.save()
            raise self._stopped()
        if waited > WAIT_SECONDS:  # the others are inside a step, and cannot save with this process
            raise WorkerDied("stopped by a signal while images were waited for: the last checkpoint is continued from")

    def _stopped(self) -> Stopped:
        return self._signals.stopped(f"after step {self.step}, which is saved: the same command continues")

    def close(self) -> None:
        """Release the run's folder."""
        self._opened.close()

    @property
    def last_grid(self) -> Path:
        """The path of the present step's grid."""
        return self.out / "samples" / f"step_{self.step:08d}.png"

    @contextmanager
    def _average(self) -> Iterator[None]:
        """Within `with`, the network is the first average, to be evaluated: it is compiled for training alone."""
        self.network.eval()
        with self.ema.in_place(self.config.train.averages[0]), set_stance("force_eager"):
            yield
        self.network.train()

    def sample(self) -> None:
        """Write a grid of images generated from fixed noise with the first moving average."""
        config, accelerator = self.config, self.accelerator
        rank, share = accelerator.process_index, math.ceil(config.sample.n / accelerator.num_processes)
        # All processes generate as many, so that gathering is one call; the surplus of the last is cut off.
        mine = batches(range(rank * share, (rank + 1) * share), self._micro_batch)
        given: dict[str, Tensor] = {"y": torch.arange(len(self.class_names))} if self.class_names else {}
        if config.data.condition_shapes or self.data.vectors.size:  # those of some images of the data
            given = self.sampled.of_images(self.dataset, config.sample.n)
        with self._average():
            drawn = self.sampled.generate(mine, given, seed=config.train.seed, progress=self._signals.interruptible)
            images = to_uint8(torch.cat([images for _, images in drawn])).to(accelerator.device)
        images = beside(gather(images)[: config.sample.n], given.get("image"))
        self._write(lambda: save_grid(images, self.last_grid, len(self.class_names)), self.last_grid)
        self._trackers.log_grid(self.last_grid, self.step)

    def score_held_out(self) -> float | None:
        """The loss of the held-out images after this step, with the first moving average; None without any."""
        if self.data.held_out is not None and self._scored[0] != self.step:
            with self._average():
                loss = held_out_loss(self.sampled, self.data.held_out, self.accelerator, self._micro_batch)
            self._scored = self.step, loss if math.isfinite(loss) else None
        return self._scored[1]

    def save(self) -> None:
        """Write a checkpoint of the run."""
        config, main = self.config.checkpoint, self.accelerator.is_main_process
        folder, held_out = checkpoint.checkpoint_folder(self.out, self.step), self.score_held_out()

        # What all processes have to gather, before the first one writes.
        weights = to_host(self.network.state_dict(), main)
        broken = [next((name for name, value in weights.items() if main and not value.isfinite().all()), None)]
        broadcast_object_list(broken)
        if broken[0]:
            hint = f"{self._saved()}, with a lower train.lr or with train.grad_clip"
            raise UsageError(f"after step {self.step}, {broken[0]} is no longer finite, and nothing is saved: {hint}")
        averages = {key: to_host(average, main) for key, average in self.ema.averages.items()}
        states = {name: to_host(stateful.state_dict(), main) for name, stateful in self.parts.items()}

        about: dict[str, Any] = {"data": self.data.fingerprint, "held_out_loss": held_out, "origin": self.origin}
        about |= {"environment": self.environment, "vectors": self.data.vectors._asdict()}

        def write() -> None:
            whole = {key: {**weights, **average} for key, average in averages.items()}  # with the network's buffers
            checkpoint.save(folder, self.step, self.config, self.class_names, weights, whole, states, **about)
            checkpoint.prune(self.out, config.keep_last, config.keep_every)

        self._write(write, folder)

    def _saved(self) -> str:
        """What is saved of the run, and that it continues."""
        found = checkpoint.folders(self.out)
        if not found:
            return "no checkpoint was saved before, so the same command begins again"
        return f"the checkpoints up to step {checkpoint.step_of(found[0])} are whole, and the same command continues"

    def _write(self, write: Callable[[], None], path: Path) -> None:
        """Let the main process write. If it cannot, all raise NotWritten."""
        failed: list[str | None] = [None]
        if self.accelerator.is_main_process:
            try:
                write()
            except (OSError, SafetensorError, RuntimeError) as error:  # torch.save has a RuntimeError for a full disk
                failed = [f"{path} cannot be written: {one_line(error)}"]
        broadcast_object_list(failed)
        if failed[0] is not None:
            raise NotWritten(failed[0])

    def _log(self, grad_norm: Tensor, lr: float, saves: bool) -> Metrics:
        """Write a line of metrics, with the loss of held-out images if a checkpoint is due.

        Raises UsageError if too many steps in a row were skipped.
        """
        unreadable = gather_object(list(self.meter.unreadable)) if self.config.data.on_error == "skip" else []
        metrics: Metrics = {"step": self.step, **self.meter.compute(), "grad_norm": grad_norm.item(), "lr": lr}
        metrics["unreadable"] = len(unreadable)
        if saves and self.data.held_out:
            with self.meter.paused():
                metrics["held_out_loss"] = self.score_held_out()
        if unreadable:
            self.warn(name_some(sorted(set(unreadable)), "image files replaced by others, since they cannot be read"))
        if skipped := metrics["skipped"]:
            self.warn(f"{skipped} steps by step {self.step} had a loss or gradient that is not finite and were skipped")
        in_a_row = int(self.meter.in_a_row)
        if in_a_row >= self.config.train.max_skipped or (in_a_row and self.step == self.config.train.steps):
            last, hint = int(self.meter.last_skipped), f"{self._saved()}, with a lower train.lr or with train.grad_clip"
            what = f"{in_a_row} steps in a row had a loss or gradient that is not finite"
            raise UsageError(f"{what}; the last was step {last}, with {self._describe(last - 1)}; {hint}")
        metrics = {name: value if value is None or math.isfinite(value) else None for name, value in metrics.items()}
        self._write(lambda: append_line(self.out / "metrics.jsonl", metrics), self.out / "metrics.jsonl")
        self._trackers.log(metrics, self.step)
        return metrics

    def _describe(self, step: int) -> str:
        """The first timesteps and images of a step. (Timesteps by importance are no longer known.)"""
        train = self.config.train
        indices = batch_indices(len(self.dataset), train.batch_size, train.seed, step)[:8]
        images = f"images {', '.join(self.dataset.name_of(i) for i in indices)}, ..."
        t = self.training_step.draws(step, train.batch_size, self.config.data.shape).t[:8].tolist()
        return images if self.training_step.timesteps else f"t {', '.join(map(str, t))}, ... and {images}"
