"""Metrics of samples against independent implementations, and what `evaluate` says of them."""

import json
import sys

import numpy as np
import pytest
import scipy.linalg
import torch
from helpers import script
from test_trainer import small

import evaluate
from diffusion import UsageError
from diffusion.data.sources.digits import Digits
from diffusion.metrics import METRICS
from diffusion.metrics.base import Reference, Subject
from diffusion.metrics.features import FEATURES
from diffusion.metrics.samples import frechet_distance
from diffusion.run.checkpoint import Checkpoint, newest
from diffusion.training.trainer import Trainer

METRIC_NAMES = "frechet,kid,inception_score,precision_recall,nearest"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("metrics") / "run"
    Trainer(small(train__steps=4, checkpoint__every=2, train__ema_rates=(0.5, 0.9)), out).run()
    return out


def clouds(n=400, m=300, d=16):
    """Two sets of features."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)), rng.normal(0.3, 1.2, size=(m, d))


def subject_of(samples, images, logits=None):
    """A subject whose samples and images have these features."""
    dataset = Digits().open()
    reference = Reference(dataset, torch.device("cpu"), "pixels")
    subject = Subject(None, dataset, None, reference)
    subject.__dict__["features"] = torch.from_numpy(samples).float(), logits
    reference.__dict__["features"] = torch.from_numpy(images).float()
    return subject


def test_the_frechet_distance_is_that_of_scipys_matrix_root():
    a, b = clouds()
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    wanted = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-6)


def test_the_frechet_distance_is_that_of_torch_fidelity():
    metric_fid = pytest.importorskip("torch_fidelity.metric_fid")
    a, b = (cloud.astype(np.float32) for cloud in clouds())
    statistics = [metric_fid.fid_features_to_statistics(torch.from_numpy(cloud)) for cloud in (a, b)]
    wanted = metric_fid.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-6)


def test_the_kernel_distance_is_its_definition(monkeypatch):
    pytest.importorskip("torch_fidelity")
    monkeypatch.setattr("diffusion.metrics.samples.KID_SUBSET", 10**6)
    monkeypatch.setattr("diffusion.metrics.samples.KID_PARTS", 1)  # one subset: all of the smaller set
    a, b = (cloud[:200].astype(np.float32) for cloud in clouds())
    figures = METRICS["kid"].score(subject_of(a, b)).figures

    def kernel(x, y):
        return (x.astype(np.float64) @ y.T / x.shape[1] + 1) ** 3

    n, inside = len(a), [kernel(x, x) for x in (a, b)]
    wanted = sum((k.sum() - np.trace(k)) / (n * (n - 1)) for k in inside) - 2 * kernel(a, b).mean()
    assert figures["kid"] == pytest.approx(wanted, rel=1e-6)
    assert figures["subset"] == 200


def test_precision_and_recall_are_their_definition():
    pytest.importorskip("torch_fidelity")
    a, b = (cloud[:150].astype(np.float32) for cloud in clouds(d=3))
    figures = METRICS["precision_recall"].score(subject_of(a, b)).figures

    def covered(points, centres):
        radius = np.sort(np.linalg.norm(centres[:, None] - centres[None], axis=-1), axis=1)[:, 3]
        return (np.linalg.norm(points[:, None] - centres[None], axis=-1) <= radius).any(1).mean()

    assert figures["precision"] == pytest.approx(covered(a, b), rel=1e-6)
    assert figures["recall"] == pytest.approx(covered(b, a), rel=1e-6)


def test_the_inception_score_is_its_definition():
    pytest.importorskip("torch_fidelity")
    confident = torch.eye(10).repeat(100, 1) * 50
    assert METRICS["inception_score"].score(subject_of(*clouds(), confident)).figures["inception_score"] > 9.5
    assert METRICS["inception_score"].score(subject_of(*clouds(), torch.zeros(1000, 10))).figures[
        "inception_score"
    ] == pytest.approx(1)


def test_a_copy_of_the_data_is_found_and_shown():
    dataset = Digits().open()
    reference = Reference(dataset, torch.device("cpu"), "pixels")
    subject = Subject(None, dataset, None, reference)
    noisy = (dataset.images[:10].int() + 1).clamp(0, 255).to(torch.uint8)
    shifted = dataset.images[10:20].flip(-1)
    subject.__dict__["samples"] = torch.cat([noisy, shifted])
    score = METRICS["nearest"].score(subject)
    assert 0.5 <= score.figures["pixels_copies"] < 0.7
    assert score.sheet.shape == (48, 1, 8, 8)
    rows = score.sheet.view(16, 3, 1, 8, 8)
    assert (rows[:10, 0].int() - rows[:10, 1].int()).abs().max() <= 1


def test_the_classifier_tells_digits_apart_and_is_the_same_each_time(monkeypatch):
    dataset = Digits().open()
    x = dataset.images.float() / 127.5 - 1
    _, logits = FEATURES["classifier"](dataset, torch.device("cpu"), None).run(x)
    assert (logits.argmax(1) == dataset.labels).float().mean() > 0.97
    monkeypatch.setattr("diffusion.metrics.features.CLASSIFIER_STEPS", 20)
    first, second = (FEATURES["classifier"](dataset, torch.device("cpu"), None) for _ in range(2))
    assert first.name == second.name
    assert torch.equal(first.run(x[:99])[0], second.run(x[:99])[0])


def test_inception_runs_with_weights_of_a_file_and_its_figure_is_called_fid(tmp_path, run, monkeypatch, capsys):
    """The weights are random here: the real ones need a download."""
    inception = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", lambda *a, **k: pytest.fail("a download"))
    network, made = inception.__new__(inception), {}
    monkeypatch.setattr(inception, "load_state_dict", lambda self, state: made.setdefault("net", self))
    torch.save({}, tmp_path / "weights.pt")
    inception.__init__(network, "a", ["2048"], str(tmp_path / "weights.pt"))
    monkeypatch.undo()
    torch.save(made["net"].state_dict(), tmp_path / "weights.pt")
    reference = Reference(Digits().open(), torch.device("cpu"), "inception", tmp_path / "weights.pt", most=4)
    assert reference.extractor.name.startswith("inception of ")
    assert reference.features.shape == (4, 2048)
    (tmp_path / "bad.pt").write_bytes(b"no")
    with pytest.raises(UsageError, match=r"Inception's weights cannot be read from .*bad\.pt"):
        _ = Reference(Digits().open(), torch.device("cpu"), "inception", tmp_path / "bad.pt").extractor


@pytest.mark.parametrize(
    ("features", "says"), [("classifier", "needs images with classes"), ("nothing", "invalid choice")]
)
def test_features_that_do_not_fit_are_named(tmp_path, features, says, monkeypatch, capsys):
    Trainer(small(train__steps=1, model__class_cond=False), tmp_path / "run").run()
    monkeypatch.setattr("diffusion.data.sources.digits.Digits.open", _without_classes)
    argv = ["--ckpt", tmp_path / "run", "--metric", "frechet", "--features", features, "--n", 4]
    code, _, err = script(evaluate, monkeypatch, capsys, *argv)
    assert code == 2
    assert says in err


def _without_classes(self, split="train", opened=Digits.open):
    data = opened(self)
    data.class_names = ()
    return data


def test_all_metrics_share_the_samples_and_are_written_with_their_settings(run, tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch_fidelity")
    monkeypatch.setattr("diffusion.metrics.features.CLASSIFIER_STEPS", 20)
    out, sheet = tmp_path / "a.json", tmp_path / "sheet.png"
    argv = ["--ckpt", run, "--n", 24, "--steps", 2]
    code, said, err = script(
        evaluate, monkeypatch, capsys, *argv, "--metric", METRIC_NAMES, "--out", out, "--sheet", sheet
    )
    assert code == 0, err
    found = json.loads(out.read_text())
    hashes = {"features", "reference", "data", "classes"}
    assert list(found["settings"]["classes"].values()) == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert {name: value for name, value in found["settings"].items() if name not in hashes} == {
        "n": 24, "sampler": "dpmpp", "steps": 2, "evaluations": 2, "guidance": 1.0, "guide_between": None, "seed": 0,
        "split": "train", "sets": 1, "reference_images": 1797, "options": {"order": 2, "clip_denoised": True},
    }  # fmt: skip
    saved = newest(run, Checkpoint.files)[0]
    assert (found["checkpoint"], found["ema"], found["weights"]) == (saved.path.name, "0.5", saved.fingerprint())
    assert {"frechet", "kid", "inception_score", "precision", "recall", "pixels_copies"} <= found.keys()
    assert "24 images are few for a Fréchet distance in 64 features" in said
    assert sheet.exists()


def test_every_checkpoint_and_average_is_scored_and_the_best_named(run, tmp_path, monkeypatch, capsys):
    out = tmp_path / "every.json"
    argv = [
        "--ckpt",
        run,
        "--metric",
        "frechet",
        "--features",
        "pixels",
        "--n",
        16,
        "--steps",
        2,
        "--every",
        "--out",
        out,
    ]
    code, said, err = script(evaluate, monkeypatch, capsys, *argv)
    assert code == 0, err
    rows = json.loads(out.read_text())["every"]
    assert [(row["checkpoint"], row["ema"]) for row in rows] == [
        (f"step_{step:08d}", ema) for step in (2, 4) for ema in ("0.5", "0.9", "none")]  # fmt: skip
    best = min(rows, key=lambda row: row["frechet"])
    assert said.splitlines()[-1].startswith(f"best by frechet: {best['checkpoint']}, {best['ema']} (")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--metric", "fid"], "--metric fid is here frechet, with --features inception"),
        (["--metric", "fod"], "--metric is fod; it must be one of "),
        (["--metric", "frechet,precision_recall", "--n", "3"], "precision_recall needs at least 4 samples"),
        (["--metric", "frechet", "--n", "1"], "frechet needs at least 2 samples and images of the data: --n is 1"),
        (["--metric", "kid", "--n", "19"], "kid needs at least 20 samples"),
        (["--metric", "inception_score", "--n", "19"], "inception_score needs at least 20 samples"),
        (
            ["--metric", "frechet,inception_score", "--features", "pixels", "--n", "20"],
            "inception_score needs a classifier, and pixels is not",
        ),
    ],
)
def test_what_cannot_be_measured_is_named(run, argv, says, monkeypatch, capsys):
    pytest.importorskip("torch_fidelity")
    monkeypatch.setattr("diffusion.run.loaded.Run.generate", lambda *a, **k: pytest.fail("samples before the refusal"))
    code, _, err = script(evaluate, monkeypatch, capsys, "--ckpt", run, "--n", 8, "--steps", 2, *argv)
    assert code == 2
    assert says in err


def test_a_missing_package_is_named(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    code, _, err = script(evaluate, monkeypatch, capsys, "--ckpt", run, "--n", 20, "--steps", 2, "--metric", "kid",
                          "--features", "pixels")  # fmt: skip
    assert code == 2
    assert "torch-fidelity is not installed: pip install torch-fidelity" in err
