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
sys.path[:0] = [str(ROOT / "tests"), str(ROOT), str(ROOT / "studies")]


WHOLE = {"scripts", "processes", "launchers", "hostile", "faults", "studies", "signals", "fuzz", "sampling", "safety",
         "run_folder", "package", "trainer", "compile"}  # fmt: skip
"""Files whose tests run whole commands or runs: `make check` leaves them to `make test`."""


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.stem.removeprefix("test_") in WHOLE:
            item.add_marker("whole")


@pytest.fixture(autouse=True)
def _fresh_accelerate_state():
    """accelerate keeps the process's precision and launcher for ever; a test starts without."""
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
