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


# --- timesteps placed by signal-to-noise ratio ------------------------------------------------------------------------


def log_snr(schedule):
    alphas_cumprod = np.cumprod(1 - schedule.betas)
    return 0.5 * np.log(alphas_cumprod / (1 - alphas_cumprod))


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [1000, 4000])
@pytest.mark.parametrize("count", [1, 2, 5, 10, 100, 900])
@pytest.mark.parametrize("rule", ["logsnr", "karras"])
def test_timesteps_lie_where_the_rule_says(rule, count, steps, name):
    full, kept = Schedule.named(name, steps), Schedule.named(name, steps, f"{rule}{count}")
    at = list(kept.timestep_map)
    assert len(set(at)) == count
    assert at == sorted(at)
    found, every = log_snr(full)[at], log_snr(full)
    last = int((every > -5.1).sum())  # the first timestep beyond, or the end
    assert at[-1] == min(last, steps - 1)
    if count == 1:
        return
    assert at[0] == 0
    if rule == "logsnr":
        wanted = np.linspace(every[0], every[at[-1]], count)
    else:
        low, high = (np.exp(-value) for value in (every[0], every[at[-1]]))
        wanted = -np.log((low ** (1 / 7) + np.arange(count) / (count - 1) * (high ** (1 / 7) - low ** (1 / 7))) ** 7)
    if count <= 10:  # with more, the nearest timesteps coincide
        gap = np.abs(np.diff(every[: last + 1]))
        for value, target, t in zip(found, wanted, at, strict=True):
            assert abs(value - target) <= gap[max(0, t - 1) : t + 1].max()


def test_a_zero_terminal_snr_schedule_keeps_its_pure_noise():
    """Lin et al. (2023), algorithm 1: the last alphas_cumprod is 0, the first is unchanged."""
    plain, rescaled = Schedule.named("linear", 1000), Schedule.named("linear", 1000, "", True)
    signal = np.cumprod(1 - rescaled.betas)
    assert signal[-1] == 0
    assert signal[0] == pytest.approx(1 - plain.betas[0], rel=1e-12)
    for respacing in ("logsnr10", "karras10", "10"):
        assert Schedule.named("linear", 1000, respacing, True).timestep_map[-1] == 999
    assert np.cumprod(1 - Schedule.named("linear", 1000, "logsnr10", True).betas)[-1] == 0


def test_a_list_of_timesteps_is_kept_as_it_is():
    assert Schedule.named("cosine", 1000, [0, 7, 500, 999]).timestep_map == (0, 7, 500, 999)


@pytest.mark.parametrize(
    ("respacing", "says"),
    [([0, 500, 100], "must ascend, from 0 to at most 999"), ([5, 5], "must ascend"), ([0, 1000], "at most 999"),
     ([-5, 0], "must ascend"), ([], "must ascend"), ("[0]", "not understood"),
     ("logsnr", "not understood"), ("logsnr0", "not understood"), ("logsnr999", "from 1 to 997 of"),
     ("karras5,5", "must be one number"), ("logsnr5000", "from 1 to 997 of 1000 steps")],
)  # fmt: skip
def test_timesteps_that_cannot_be_placed_say_so(respacing, says):
    with pytest.raises(UsageError, match=says):
        Schedule.named("cosine", 1000, respacing)
