import numpy as np
import pytest
from helpers import golden, process

from diffusion import Schedule, UsageError
from diffusion.schedule import space_timesteps


@pytest.mark.parametrize("steps", [1000, 100])
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_tables_are_the_published_ones(name, steps):
    tables = process(name, steps).tables
    figures = {key: value for key, value in golden("schedules.npz").items() if key.startswith(f"{name}_{steps}_")}
    assert len(figures) == 8
    for key, value in figures.items():
        np.testing.assert_allclose(tables[key.removeprefix(f"{name}_{steps}_")], value, rtol=1e-12, err_msg=key)


@pytest.mark.parametrize("case", golden("respacing.json"), ids=lambda c: f"{c['respacing']} of {c['steps']}")
def test_respacing_keeps_the_published_steps(case):
    assert space_timesteps(case["steps"], case["respacing"]) == case["kept"]


def test_respacing_rounds_halves_as_the_accumulated_position_does():
    # 999 / 250 * 125 is 499.5, which rounds to 500; the position added up 125 times lies a hair off.
    position = 0.0
    for _ in range(125):
        position += 999 / 250
    assert space_timesteps(1000, "251")[125] == round(position)


def test_a_respaced_process_has_the_signal_of_the_kept_steps():
    full, kept = Schedule.named("cosine", 1000), Schedule.named("cosine", 1000, "37")
    expected = np.cumprod(1 - full.betas)[list(kept.timestep_map)]
    np.testing.assert_allclose(np.cumprod(1 - kept.betas), expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("name", "steps", "respacing", "says"),
    [
        ("linear", 20, "", "20 steps has a beta of 1"),
        ("cosine", 100, "101", "101 steps are more than the schedule's 100"),
        ("cosine", 100, "10,80", "more than the 50 of section 2"),
        ("cosine", 1000, "ddim300", "no whole stride"),
        ("cosine", 1000, "fast", "not understood"),
        ("cosine", 1000, "0", "not understood"),
        ("cosine", 1000, "10,,10", "not understood"),
    ],
)
def test_what_cannot_be_a_schedule_says_so(name, steps, respacing, says):
    with pytest.raises(UsageError, match=says):
        Schedule.named(name, steps, respacing)


def test_linear_betas_below_one_are_accepted():
    assert Schedule.named("linear", 21).betas.max() < 1
