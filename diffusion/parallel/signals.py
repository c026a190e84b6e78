"""Graceful shutdown: signals that make all processes of a run save and stop."""

import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from diffusion.errors import Stopped

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
"""From schedulers and launchers, Ctrl-C, a scheduler's warning of its time limit, and a closed terminal."""
ECHO_SECONDS = 1.0
"""Launchers repeat a terminal's Ctrl-C within this time. A later one is a second signal, which ends the process."""


class SamplingInterrupted(Exception):
    """A signal arrived during sampling."""


class StopSignals:
    """Within `with`, the first signal of `STOP_SIGNALS` is remembered, and a second one ends the process at once.

    A signal that was ignored before, as by nohup, stays ignored.

    The end of the process `launcher` counts as SIGTERM: not every launcher forwards signals.
    """

    def __init__(self, num_processes: int, launcher: int | None = None):
        self._launcher = launcher
        self._received: tuple[float, int] | None = None
        self._before: dict[int, Any] = {}
        # Processes agree through the CPU, so that no step waits for a GPU.
        self._group: Any = torch.distributed.new_group(backend="gloo") if num_processes > 1 else None

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():  # signal handlers can be set nowhere else
            heeded = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._receive) for number in heeded}

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _receive(self, number: int, frame: object) -> None:
        if self._received is None:
            self._received = time.monotonic(), number
        elif time.monotonic() - self._received[0] > ECHO_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def stop_requested(self) -> bool:
        """Whether any process has received a signal. All processes have to call this, at the same places."""
        if self._received is None and self._launcher not in (None, os.getppid()):
            self._received = time.monotonic(), signal.SIGTERM
        if self._group is not None:
            number = torch.tensor(self._received[1] if self._received else 0)
            torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX, self._group)
            if number and self._received is None:
                self._received = time.monotonic(), int(number)
            return bool(number)  # later signals are not agreed on yet
        return self._received is not None

    def waited(self) -> float:
        """Seconds since this process received a signal; 0 if none."""
        return time.monotonic() - self._received[0] + 1e-9 if self._received else 0.0

    def interruptible(self, steps: Iterable[int]) -> Iterator[int]:
        """Wrap a sampler's steps. Raises SamplingInterrupted after a signal."""
        for step in steps:
            if self.stop_requested():
                raise SamplingInterrupted
            yield step

    def stopped(self, what: str) -> Stopped:
        """The exception to raise after a signal: "stopped by SIGTERM" followed by `what`, which says what is saved."""
        number = signal.Signals(self._received[1]) if self._received else signal.SIGTERM
        return Stopped(f"stopped by {number.name} {what}", 128 + number)
