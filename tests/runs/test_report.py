"""Reports in a real browser, and trackers."""

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from helpers import SMALL, script
from PIL import Image
from test_sources import pixels, write
from test_trainer import metrics, small

import train
from diffusion import UsageError
from diffusion.commands import report as command
from diffusion.commands.terminal import exit_code
from diffusion.report.page import POINTS, average, read_grids, read_metrics, report, without_folders
from diffusion.training.trackers import Trackers
from diffusion.training.trainer import Trainer

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of the command, whose path has markup and a space, on classes whose names are not UTF-8."""
    folder = tmp_path_factory.mktemp("report") / "secret folder"
    pictures = folder / "pictures & <b>"
    for i in range(16):
        write(pictures / ["cat", os.fsdecode(b"d\xf6g")][i % 2] / f"{i}.png", pixels(8, 8))
    argv = ["train.py", "--out", folder / "run <b>", *SMALL, "--train.batch_size", 4, "--data.source", "folder",
            "--data.path", pictures, "--data.image_size", 8, "--data.channels", 1, "--data.held_out", 0.2,
            "--sample.every", 2]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for steps in (2, 4):  # the second start reads what the first has written
            patch.setattr(sys, "argv", [*map(str, argv), "--train.steps", str(steps)])
            assert exit_code(train.main) == 0
    return folder / "run <b>"


@pytest.fixture(scope="module")
def page(run):
    """The page that training wrote."""
    return (run / "report.html").read_text()


def data_of(page):
    """What the page is made of, for each run."""
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


def opened(path, tmp_path):
    """The page's elements once its scripts have run, without a network."""
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND",
         f"--user-data-dir={tmp_path / 'browser'}", "--virtual-time-budget=20000", "--dump-dom", path.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    return done.stdout


@browser
def test_the_page_draws_its_curves_and_grids_in_a_browser(run, tmp_path):
    """Of two runs, so that they are compared, too."""
    other = shutil.copytree(run, tmp_path / "other", symlinks=True)
    config = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(config.replace("log_every: 1", "log_every: 2"))
    path = tmp_path / "a.html"
    path.write_text(report([run, other]))
    dom = opened(path, tmp_path)
    assert 'data-ready="yes"' in dom
    assert dom.count('class="main-svg"') >= 2 * 5
    for title in ("loss", "loss by quarter of t", "learning rate", "norm of the gradient"):
        assert f"{title}</text>" in dom
    assert dom.count("nsewdrag") >= 5  # what zooming takes hold of
    assert 'data-unformatted="other: loss"' in dom
    assert dom.count('alt="samples at step 4"') == dom.count('src="data:image/webp') == 2
    text = dom.split('id="data"')[0]
    for shown in ("<h1 id=\"title\">run &lt;b&gt;, other</h1>", "<span>held-out loss</span>", "Configuration: other",
                  "<td>train.log_every</td><td>1</td><td>2</td>", "begun by: train.py --out 'run &lt;b&gt;' ",
                  "python train.py --out RUN\n"):  # fmt: skip
        assert shown in text
    assert "<b>" not in re.sub(r'<div class="tile"><b>', "", text)
    assert "http://" not in re.sub(r"http://www.w3.org[^\s\"']*", "", text)


def test_training_ends_with_a_page_that_names_no_folders(run, page):
    """It is made to be handed on."""
    [data] = data_of(page)
    assert data["name"] == "run <b>"
    assert [step for step, _ in data["grids"]] == [2, 4]
    assert data["curves"].keys() >= {"loss", "loss_q1", "held_out_loss", "lr", "grad_norm", "images_per_second"}
    assert data["settings"]["data.path"] == "pictures & <b>"
    assert data["settings"]["model.channel_mult"] == "[1, 2]"
    assert "as 1 x 8 x 8" in data["texts"]["Beginning"]
    assert "classes: cat, d" in data["texts"]["Environment"]
    assert "secret folder" not in page
    assert str(run.parents[1]) not in page
    assert "<b>" not in page.split('id="data"')[1].split("</script>")[0]


