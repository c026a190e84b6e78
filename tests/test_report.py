"""Reports in a real browser, and trackers."""

import io
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from helpers import SMALL
from PIL import Image
from test_scripts import script
from test_sources import pixels, write
from test_trainer import metrics, small

import train
from diffusion import UsageError
from diffusion.commands import report as command
from diffusion.report.page import POINTS, report
from diffusion.training.trackers import Trackers
from diffusion.training.trainer import Trainer

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "run <b>"
    Trainer(
        small(train__steps=4, train__log_every=1, sample__every=2, data__held_out=0.01, checkpoint__every=2), out
    ).run()
    return out


def opened(path, tmp_path, *flags):
    """The page's elements once its scripts have run, without a network."""
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND",
         f"--user-data-dir={tmp_path / 'browser'}", "--virtual-time-budget=20000", "--dump-dom", *flags, path.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    return done.stdout


@browser
@pytest.mark.whole
def test_the_page_draws_its_curves_and_grids_in_a_browser(run, tmp_path):
    path = tmp_path / "a.html"
    path.write_text(report([run]))
    dom = opened(path, tmp_path)
    assert 'data-ready="yes"' in dom
    assert dom.count('class="main-svg"') >= 2 * 5
    assert all(
        f"{title}</text>" in dom for title in ("loss", "loss by quarter of t", "learning rate", "norm of the gradient")
    )
    assert dom.count("nsewdrag") >= 5  # what zooming takes hold of
    assert 'alt="samples at step 4"' in dom
    assert 'src="data:image/webp' in dom
    assert "run &lt;b&gt;" in dom
    assert "held-out loss" in dom
    assert "http://" not in re.sub(r"http://www.w3.org[^\s\"']*", "", dom.split('id="plotly"')[0])


@browser
@pytest.mark.whole
def test_several_runs_are_compared_on_one_page(run, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    path = tmp_path / "a.html"
    path.write_text(report([run, other]))
    dom = opened(path, tmp_path)
    assert 'data-ready="yes"' in dom
    assert 'data-unformatted="other: loss"' in dom
    assert "Configuration: other" in dom


def test_the_page_of_a_long_run_stays_small(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(50, 1_000_001, 50):
            line = {"step": step, "loss": 1 / step, "grad_norm": None, "lr": 1e-3, "images_per_second": 100.0}
            file.write(json.dumps(line | {f"loss_q{q}": 0.1 for q in range(1, 5)}) + "\n")
    page = report([run])
    assert len(page) < 5_000_000
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    loss = data["plots"][0]["traces"][0]
    assert 1000 < len(loss["x"]) <= POINTS
    assert loss["x"][-1] == 1_000_000
    assert loss["y"][0] == pytest.approx(sum(1 / step for step in range(50, 701, 50)) / 14, rel=1e-4)
    assert all(plot["title"] != "norm of the gradient" for plot in data["plots"])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "has no metrics.jsonl that can be read"),
        ("", "has no metrics yet"),
        ('{"loss": 1}\n[1]\n{"st', "has no metrics"),
    ],
)
def test_a_run_without_metrics_is_named(tmp_path, content, says, monkeypatch, capsys):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(UsageError, match=says):
        report([tmp_path])
    code, _, err = script(command, monkeypatch, capsys, tmp_path)
    assert (code, err.count("\n")) == (2, 1)


@pytest.mark.parametrize(
    ("argv", "says"),
    [(["/nowhere"], "/nowhere is not there"), (["{run}", "--out", "a.pdf"], "must end in .html"),
     (["{run}", "--out", "{run}/checkpoints/step_00000004/a.html"], "is part of what the run")],
)  # fmt: skip
def test_what_cannot_be_reported_is_named(run, argv, says, monkeypatch, capsys):
    code, _, err = script(command, monkeypatch, capsys, *(text.replace("{run}", str(run)) for text in argv))
    assert code == 2
    assert says in err


