"""Running sums of the loss by quarter of t, read only when a line of metrics is written."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather, gather_object
from torch import Tensor


class Meter:
    """Sums that stay on the device, so that a step does not wait for it."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.sums = torch.zeros(3, 4, device=accelerator.device)
        self.skipped, self.in_a_row = torch.zeros(2, device=accelerator.device)
        self.last_skipped = torch.zeros((), dtype=torch.int64, device=accelerator.device)
        self.unreadable: list[str] = []
        self.before = 0.0  # images counted before the clock started
        self.started = time.perf_counter()

    def start(self) -> None:
        """Start the clock."""
        self.started = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock while something other than training is done."""
        began = time.perf_counter()
        yield
        self.started += time.perf_counter() - began

    def update(self, losses: Tensor, weights: Tensor, quarter: Tensor) -> None:
        """Add the losses (B,) of images whose t lies in the quarters (B,), 0 to 3. Non-finite losses are left out.

        With the weights of importance sampling (B,), else ones, the means are those over uniform t.
        """
        in_quarter = F.one_hot(quarter, 4).float() * torch.isfinite(losses)[:, None]
        weighted = torch.where(in_quarter > 0, (losses * weights)[:, None], 0)
        self.sums += torch.stack([weighted, in_quarter * weights[:, None], in_quarter]).sum(1)

    def count_step(self, step: int, skipped: Tensor) -> None:
        """Count step `step` (1, 2, ...), which was skipped (1) or not (0)."""
        self.skipped = self.skipped + skipped
        self.in_a_row = (self.in_a_row + skipped) * skipped
        self.last_skipped = torch.where(skipped > 0, step, self.last_skipped)

    def compute(self) -> dict[str, Any]:
        """The metrics over all processes since the last call. (How many steps were skipped in a row is kept.)"""
        sums = self.accelerator.reduce(self.sums.clone()).tolist()  # waits for the device
        images, seconds = sum(sums[2]), time.perf_counter() - self.started
        metrics: dict[str, Any] = {"loss": sum(sums[0]) / images if images else None}
        metrics |= {"images_per_second": (images - self.before) / seconds, "skipped": int(self.skipped)}
        for q, (total, n, _) in enumerate(zip(*sums, strict=True), 1):
            metrics[f"loss_q{q}"] = total / n if n else None
        self.sums.zero_()
        self.skipped = torch.zeros_like(self.skipped)
        self.unreadable.clear()
        self.before = 0.0
        self.start()
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to write the next line as an uninterrupted one would."""
        steps = torch.stack([self.skipped, self.in_a_row, self.last_skipped])
        return {"sums": gather(self.sums[None]), "steps": steps, "unreadable": gather_object(list(self.unreadable))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, of as many processes or of another number."""
        sums, steps = (state[name].to(self.sums.device) for name in ("sums", "steps"))
        if len(sums) == self.accelerator.num_processes:
            self.sums.copy_(sums[self.accelerator.process_index])
        elif self.accelerator.is_main_process:
            self.sums.copy_(sums.sum(0))
        if self.accelerator.is_main_process:
            self.unreadable.extend(state["unreadable"])
        self.skipped, self.in_a_row, self.last_skipped = steps[0], steps[1], steps[2].long()
        self.before = float(sums[:, 2].sum())
