"""A run's folder: what marks it, what each command may write, and whose files stay; weights of another run."""

import errno
import hashlib
import json
import os
import re
import shutil

import pytest
import torch
from helpers import SMALL, script
from PIL import Image
from test_trainer import TINY, assert_same_bits, metrics, saved_step, small

import diffusion
import evaluate
import sample
import train
from diffusion import UsageError
from diffusion.commands import card, check_data, convert, report
from diffusion.commands.terminal import check_output
from diffusion.config.files import load_config
from diffusion.files.atomic import written_by
from diffusion.run.checkpoint import Checkpoint, newest
from diffusion.run.folder import OWN, RunFolder, about_run, is_run, mark_run
from diffusion.training.trainer import Trainer

STEP = "step_00000003"
ONE = ["--train.steps", "1", "--train.batch_size", "1", "--sample.n", "1", "--sample.steps", "2"]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A run, a checkpoint alone, and files of somebody's own."""
    root = tmp_path_factory.mktemp("places")
    Trainer(small(train__steps=3, checkpoint__every=2, sample__n=2, **TINY), root / "run").run()
    shutil.copytree(root / "run/checkpoints" / STEP, root / "alone")
    Image.new("L", (9, 9)).save(root / "photo.png")
    for name in ("notes.txt", "notes.md", "page.html", "numbers.json", "animation.gif", "a.npz", "a.pt"):
        (root / name).write_text("mine")
    (root / "folder").mkdir()
    (root / "folder/notes.txt").write_text("mine")
    (root / "broken.png").symlink_to(root / "nowhere.png")
    os.mkfifo(root / "pipe.png")
    return root


def listing(root):
    """Every file and folder, and what is in it."""
    return {
        str(path.relative_to(root)): os.readlink(path) if path.is_symlink()
        else hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in root.rglob("*")
    }  # fmt: skip


# --- what each command may write --------------------------------------------------------------------------------------

CHECKPOINT = [f"checkpoints/STEP{name}" for name in
              ("", "/SHA256SUMS", "/config.yaml", "/ema_0.999.safetensors", "/model.safetensors", "/state.json",
               "/training.safetensors")]  # fmt: skip
BEGUN = ["", "/run.json", "/config.yaml", "/metrics.jsonl", "/report.html", "/samples", "/samples/step_00000001.png",
         "/checkpoints", *(f"/{name}".replace("STEP", "step_00000001") for name in CHECKPOINT)]  # fmt: skip
DRAW = ["--ckpt", "run", "--n", "1", "--steps", "2"]
SCORE = ["--ckpt", "run", "--n", "1", "--steps", "1"]
KEPT = ["run/scores.jsonl", "run/report.html"]
NEAREST = ["--ckpt", "run", "--metric", "nearest", "--features", "pixels", "--n", "2", "--steps", "2"]
WRITES = {
    "train, a new run": (train, ["--out", "new", *ONE], [f"new{name}" for name in BEGUN]),
    "train, with its weights": (train, ["--train.init_from", "run", "--out", "new", *ONE],
                                [f"new{name}" for name in BEGUN]),
    "train, the run goes on": (
        train, ["--out", "run", "--train.steps", "4"],
        [f"run/{name}" for name in ("config.yaml", "metrics.jsonl", "report.html",
                                    "samples/step_00000004.png",
                                    *(name.replace("STEP", "step_00000004") for name in CHECKPOINT))]),
    "train, a run that is done": (train, ["--out", "run"], ["run/report.html"]),
    "train, a dry run": (train, ["--dry_run", *ONE], []),
    "sample": (sample, DRAW, [f"run/samples/{STEP}_dpmpp2_seed0.png"]),
    "sample, of a checkpoint alone": (sample, ["--ckpt", "alone", *DRAW[2:]],
                                      ["samples", "samples/alone_dpmpp2_seed0.png"]),
    "sample, images": (sample, [*DRAW, "--images", "--out", "new"], ["new", "new/000000.png", "new/samples.json"]),
    "sample, an array": (sample, [*DRAW, "--npz", "--out", "new.npz"], ["new.npz"]),
    "evaluate": (evaluate, SCORE, KEPT),
    "evaluate, into a file": (evaluate, [*SCORE, "--out", "new/x.json"], [*KEPT, "new", "new/x.json"]),
    "evaluate, nearest": (evaluate, NEAREST, [*KEPT, f"run/samples/nearest_{STEP}_0.999.png"]),
    "evaluate, nearest, a sheet": (evaluate, [*NEAREST, "--sheet", "s.png"], [*KEPT, "s.png"]),
    "report": (report, ["run"], ["run/report.html"]),
    "report, of several": (report, ["run", "run"], ["report.html"]),
    "card": (card, ["run"], ["run/README.md"]),
    "card, elsewhere": (card, ["run", "--out", "new/card.md"], ["new", "new/card.md"]),
    "check-data": (check_data, [], ["check-data.png"]),
    "convert": (convert, ["openai", "run", "--out", "new/x.pt"], ["new", "new/x.pt"]),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITES)