def test_training_ends_with_a_report(tmp_path, monkeypatch, capsys):
    argv = [
        "--out",
        tmp_path / "run",
        "--train.steps",
        2,
        "--train.batch_size",
        8,
        "--sample.n",
        2,
        "--sample.steps",
        2,
    ]
    code, out, err = script(train, monkeypatch, capsys, *argv)
    assert code == 0, err
    assert f"report: {tmp_path / 'run/report.html'}" in out
    page = (tmp_path / "run/report.html").read_text()
    assert "Commands" in page
    assert "1797 images as 1 x 8 x 8, values 0 to 255" in page
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    code, out, err = script(train, monkeypatch, capsys, "--out", tmp_path / "run", "--train.steps", 3)
    assert code == 0
    assert "no report: a report needs a package: pip install plotly" in err


# --- trackers ---------------------------------------------------------------------------------------------------------


def test_tensorboard_is_given_metrics_and_grids(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = small(train__steps=4, train__log_every=1, train__log_with=("tensorboard",), sample__every=2)
    Trainer(config, tmp_path / "run").run()
    events = EventAccumulator(str(tmp_path / "run/trackers/run"))
    events.Reload()
    assert [(e.step, pytest.approx(e.value)) for e in events.Scalars("loss")] == [
        (line["step"], line["loss"]) for line in metrics(tmp_path / "run")]  # fmt: skip
    assert [e.step for e in events.Images("samples")] == [2, 4]


@pytest.mark.parametrize(
    ("names", "says"),
    [(("wandb",), "train.log_with has wandb, which is not installed: pip install wandb"),
     (("tensorbord",), "did you mean tensorboard")],
)  # fmt: skip
def test_trackers_that_are_not_there_are_named_before_a_folder_is_made(names, says, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusion.training.trackers.get_available_trackers", lambda: [])
    with pytest.raises(UsageError, match=says):
        Trainer(small(train__log_with=names), tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Failing:
    """A tracker whose disk is full from the second call on."""

    name = "failing"

    def __init__(self):
        self.calls = 0

    def log(self, values, step):
        self.calls += 1
        if self.calls > 1:
            raise OSError(28, "No space left on device")

    def finish(self):
        pass


def test_a_tracker_that_fails_ends_nothing(tmp_path, monkeypatch):
    said, tracker = [], Failing()
    works = Trackers.__init__

    def with_failing(self, accelerator, *rest):
        works(self, accelerator, *rest)
        accelerator.trackers = [tracker]

    monkeypatch.setattr(Trackers, "__init__", with_failing)
    Trainer(small(train__steps=4, train__log_every=1), tmp_path / "run", said.append).run()
    assert tracker.calls == 2
    assert said == ["failing failed, and is left out from now on: No space left on device"]
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4]


# --- a page of what somebody else made --------------------------------------------------------------------------------


def foreign(tmp_path, lines=(), name="run"):
    run = tmp_path / "home" / "me" / name
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_bytes(b"\n".join([b'{"step": 1, "loss": 0.5}', *lines]) + b"\n")
    return run


@pytest.mark.parametrize(
    "line",
    [b'{"step": 9, "loss": "<script>alert(1)</script>"}', b'{"step": 9, "held_out_loss": "</script><script>alert(1)"}',
     b'{"step": 9, "loss": {"a": "<b>"}}', b'{"step": 9, "loss": NaN, "lr": Infinity}', b'{"step": 9, "loss": 1e999}',
     b'{"step": 1' + b"0" * 400 + b"}", b'{"step": "9", "loss": 1}', b'{"step": true, "loss": true}', b"[[" * 9999,
     b'{"step": 9, "loss": ' + b"9" * 5000 + b"}", b'{"step": null}', b"\xff\xfe", b'{"step": 9, "\\ud800": 1}',
     b'{"step": -9, "loss": 1}', b'{"step": 9, "images_per_second": []}', b'{"step": 9.5, "loss": 1}', b"null", b"9"],
    ids=lambda line: repr(line)[:40],
)  # fmt: skip
def test_whatever_stands_in_the_metrics_the_page_shows_numbers(line, tmp_path, monkeypatch, capsys):
    run = foreign(tmp_path, [line])
    page = report([run])
    assert "alert(1)" not in page
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    for plot in data["plots"]:
        for trace in plot["traces"]:
            assert all(type(value) in (int, float) for value in trace["x"] + trace["y"])
    code, _, err = script(command, monkeypatch, capsys, run)
    assert code == 0, err


def test_only_the_formats_that_a_run_writes_are_opened(tmp_path, monkeypatch):
    run = foreign(tmp_path)
    (run / "samples").mkdir()
    started = []
    monkeypatch.setattr(
        "subprocess.Popen.__init__", lambda *a, **k: started.append(a) or (_ for _ in ()).throw(OSError())
    )
    files = {
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
        "text": b"<svg/>",
        "": b"",
    }
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
    for i, content in enumerate([*files.values(), bomb.getvalue(), bomb.getvalue()[:999]]):
        (run / f"samples/step_{i:08d}.png").write_bytes(content)
    (run / "samples/step_x.png").write_bytes(b"no")
    Image.new("L", (90, 90)).save(run / "samples/step_00000099.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as a run with a larger data.max_pixels leaves it
    page = report([run])
    assert not started
    grids = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])["grids"]
    assert [step for step, _ in grids[0]["images"]] == [99]


def test_the_page_names_no_folders(tmp_path, monkeypatch, capsys):
    """It is made to be handed on. Neither names nor text can be markup, or anything but text."""
    secret = tmp_path / "secret folder" / "pictures & <b>"
    for i in range(8):
        write(secret / ["cat", os.fsdecode(b"d\xf6g")][i % 2] / f"{i}.png", pixels(8, 8))
    argv = ["--out", tmp_path / "secret folder/run", *SMALL, "--train.batch_size", 4, "--data.source", "folder",
            "--data.path", secret, "--data.image_size", 8, "--data.channels", 1]  # fmt: skip
    for steps in (3, 4):  # the second start is told of what the first has written
        code, out, err = script(train, monkeypatch, capsys, *argv, "--train.steps", steps)
        assert code == 0, err
        assert "report: " in out
    page = (tmp_path / "secret folder/run/report.html").read_bytes().decode()
    assert "secret folder" not in page
    assert str(tmp_path) not in page
    assert "<b>" not in re.sub(r'<div class="tile"><b>', "", page.split('id="plotly"')[0])
    assert "begun by: train.py --out &#x27;run&#x27; " in page
    assert "python train.py --out RUN\n" in page


def test_a_report_that_fails_never_decides_how_a_run_ends(tmp_path, monkeypatch, capsys):
    def fails(runs):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("diffusion.commands.report.report", fails)
    code, _, err = script(train, monkeypatch, capsys, "--out", tmp_path / "run", *SMALL, "--train.steps", 1)
    assert code == 0
    assert "train.py: no report: division by zero" in err
    monkeypatch.undo()
    (tmp_path / "run/report.html").write_text("mine")
    code, _, err = script(train, monkeypatch, capsys, "--out", tmp_path / "run", "--train.steps", 2)
    assert code == 0
    assert "no report" in err
    assert (tmp_path / "run/report.html").read_text() == "mine"


def test_no_form_of_a_path_stays_whole(tmp_path):
    from diffusion.report.page import _text

    odd = "/home/alice (work)/it's, x=1/pics"
    quoted = odd.replace("'", "''")
    page = _text(f"'{quoted}' {odd}: row 3; file:///home/alice/secret/run host:/home/alice/secret/run", [odd])
    assert "alice" not in page
    assert "secret" not in page
    assert page.count("pics") == 2
    assert _text("a 1/2 images/s, ylecun/mnist, runs/digits") == "a 1/2 images/s, ylecun/mnist, runs/digits"
