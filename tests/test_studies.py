"""The studies run, and what they calculate with is right; their findings are run by hand and stand in docs/."""

import sys

import numpy as np
import pytest
from helpers import ROOT

sys.path.insert(0, str(ROOT / "studies"))
import depth
import improved_ddpm as study
import symmetry


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
    for name, value in dict(T=30, TRAINING_STEPS=2, SAMPLES=40, SAMPLING_STEPS=(5, 10, 25), SEEDS=range(2),
                            HELD_OUT_EVERY=400, DOCUMENT=tmp_path / "a.md").items():  # fmt: skip
        monkeypatch.setattr(study, name, value)
    monkeypatch.setattr(study, "CLAIMS", [claim for claim in study.CLAIMS if claim.figure != "fd50"])
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
    for start in ("constant", "all zero"):
        assert set(results[start].channels.values()) == {1}
        assert results[start].rank <= 1
    assert results["constant"].accuracy < results["random"].accuracy
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
