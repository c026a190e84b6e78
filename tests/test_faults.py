import subprocess
import sys

import pytest
from helpers import ROOT


@pytest.mark.parametrize("kills", [12, pytest.param(200, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_again_and_again_ends_with_the_right_bits(kills):
    """The long version is run by hand; docs/reliability.md has its results."""
    argv = [sys.executable, ROOT / "tests/faults.py", "--kills", str(kills)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{kills} kills" in done.stdout
