import subprocess
import sys

import pytest
from helpers import ROOT

SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("kills", "processes"), [(12, 1), (4, 2), pytest.param(200, 1, marks=SLOW), pytest.param(100, 2, marks=SLOW)]
)
def test_a_run_that_is_killed_again_and_again_ends_with_the_right_bits(kills, processes):
    """The long versions are run by hand; docs/reliability.md has their results."""
    argv = [sys.executable, ROOT / "tests/faults.py", "--kills", str(kills), "--processes", str(processes)]
    argv += ["--seconds", "2.5" if processes == 1 else "4"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{kills} kills" in done.stdout


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=SLOW)])
def test_samples_that_are_killed_again_and_again_end_as_the_same_files(kills):
    argv = [sys.executable, ROOT / "tests/faults.py", "--sampling", "--kills", str(kills), "--seconds", "1.5"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("the same files at the end") == 2
