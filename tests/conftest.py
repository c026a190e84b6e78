import os
import signal
import sys
from pathlib import Path

import pytest

os.environ["ACCELERATE_USE_CPU"] = "true"  # promises to the bit are those of one kind of device
os.environ["HF_HUB_OFFLINE"] = "1"  # or it tries for half a minute
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # two tests at a time: threads that wait must not spin
for stop in (signal.SIGINT, signal.SIGHUP):  # a shell's background job and nohup ignore them, and children inherit that
    signal.signal(stop, signal.default_int_handler if stop == signal.SIGINT else signal.SIG_DFL)
ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / name) for name in ("tests", "tests/unit", "tests/runs", "tests/commands", "", "studies")]


@pytest.fixture(autouse=True)
def _nothing_is_said_of_other_tests(monkeypatch):
    """Tests run beside others, which keep cores busy."""
    monkeypatch.setattr("diffusion.parallel.cores.LASTING", float("inf"))


@pytest.fixture(autouse=True)
def _fresh_accelerate_state():
    """accelerate keeps the process's precision and launcher for ever; a test starts without."""
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
