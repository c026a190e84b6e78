import signal
import subprocess
import sys

SCRIPT = """
import os, signal, time
from diffusion.signals import StopSignals
signals = StopSignals(1)
with signals:
    os.kill(os.getpid(), signal.{name})
    os.kill(os.getpid(), signal.{name})  # the launcher's echo
    assert signals.asked()
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
