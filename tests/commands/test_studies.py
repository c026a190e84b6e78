"""The studies run, and what they calculate with is right; their findings are run by hand and stand in docs/."""

import json
import math

import depth
import fixup_resnet as resnet
import improved_ddpm as study
import learning_rate as rates
import numpy as np
import pytest
import symmetry
import torch
import zero_init


def test_frechet_distance_of_known_gaussians():
    """Of N(0, I) and N(m, s^2 I) in d dimensions: |m|^2 + d (s - 1)^2."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(200_000, 3)), 2 * rng.normal(size=(200_000, 3)) + np.array([1, 0, 2])
    assert study.frechet_distance(a, b) == pytest.approx(5 + 3, rel=0.02)
    assert study.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_the_interval_is_students():
    mean, half = study.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (mean, half) == pytest.approx((3.0, 1.9633), abs=1e-4)  # 2.776 * sqrt(2.5 / 5)


def test_a_claim_holds_only_beyond_its_interval():
    def results(worse):
        arms = {name: {"v": {"bits": [1.0, 1.1, 0.9], **{f"fd{n}": [1.0, 1.1, 0.9] for n in study.SAMPLING_STEPS}}}
                for name in study.ARMS}  # fmt: skip
        arms["hybrid, cosine"]["v"]["bits"] = worse
        return arms

    for worse, verdict in (
        ([2.0, 2.2, 1.9], "holds"),
        ([1.1, 0.9, 1.0], "no effect seen"),
        ([0.5, 0.7, 0.4], "reverse"),
    ):
        assert verdict in study.claims_table(results(worse)).splitlines()[2]


def test_the_whole_study_in_small(tmp_path, monkeypatch):
    for name, value in dict(T=25, TRAINING_STEPS=1, BATCH_SIZE=8, SAMPLES=10, SAMPLING_STEPS=(5,), SEEDS=range(2),
                            CLASSIFIER_STEPS=2, HELD_OUT_EVERY=900, DOCUMENT=tmp_path / "a.md").items():  # fmt: skip
        monkeypatch.setattr(study, name, value)
    monkeypatch.setattr(study, "CLAIMS", [claim for claim in study.CLAIMS if claim.figure in ("bits", "fd5")])
    study.data.cache_clear()
    (tmp_path / "a.md").write_text(
        "<!-- claims -->\nstale\n<!-- end of claims -->\n<!-- figures -->\n<!-- end of figures -->"
    )
    try:
        results = study.gather(tmp_path)
        first = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
        assert len(first) == 2 * len(study.ARMS)
        assert study.gather(tmp_path) == results
        assert {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")} == first  # nothing ran again
        study.report(results)
    finally:
        study.data.cache_clear()
        study.features.cache_clear()
    text = (tmp_path / "a.md").read_text()
    assert "stale" not in text
    assert "| vlb, importance | learned_range |" in text
    assert (tmp_path / "a.png").exists()


# --- zero initialisation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("convolutional", [False, True])
def test_constant_weights_keep_one_channel_and_zero_last_layers_keep_all(convolutional):
    results = {start: symmetry.train(convolutional, start, 100) for start in symmetry.STARTS}
    for start in ("random", "last layer zero"):
        assert set(results[start].channels.values()) == {32}
        assert results[start].rank >= 28  # a random matrix may be close to a lower rank
        assert results[start].accuracy > 0.7
        assert results[start].last_rank == {0: 0 if start == "last layer zero" else 10, 1: 10, 10: 10, 100: 10}
    for start in ("constant", "all zero"):
        assert set(results[start].channels.values()) == {1}
        assert results[start].rank <= 1
    assert results["constant"].active > 0.3  # or nothing moved, and nothing is shown
    assert 0.15 < results["constant"].accuracy < results["random"].accuracy
    assert results["all zero"].accuracy < 0.2


def test_fixup_and_zero_stay_tame_at_depth_where_the_default_explodes():
    for init in ("zero", "fixup"):
        signal, gradient = depth.at_the_start(depth.chain(300, init))
        assert signal[-1] == signal[0]
        assert gradient[0] == gradient[-1]
    signal, gradient = depth.at_the_start(depth.chain(300, "default"))
    assert signal[-1] > 5 * signal[0]
    assert gradient[0] > 5 * gradient[-1]
    assert max(depth.train(depth.chain(300, "fixup"), 4)) < 1.2


def test_the_ablation_in_small(tmp_path, monkeypatch):
    setting = zero_init.Setting(8, 2, 32, 2, {"zero": (1e-3, 1e30), "default": (1e-3, 1e30), "small": (1e-3,)}, 20)
    monkeypatch.setattr(zero_init, "SETTINGS", {"digits": setting})
    monkeypatch.setattr(zero_init, "DOCUMENT", tmp_path / "a.md")
    monkeypatch.setattr(zero_init, "LOOK_EVERY", 1)
    monkeypatch.setattr(zero_init, "TRAINS", 1.5)
    kinds = ("comparisons", "arms", "rates")
    (tmp_path / "a.md").write_text("".join(f"<!-- digits {k} -->\nstale\n<!-- end of digits {k} -->\n" for k in kinds))
    monkeypatch.setattr(zero_init, "COMPARISONS", [zero_init.Comparison("ends lower", "zero", "default")])
    zero_init.data.cache_clear()
    monkeypatch.setattr(zero_init, "arms_table", lambda results: "arms")  # has steps that are not run here
    try:
        results = zero_init.gather("digits", tmp_path, None)
        first = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
        assert len(first) == 2 * 2 * 2 + 2
        again = zero_init.gather("digits", tmp_path, None)
        assert str(again) == str(results)  # nan is not equal to itself
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")} == first
        zero_init.report({"digits": results})
    finally:
        zero_init.data.cache_clear()
    text = (tmp_path / "a.md").read_text()
    assert "stale" not in text
    assert "| ends lower | loss |" in text
    assert "2 of 2 broke" in text
    assert (tmp_path / "zero-init-digits.png").exists()


def test_steps_to_a_loss_are_read_between_looks():
    runs = [{"looks": {"0": 1.0, "50": 0.5, "100": 0.3, "150": 0.35}}, {"looks": {"0": 1.0, "50": 0.9}}]
    assert zero_init.steps_to(runs[:1], 0.4) == [75.0]
    assert zero_init.steps_to(runs, 0.75)[0] == 25.0
    assert np.isnan(zero_init.steps_to(runs, 0.75)[1])


def test_gradients_are_clipped_where_the_arm_says_so(tmp_path, monkeypatch):
    setting = zero_init.Setting(8, 8, 32, 1, {}, 20)
    monkeypatch.setattr(zero_init, "SETTINGS", {"digits": setting})
    monkeypatch.setattr(zero_init, "LOOK_EVERY", 1)
    norms = []
    for arm in ("fixup, no norm", "fixup, no norm, no clip"):
        path = zero_init.run(zero_init.Job("digits", arm, 2e-3, 0), tmp_path, None)
        norms.append(json.loads(path.read_text())["norms"])
    assert norms[0][0] == norms[1][0] > 1  # the norm before clipping; the first step was clipped in one arm alone
    assert norms[0][-1] < norms[1][-1]  # the spike of the first steps is lower


def test_fixups_resnet_begins_as_its_skip_paths_and_learns():
    net = resnet.network("fixup", 0)
    x = torch.randn(64, 1, 14, 14, generator=torch.Generator().manual_seed(0))
    assert not net(x).any()
    for block in net:
        if isinstance(block, resnet.Block):
            assert not block.branch(torch.ones(1, block.branch[0].in_channels, 4, 4)).any()
    y = torch.arange(64) % 2
    x[y == 1, :, :7] += 1
    losses = resnet.train(net, 0.01, 0, x, y, 60)
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert len(resnet.train(resnet.network("plain", 0, blocks=9), 0.1, 0, 3 * x, y, 60)) < 60  # not finite


def test_a_difference_counts_only_after_holms_correction():
    def runs(*losses):
        return {1e-3: [{"loss": loss, "bits": 1.0, "looks": {"100": loss}, "norms": [1.0] * 20} for loss in losses]}

    results = {
        "zero": runs(0.10, 0.11, 0.12, 0.13),
        "default": runs(0.20, 0.212, 0.221, 0.23),
        "small": runs(0.1, 0.12, 0.11, 0.14),
    }
    table = zero_init.comparisons_table(results).splitlines()[2:]
    verdicts = {line.split(" | ")[0][2:] + ", " + line.split(" | ")[1]: line.split(" | ")[-1] for line in table}
    assert verdicts["zero ends lower than default, loss"] == "holds |"
    assert verdicts["zero ends lower than small, loss"] == "no effect seen |"
    assert verdicts["zero has the better likelihood, bits"] == "no effect seen |"
    assert zero_init.best_rate({1e-3: [{"loss": 0.3}], 1e-2: [{"loss": float("nan")}], 2e-3: [{"loss": 0.2}]}) == 2e-3


# --- learning rates ---------------------------------------------------------------------------------------------------


def losses_of(best, broken=math.inf):
    """Held-out losses over the grid whose logarithm is a parabola with its lowest point at 2^best."""
    return {
        rate: 0.1 * 2 ** (0.05 * (math.log2(rate) - best) ** 2) if rate < broken else math.nan for rate in rates.RATES
    }


def test_the_best_rate_is_the_vertex_of_a_parabola_and_the_largest_stable_one_is_below_all_that_break():
    assert rates.best(losses_of(-8.3)) == pytest.approx(-8.3)
    assert rates.best(losses_of(-8.3, broken=4e-3)) == pytest.approx(-8.3)
    assert rates.best(losses_of(-14)) == pytest.approx(
        math.log2(rates.RATES[0]) - 1
    )  # beyond the grid, a step is known
    assert math.isnan(rates.best(dict.fromkeys(rates.RATES, math.nan)))
    slow = losses_of(-5, broken=8e-3)  # still falling where it breaks
    assert rates.best(slow) == pytest.approx(-5)
    assert rates.near(slow) == pytest.approx(math.log2(4e-3) + 0.5)
    assert rates.near(losses_of(-8.3)) == pytest.approx(-8.3)
    assert 2 ** rates.stable(losses_of(-8.3, broken=8e-3)) == pytest.approx(4e-3)
    assert math.isnan(rates.stable(dict.fromkeys(rates.RATES[1:5], 0.1)))


def test_the_slope_over_a_size_is_that_of_the_best_rates():
    line = rates.Line("digits", "zero", "blocks")
    losses = {
        size: [losses_of(-8 - 0.5 * math.log2(size.blocks) + shift) for shift in (-0.1, 0.1)] for size in line.sizes()
    }
    assert rates.slopes(line, losses) == pytest.approx([-0.5, -0.5])
    assert "falls" in rates.lines_table({line: losses})


def test_coordinate_check_zero_waits_a_step_and_mup_keeps_what_moves_over_width():
    """By how much the activations before the output layer move: with the standard rates in proportion to the width,
    with muP's hardly more; over depth, alike for any initialisation."""
    narrow, wide, deep = rates.Size(32, 1), rates.Size(128, 1), rates.Size(32, 8)
    for arm in ("zero", "default"):
        moved = {size: rates.movements(rates.ARMS[arm], size, 1e-3, steps=3) for size in (narrow, wide, deep)}
        scaled = rates.movements(rates.ARMS[f"{arm}, muP"], wide, 1e-3, steps=3)
        assert all((each[0] == 0) == (arm == "zero") for each in (*moved.values(), scaled))
        assert moved[wide][-1] > 4 * moved[narrow][-1]
        assert scaled[-1] < 2.5 * moved[narrow][-1]
        assert 1 / 1.5 < moved[deep][-1] / moved[narrow][-1] < 1.5