def test_the_page_of_a_long_run_stays_small(tmp_path):
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(50, 1_000_001, 50):
            line = {"step": step, "loss": 1 / step, "grad_norm": None, "lr": 1e-3, "images_per_second": 100.0}
            file.write(json.dumps(line | {f"loss_q{q}": 0.1 for q in range(1, 5)}) + "\n")
    curves = average(read_metrics(tmp_path))
    assert len(json.dumps(curves)) < 500_000
    assert 1000 < len(curves["loss"]["x"]) <= POINTS
    assert curves["loss"]["x"][-1] == 1_000_000
    assert curves["loss"]["y"][0] == pytest.approx(sum(1 / step for step in range(50, 701, 50)) / 14, rel=1e-4)
    assert "grad_norm" not in curves


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "No such file or directory: {}/metrics.jsonl"),
        ("", "has no metrics yet"),
        ('{"loss": 1}\n[1]\n{"st', "has no metrics yet"),
    ],
)
def test_a_run_without_metrics_is_named(tmp_path, content, says, monkeypatch, capsys):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    code, _, err = script(command, monkeypatch, capsys, tmp_path)
    assert (code, err.count("\n")) == (2, 1)
    assert says.format(tmp_path) in err


@pytest.mark.parametrize(
    ("out", "says"),
    [("a.pdf", "must be a .html file"), ("{run}/mine.html", "is there already: name another")],
)  # fmt: skip
def test_a_page_replaces_only_pages(run, out, says, monkeypatch, capsys):
    (run / "mine.html").write_text("mine")
    code, _, err = script(command, monkeypatch, capsys, run, "--out", out.replace("{run}", str(run)))
    assert code == 2
    assert says in err
    assert (run / "mine.html").read_text() == "mine"


def test_a_report_that_fails_never_decides_how_a_run_ends(run, monkeypatch, capsys):
    def fails(runs):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("diffusion.commands.report.report", fails)
    code, _, err = script(train, monkeypatch, capsys, "--out", run.with_name("other"), *SMALL, "--train.steps", 1)
    assert code == 0
    assert "train.py: no report: division by zero" in err


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
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [])
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


ODD = [
    b'{"step": 9, "loss": "<script>alert(1)</script>"}', b'{"step": 9, "held_out_loss": "</script><script>alert(1)"}',
    b'{"step": 9, "loss": {"a": "<b>"}}', b'{"step": 9, "loss": NaN, "lr": Infinity}', b'{"step": 9, "loss": 1e999}',
    b'{"step": 1' + b"0" * 400 + b"}", b'{"step": "9", "loss": 1}', b'{"step": true, "loss": true}', b"[[" * 9999,
    b'{"step": 9, "loss": ' + b"9" * 5000 + b"}", b'{"step": null}', b"\xff\xfe", b'{"step": 9, "\\ud800": 1}',
    b'{"step": -9, "loss": 1}', b'{"step": 9, "images_per_second": []}', b'{"step": 9.5, "loss": 1}', b"null", b"9",
    b'{"step": 9, "</script><script>alert(1)": 1}', b'{"step": 12, "loss": 0.',
]  # fmt: skip


def test_whatever_stands_in_the_metrics_the_page_shows_numbers(tmp_path, monkeypatch, capsys):
    """And of the lines around it, all."""
    run = foreign(tmp_path, [line for odd in ODD for line in (odd, b'{"step": 10, "lr": 0.5}')])
    code, _, err = script(command, monkeypatch, capsys, run)
    assert code == 0, err
    page = (run / "report.html").read_text()
    assert "<script>alert(1)" not in page
    [data] = data_of(page)
    for curve in data["curves"].values():
        assert all(type(value) is float for value in curve["x"] + curve["y"])
    assert data["curves"]["lr"] == {"x": [10] * len(ODD), "y": [0.5] * len(ODD)}
    assert data["curves"]["loss"] == {"x": [-9, 1, 9.5], "y": [1, 0.5, 1]}


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
    assert [step for step, _ in read_grids(run, 24)] == [99]
    assert not started


def test_no_form_of_a_path_stays_whole(tmp_path):
    odd = "/home/alice (work)/it's, x=1/pics"
    page = without_folders(
        f"{shlex.quote(odd)} {odd}: row 3; file:///home/alice/secret/run host:/home/alice/secret/run", [odd]
    )
    assert "alice" not in page
    assert "secret" not in page
    assert page.count("pics") == 2
    assert without_folders("a 1/2 images/s, ylecun/mnist, runs/digits") == "a 1/2 images/s, ylecun/mnist, runs/digits"
