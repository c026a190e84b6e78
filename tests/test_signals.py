import signal
import subprocess
import sys
import time

from helpers import ROOT

from diffusion.parallel.signals import StopSignals

SCRIPT = """
import os, signal, time
from diffusion.parallel.signals import StopSignals
signals = StopSignals(1)
with signals:
    os.kill(os.getpid(), signal.{name})
    os.kill(os.getpid(), signal.{name})  # the launcher's echo
    assert signals.stop_requested()
    time.sleep(1.2)
    print("still here", flush=True)
    os.kill(os.getpid(), signal.{name})
    time.sleep(60)
"""


def test_a_second_signal_ends_the_process_at_once():
    for name in ("SIGTERM", "SIGINT"):
        done = subprocess.run([sys.executable, "-c", SCRIPT.format(name=name)], capture_output=True, timeout=50)
        assert done.stdout == b"still here\n"
        assert done.returncode == -getattr(signal, name)


CHILD = """
import os, sys, time
sys.path.insert(0, {root!r})
from diffusion.parallel.launchers import launcher
from diffusion.parallel.signals import StopSignals
signals = StopSignals(1, launcher())
print("ready", flush=True)
for _ in range(300):
    if signals.stop_requested():
        print(signals.stopped("after step 7"), flush=True)
        break
    time.sleep(0.1)
"""


def test_the_end_of_a_launcher_stops_its_run_and_that_of_a_shell_does_not(tmp_path):
    """accelerate's launcher for one process dies of SIGTERM without passing it on."""
    for environment, stops in (({"ACCELERATE_MIXED_PRECISION": "no"}, True), ({}, False)):
        said = tmp_path / f"{stops}.txt"
        child = CHILD.format(root=str(ROOT)).replace("300", "60")
        parent = (
            f"import os, subprocess, sys, time; "
            f"subprocess.Popen([sys.executable, '-c', {child!r}], stdout=open({str(said)!r}, 'w'), "
            f"env=os.environ | {environment!r}); time.sleep(60)"
        )
        with subprocess.Popen([sys.executable, "-c", parent]) as process:
            while not said.exists() or "ready" not in said.read_text():
                assert process.poll() is None
                time.sleep(0.1)
            process.send_signal(signal.SIGTERM)
        time.sleep(1.0)
        assert ("stopped by SIGTERM after step 7" in said.read_text()) == stops


def test_a_signal_that_comes_while_processes_agree_is_left_to_the_next_time(monkeypatch):
    """Else one of them would stop and wait for the others, who go on and wait for it."""
    signals = StopSignals(1)
    signals._group = "another process, which has heard nothing"
    monkeypatch.setattr("torch.distributed.all_reduce", lambda number, op, group: signals._hear(signal.SIGTERM, None))
    assert not signals.stop_requested()
    assert signals.stop_requested()