def test_a_command_writes_what_the_table_says_and_nothing_else(places, tmp_path, name, monkeypatch, capsys):
    module, argv, writes = WRITES[name]
    root = shutil.copytree(places, tmp_path / "root", symlinks=True, ignore=shutil.ignore_patterns("pipe.png"))
    before = listing(root)
    monkeypatch.chdir(root)
    code, _, err = script(module, monkeypatch, capsys, *argv)
    assert code == 0, err
    after = listing(root)
    assert before.keys() <= after.keys()
    changed = {path for path in after if after[path] != before.get(path)}
    assert changed == set(writes)  # run.json names the last process, which is this one here


@pytest.mark.parametrize(
    ("module", "argv"),
    [
        (train, ["--out", "alone"]),
        (train, ["--out", "notes.txt"]),
        (train, ["--out", "run", "--model.num_res_blocks", "2"]),
        *((sample, [*DRAW, "--out", name]) for name in ("photo.png", "folder", "broken.png", "pipe.png", "notes.txt")),
        (sample, [*DRAW, "--images", "--out", "folder"]),
        (sample, [*DRAW, "--images", "--out", "run"]),
        (sample, [*DRAW, "--images", "--out", "notes.txt"]),
        (sample, [*DRAW, "--npz", "--out", "a.npz"]),
        (evaluate, [*SCORE, "--out", "numbers.json"]),
        (evaluate, [*SCORE, "--out", "run/metrics.jsonl"]),
        (evaluate, [*NEAREST, "--sheet", "photo.png"]),
        (evaluate, [*NEAREST, "--sheet", f"run/checkpoints/{STEP}/state.json"]),
        (report, ["run", "--out", "page.html"]),
        (report, ["run", "--out", "notes.txt"]),
        (card, ["run", "--out", "notes.md"]),
        (check_data, ["--sheet", "photo.png"]),
        (convert, ["openai", "run", "--out", "a.pt"]),
        (convert, ["openai", "run", "--out", "folder"]),
        (convert, ["diffusers", "run", "--out", "."]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value.__name__.split(".")[-1],
)  # fmt: skip
def test_what_is_there_already_is_not_replaced(places, module, argv, monkeypatch, capsys):
    before = listing(places)
    monkeypatch.chdir(places)
    code, _, err = script(module, monkeypatch, capsys, *argv)
    assert code == 2
    assert err.rstrip().splitlines()[-1].startswith(f"{module.__name__.split('.')[-1]}.py: ")
    assert "Traceback" not in err
    assert listing(places) == before


def test_an_output_replaces_what_the_same_command_wrote(tmp_path):
    path, mark = tmp_path / "a.png", written_by("written by us")
    check_output(path, "--sheet", ".png", mark)
    path.write_bytes(b"\x89PNG written by us")
    check_output(path, "--sheet", ".png", mark)
    with pytest.raises(UsageError, match=r"--sheet .*a\.png is there already: name another, or remove it"):
        check_output(path, "--sheet", ".png")
    with pytest.raises(UsageError, match=r"it must be a \.html file"):
        check_output(path, "--out", ".html", mark)


def test_what_the_same_command_wrote_is_written_anew(places, tmp_path, monkeypatch, capsys):
    sheet = ["--ckpt", places / "run", *NEAREST[2:], "--sheet"]
    for module, argv, out in ((report, [places / "run", "--out"], "a.html"), (check_data, ["--sheet"], "a.png"),
                              (evaluate, sheet, "b.png")):  # fmt: skip
        for _ in range(2):
            code, _, err = script(module, monkeypatch, capsys, *argv, tmp_path / out)
            assert code == 0, err
    code, _, err = script(check_data, monkeypatch, capsys, "--sheet", tmp_path / "b.png")
    assert code == 2
    assert "is there already" in err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (
            ["--out", f"run/checkpoints/{STEP}"],
            f"is a checkpoint: name run, or --train.init_from run/checkpoints/{STEP}",
        ),
        (["--out", "run/checkpoints"], "lies in a run: name ROOT/run to continue it, or a folder outside it"),
        (["--out", "run/samples/new"], "lies in a run: name ROOT/run to continue it"),
        (["--out", "alone"], "or --train.init_from alone --out NEW"),
        (["--config", f"run/checkpoints/{STEP}/config.yaml"], "add --out with a folder for the run"),
        (["--config", "run"], "--config run is not a file"),
        (["--resume", "run"], "--out RUN continues a run"),
        (["run"], "unrecognized arguments: run (a run's folder is given by --out)"),
        (["--out", "run", "--model.num_res_blocks", "2"], "was 1 and is 2, in the run run"),
        (["--out", "new", "--train.init_from", "run/samples"], "is not a run or a checkpoint: name ROOT/run"),
        (["--out", "new", "--train.init_from", "nowhere"], "nowhere does not exist"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_to_do_instead_is_said(places, argv, says, monkeypatch, capsys):
    monkeypatch.chdir(places)
    code, _, err = script(train, monkeypatch, capsys, *argv)
    assert code == 2
    assert says.replace("ROOT", str(places.resolve())) in err
    assert err.count("\n") == 1
    assert not (places / "new").exists()


def test_a_run_continues_by_its_folder_alone_and_with_its_own_settings(tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    flags = [*SMALL, "--train.steps", "1", "--train.lr", "3e-4", "--model.dropout", "0.1"]
    assert script(train, monkeypatch, capsys, "--out", out, *flags)[0] == 0
    assert any(line.startswith("begun by: train.py --out ") for line in about_run(out))
    code, said, err = script(train, monkeypatch, capsys, "--out", out, "--train.steps", 2, "--train.lr", "1e-4")
    assert code == 0
    assert "continues after step 1" in said
    assert "changed since step 1: train.steps was 1 and is 2; train.lr was 0.0003 and is 0.0001" in err
    assert newest(out, Checkpoint.files)[0].config.model.dropout == 0.1
    assert any(line.startswith("begun by: ") for line in about_run(out))


# --- whose folder it is -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted({*OWN, "samples/step_00000003.png", "checkpoints/.step_mine.tmp/x"}))
def test_a_folder_that_holds_what_a_run_writes_and_is_not_one_is_refused(name, tmp_path):
    mine = tmp_path / "d" / name
    mine.parent.mkdir(parents=True)
    mine.symlink_to(tmp_path) if name == "best" else mine.write_text("notes")
    before = listing(tmp_path)
    says = "holds a config.yaml with something else in it" if name == "config.yaml" else "and is not a run"
    with pytest.raises(UsageError, match=rf"--out .* {says}"):
        Trainer(small(), tmp_path / "d")
    assert listing(tmp_path) == before


@pytest.mark.parametrize("mark", ['{"command": "train.py", "status": "COMPLETED"}', "[1]", "null"])
def test_another_programs_run_json_is_no_run_to_begin_in(mark, tmp_path):
    (tmp_path / "run.json").write_text(mark)
    (tmp_path / "config.yaml").write_text("model: resnet")
    before = listing(tmp_path)
    with pytest.raises(UsageError, match=r"holds a run\.json of something else: name another folder"):
        Trainer(small(), tmp_path)
    assert listing(tmp_path) == before


def test_a_config_that_is_none_of_ours_is_kept_beside_a_runs_own(tmp_path):
    mark_run(tmp_path, [])  # as a kill leaves it, of a start in a folder with a file of somebody else
    (tmp_path / "config.yaml").write_text("model: resnet")
    folder = RunFolder(tmp_path)
    folder.begin(small(), 0)
    folder.close()
    [kept] = tmp_path.glob("config_*.yaml")
    assert kept.read_text() == "model: resnet"
    assert load_config(tmp_path / "config.yaml") == small()


def test_a_run_may_have_a_name_like_a_checkpoints(places, tmp_path):
    shutil.copytree(places / "run", tmp_path / "step_1")
    assert diffusion.load(tmp_path / "step_1").saved.step == 3
    copied = shutil.copytree(places / "run/checkpoints" / STEP, tmp_path / f"{STEP}_backup")
    assert diffusion.load(copied, 0.999).saved.step == 3


def test_a_run_may_begin_beside_files_of_others(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    folder = RunFolder(tmp_path)
    folder.begin(small(), 0)
    folder.close()
    assert is_run(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_folder_that_was_not_begun_leaves_no_trace(tmp_path):
    RunFolder(tmp_path / "a/b").close()
    assert list(tmp_path.iterdir()) == []


def test_a_start_that_was_killed_at_once_is_begun_again(tmp_path):
    (tmp_path / "run.json").touch()
    folder = RunFolder(tmp_path)
    folder.begin(small(), 0)
    folder.close()
    assert json.loads((tmp_path / "run.json").read_text())["process"] == os.getpid()


def test_a_configuration_in_its_own_folder_stays_as_it_was_written(tmp_path, monkeypatch, capsys):
    text = "# my run\ntrain: {steps: 1, batch_size: 8}\nsample: {n: 2, steps: 2}\n"
    (tmp_path / "config.yaml").write_text(text)
    argv = ["--config", tmp_path / "config.yaml", "--out", tmp_path]
    code, _, err = script(train, monkeypatch, capsys, *argv, "--train.steps", 2)
    assert code == 2
    assert "holds a config.yaml with something else in it: name another folder" in err
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    code, _, err = script(train, monkeypatch, capsys, *argv)
    assert code == 0, err
    assert (tmp_path / "config.yaml").read_text() == text
    code, _, err = script(train, monkeypatch, capsys, "--out", tmp_path, "--train.steps", 2)
    assert code == 0, err
    assert "steps: 2" in (tmp_path / "config.yaml").read_text()
    [kept] = tmp_path.glob("config_*.yaml")
    assert kept.read_text() == text


def test_files_of_others_in_a_run_stay(tmp_path):
    config = dict(data__held_out=0.1, diffusion__steps=10, **TINY)
    Trainer(small(train__steps=1, **config), tmp_path).run()
    assert os.readlink(tmp_path / "best") == "checkpoints/step_00000001"
    (tmp_path / "checkpoints/.step_mine.tmp").mkdir()
    (tmp_path / "checkpoints/.step_00000009.tmp").mkdir()
    (tmp_path / "best").unlink()
    (tmp_path / "best").mkdir()
    Trainer(small(train__steps=2, **config), tmp_path).run()
    assert (tmp_path / "checkpoints/.step_mine.tmp").exists()
    assert not (tmp_path / "checkpoints/.step_00000009.tmp").exists()
    assert (tmp_path / "best").is_dir()
    assert not (tmp_path / "best").is_symlink()


def test_a_dangling_link_stays_and_is_named(tmp_path):
    """A disk that is not mounted: training must not go on in a folder of the same name."""
    (tmp_path / "runs").symlink_to("/mnt/notmounted")
    for out in ("runs", "runs/x"):
        with pytest.raises(UsageError, match=rf"--out .*/{out} cannot be written: "):
            RunFolder(tmp_path / out)
        assert (tmp_path / "runs").is_symlink()


@pytest.mark.parametrize("text", ["a: !!bool maybe", "a: !!timestamp x", "[" * 3000])
def test_somebody_elses_files_in_a_parent_are_not_a_run(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    (tmp_path / "metrics.jsonl").write_text("{}")
    folder = RunFolder(tmp_path / "sub/run")
    folder.begin(small(), 0)
    folder.close()


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    import fcntl

    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    heard = []
    RunFolder(tmp_path / "run", warn=heard.append).close()
    assert "has no locks" in heard[0]


def test_a_colleague_may_read_what_the_umask_lets(tmp_path):
    before = os.umask(0o002)
    try:
        Trainer(small(train__steps=1, **TINY), tmp_path / "run").run()
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in files} == {path.name: "0o664" for path in files}


# --- metrics ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "kept"),
    [("", False), ("\0" * 40, False), ('{"step": NaN}', False), ("[" * 10_000, False), ('{"loss": 1}', False),
     ('{"st', False), ('{"step": 3, "loss": 1}', False), ('{"step": 2, "loss": 1}', True)],
)  # fmt: skip
@pytest.mark.parametrize("end", ["\n", ""])
def test_a_bad_line_of_the_metrics_is_put_aside(tmp_path, line, kept, end):
    """So is one of a later step; the last one may lack its end."""
    good = '{"step": 1, "loss": 2}\n'
    (tmp_path / "run.json").touch()
    (tmp_path / "metrics.jsonl").write_text(f"{good}{line}{end}")
    folder = RunFolder(tmp_path)
    assert folder.begin(small(), 2) == (3 if "3" in line else 0)
    folder.close()
    assert (tmp_path / "metrics.jsonl").read_text() == good + f"{line}\n" * kept
    if not kept and line + end:
        assert (tmp_path / "metrics_superseded.jsonl").read_text() == f"{line}\n"


def test_a_run_whose_checkpoints_are_gone_says_so_and_keeps_its_history(tmp_path):
    Trainer(small(train__steps=2, **TINY), tmp_path).run()
    history = (tmp_path / "metrics.jsonl").read_text()
    shutil.rmtree(tmp_path / "checkpoints")
    heard = []
    Trainer(small(train__steps=2, **TINY), tmp_path, warn=heard.append).close()
    assert "no checkpoint is left of the run" in heard[0]
    assert "had reached step 2" in heard[0]
    assert (tmp_path / "metrics_superseded.jsonl").read_text() == history


def test_metrics_that_cannot_be_written_do_not_cost_the_steps(tmp_path):
    config = small(train__steps=3, train__log_every=1, **TINY)
    trainer = Trainer(config, tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    says = r"metrics.jsonl cannot be written: .*; the checkpoints up to step 1 are whole"
    with pytest.raises(UsageError, match=says):
        trainer.run()
    (tmp_path / "metrics.jsonl").rmdir()
    assert saved_step(tmp_path) == 1
    trainer = Trainer(config, tmp_path)
    (tmp_path / "metrics.jsonl").unlink()  # as log rotation does
    trainer.run()
    assert [line["step"] for line in metrics(tmp_path)] == [2, 3]


# --- weights of another run -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    out = tmp_path_factory.mktemp("source") / "run"
    Trainer(small(train__steps=2, train__lr=1e-2, train__ema_rates=(0.5, 0.9)), out).run()
    return out


def named(folder, *classes):
    """A folder of noise images in class folders."""
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(4):
            Image.effect_noise((8, 8), 50 + i).save(folder / name / f"{i}.png")
    return folder


def test_a_run_begins_with_the_average_of_another(source, tmp_path):
    heard = []
    changes = dict(train__batch_size=8, train__seed=5, train__ema_rates=(0.9,), diffusion__loss="mse",
                   data__image_size=16, train__steps=1, train__init_from=str(source))  # fmt: skip
    trainer = Trainer(small(**changes), tmp_path / "run", warn=heard.append)
    saved, average = newest(source, Checkpoint.weights)
    assert_same_bits(dict(trainer.network.state_dict()), average)
    assert_same_bits(trainer.ema.averages[0.9], average)
    assert trainer.step == 0
    assert not trainer.training_step.optimizer.state_dict()["state"]
    assert heard == []
    trainer.run()
    origin = json.loads((tmp_path / "run/checkpoints/step_00000001/state.json").read_text())["origin"]
    file = saved.path / origin["file"]
    assert (origin["path"], origin["step"], file.name) == (str(saved.path), 2, "ema_0.5.safetensors")
    assert origin["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    shutil.move(source, source.with_name("gone"))
    try:  # once begun, the run does not need the other, named or not
        for init_from in (str(source), None):
            changes |= dict(train__steps=trainer.step + 1, train__init_from=init_from)
            trainer = Trainer(small(**changes), tmp_path / "run")
            trainer.run()
        assert newest(tmp_path / "run", Checkpoint.files)[0].origin == origin
    finally:
        shutil.move(source.with_name("gone"), source)


def test_classes_are_taken_over_by_name(source, tmp_path):
    heard = []
    data = named(tmp_path / "data", "7", "cat", "0")
    trainer = Trainer(small(data__source="folder", data__path=str(data), train__batch_size=4, train__seed=1,
                            train__init_from=str(source)), tmp_path / "run", warn=heard.append)  # fmt: skip
    assert trainer.class_names == ("0", "7", "cat")
    before, mine = (
        x["label_emb.weight"] for x in (newest(source, Checkpoint.weights)[1], trainer.network.state_dict())
    )
    assert torch.equal(mine[:2], before[[0, 7]])
    assert not any(torch.equal(mine[2], row) for row in before)
    assert heard == ["train.init_from: 1 of 3 classes are new and begin anew: cat"]
    trainer.close()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data__channels": 3}, "3 of 129 weights begin anew (0.3% of the parameters): input_blocks.0.0.weight is"),
        ({"model__class_cond": False}, "1 of its 129 weights are unused: label_emb.weight"),
        ({"diffusion__prediction": "x_start"}, "other settings: diffusion.prediction was v and is x_start"),
        ({"model__num_heads": 4}, "other settings: model.num_heads was 2 and is 4"),
    ],
)
def test_what_does_not_fit_is_named(source, tmp_path, changes, says):
    heard = []
    Trainer(small(train__init_from=str(source), **changes), tmp_path / "run", warn=heard.append).close()
    assert says in "; ".join(heard)


def test_weights_of_which_nothing_fits_are_refused(source, tmp_path):
    says = r"no weight of .* fits \(model\.model_channels was 32 and is 96; .* settings too"
    with pytest.raises(UsageError, match=says):
        Trainer(small(train__init_from=str(source), model__model_channels=96, model__num_heads=1), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- files beside an output -------------------------------------------------------------------------------------------


def test_a_conversion_removes_nothing_beside_it(places, tmp_path, monkeypatch, capsys):
    (tmp_path / ".new.pt.tmp").mkdir()
    (tmp_path / ".new.pt.tmp/precious.txt").write_text("x")
    code, _, err = script(convert, monkeypatch, capsys, "openai", places / "run", "--out", tmp_path / "new.pt")
    assert code == 0, err
    assert sorted(path.name for path in tmp_path.iterdir()) == [".new.pt.tmp", "new.pt"]
    assert (tmp_path / ".new.pt.tmp/precious.txt").exists()


def test_a_link_is_what_it_leads_to(places, tmp_path, monkeypatch, capsys):
    run = shutil.copytree(places / "run", tmp_path / "run")
    (tmp_path / "link").symlink_to(run / "checkpoints" / STEP)
    code, said, _ = script(sample, monkeypatch, capsys, "--ckpt", tmp_path / "link", "--n", 1, "--steps", 2)
    assert code == 0
    assert str(run / "samples") in said


def test_a_path_inside_a_run_names_the_run(places, monkeypatch, capsys):
    for path, around in (("samples", "run"), (f"checkpoints/{STEP}/model.safetensors", f"run/checkpoints/{STEP}")):
        code, _, err = script(sample, monkeypatch, capsys, "--ckpt", places / "run" / path)
        assert code == 2
        assert re.search(rf"is not a run or a checkpoint: name .*/{around}$", err.rstrip())
