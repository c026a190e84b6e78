import os
import signal
import time

import pytest
from helpers import FORKS

from diffusion.parallel.launchers import launcher
from diffusion.parallel.signals import StopSignals


def _signalled(name):
    signals, number = StopSignals(1), getattr(signal, name)
    with signals:
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # the launcher's echo
        assert signals.stop_requested()
        time.sleep(1.2)
        assert signals.stop_requested()
        os.kill(os.getpid(), number)
        os._exit(0)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_second_signal_ends_the_process_at_once(name):
    process = FORKS.Process(target=_signalled, args=(name,))
    process.start()
    process.join(60)
    assert process.exitcode == -getattr(signal, name)


def _launcher(environment, said):
    os.environ |= environment
    if os.fork():
        time.sleep(60)
    signals = StopSignals(1, launcher())
    said.write_text("ready")
    for _ in range(20):
        if signals.stop_requested():
            said.write_text(str(signals.stopped("after step 7")))
            break
        time.sleep(0.1)
    os._exit(0)


def test_the_end_of_a_launcher_stops_its_run_and_that_of_a_shell_does_not(tmp_path):
    """accelerate's launcher for one process dies of SIGTERM without passing it on."""
    for environment, expected in (({"ACCELERATE_MIXED_PRECISION": "no"}, "stopped by SIGTERM after step 7"),
                                  ({}, "ready")):  # fmt: skip
        said = tmp_path / f"{len(environment)}.txt"
        process = FORKS.Process(target=_launcher, args=(environment, said))
        process.start()
        while not said.exists() or not said.read_text():
            assert process.is_alive()
            time.sleep(0.02)
        process.terminate()
        process.join()
        end = time.monotonic() + 10
        while said.read_text() != expected and time.monotonic() < end:
            time.sleep(0.02)
        time.sleep(0.3)
        assert said.read_text() == expected


def test_a_signal_that_comes_while_processes_agree_is_left_to_the_next_time(monkeypatch):
    """Else one of them would stop and wait for the others, who go on and wait for it."""
    signals = StopSignals(1)
    signals._group = "another process, which has heard nothing"
    monkeypatch.setattr(
        "torch.distributed.all_reduce", lambda number, op, group: signals._receive(signal.SIGTERM, None)
    )
    assert not signals.stop_requested()
    assert signals.stop_requested()
