import pytest
from helpers import together

SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("kills", "processes"), [(4, 1), (3, 2), pytest.param(200, 1, marks=SLOW), pytest.param(100, 2, marks=SLOW)]
)
def test_a_run_that_is_killed_again_and_again_ends_with_the_right_bits(kills, processes):
    """The long versions are run by hand; docs/reliability.md has their results."""
    flags = ["--kills", kills, "--processes", processes, "--seconds", 1.5]
    said = together("tests/faults.py", *flags, processes=1, timeout=3600)
    assert f"{kills} kills" in said
    assert f"{kills} kills, 0 of them" not in said


@pytest.mark.parametrize("kills", [2, pytest.param(50, marks=SLOW)])
def test_samples_that_are_killed_again_and_again_end_as_the_same_files(kills):
    flags = ["--sampling", "--kills", kills, "--seconds", 1]
    said = together("tests/faults.py", *flags, processes=1, timeout=3600)
    assert said.count("the same files at the end") == 2
