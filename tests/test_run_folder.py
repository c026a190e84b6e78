"""What a person may point a command at, and that it changes nothing which existed; going back; weights of others."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers import SMALL
from PIL import Image
from test_scripts import script
from test_trainer import assert_same_bits, metrics, small

import evaluate
import sample
import train
from diffusion import UsageError
from diffusion.commands import check_data, convert, report, schema
from diffusion.run import checkpoint
from diffusion.run.folder import go_back, locate
from diffusion.training.trainer import Trainer

STEP = "step_00000003"
NEW = ["missing/one/new.png", "empty/new.png", "animation.png"]
FOREIGN = ["data.txt", "report.html", "metrics.jsonl", "metrics_superseded.jsonl", ".lock", "best", "trackers/x",
           "samples/step_00000003.png", "checkpoints/.step_mine.tmp/x"]  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A run, what lies in it, a copy of it, a copy of a checkpoint alone, and a link to each of these."""
    root = tmp_path_factory.mktemp("places")
    Trainer(small(train__steps=3, checkpoint__every=2, sample__every=2, sample__n=2), root / "run").run()
    shutil.copytree(root / "run", root / "copy")
    shutil.copytree(root / "run/checkpoints" / STEP, root / "alone")
    things = [
        "run", "run/checkpoints", "run/samples", "run/config.yaml", "run/metrics.jsonl", f"run/samples/{STEP}.png",
        f"run/checkpoints/{STEP}", *(f"run/checkpoints/{STEP}/{name}" for name in
                                     ("config.yaml", "state.json", "model.safetensors", "training.pt", "SHA256SUMS")),
        "copy", f"copy/checkpoints/{STEP}", "copy/config.yaml", "alone", "alone/config.yaml",
    ]  # fmt: skip
    # Somebody's own: files that look like each output, an empty folder, a broken link, a pipe; and what is not there.
    things += [
        "notes.txt",
        "photo.png",
        "page.html",
        "numbers.json",
        "animation.gif",
        "empty",
        "broken.png",
        "pipe.png",
    ]
    Image.new("L", (9, 9)).save(root / "photo.png")
    for name in ("notes.txt", "page.html", "numbers.json", "animation.gif"):
        (root / name).write_text("mine")
    (root / "empty").mkdir()
    (root / "broken.png").symlink_to(root / "nowhere.png")
    os.mkfifo(root / "pipe.png")
    things += NEW
    (root / "links").mkdir()
    for i, thing in enumerate(
        thing for thing in list(things) if Path(thing).suffix not in (".json", ".pt", ".safetensors", ".gif")
    ):
        link = f"links/{i}_{Path(thing).name}"
        (root / link).symlink_to(root / thing)
        things.append(link)
    return root, things


def listing(root):
    """Every file and folder, and what is in it."""
    return {
        path: os.readlink(path) if path.is_symlink()
        else hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in root.rglob("*")
    }  # fmt: skip


ONE = ["--train.steps", "1", "--train.batch_size", "1", "--sample.n", "1", "--sample.steps", "2"]
COMMANDS = {
    "train --out": (train, ["--out", "IT"]),
    "train --out, with settings": (train, ["--out", "IT", "--train.steps", "3"]),
    "train --config": (train, ["--config", "IT"]),
    "train --config --out": (train, ["--config", "IT", "--out", "NEW", *ONE]),
    "train --data.path": (train, ["--data.source", "folder", "--data.image_size", "8", "--data.channels", "1",
                                  "--data.path", "IT", "--model.class_cond", "false",
                                  "--out", "NEW", *ONE]),
    "train --train.init_from": (train, ["--train.init_from", "IT", "--out", "NEW", *ONE]),
    "train --back_to": (train, ["--out", "IT", "--back_to", "3"]),
    "sample --ckpt": (sample, ["--ckpt", "IT", "--n", "1", "--steps", "2"]),
    "sample --out": (sample, ["--ckpt", "RUN", "--n", "1", "--steps", "2", "--out", "IT"]),
    "sample --images --out": (sample, ["--ckpt", "RUN", "--n", "1", "--steps", "2", "--images", "--out", "IT"]),
    "sample --npz --out": (sample, ["--ckpt", "RUN", "--n", "1", "--steps", "2", "--npz", "--out", "IT"]),
    "evaluate --ckpt": (evaluate, ["--ckpt", "IT", "--n", "1", "--steps", "1"]),
    "evaluate --out": (evaluate, ["--ckpt", "RUN", "--n", "1", "--steps", "1", "--out", "IT"]),
    "sample --chain": (sample, ["--ckpt", "RUN", "--n", "1", "--steps", "2", "--out", "made.png", "--chain", "IT"]),
    "evaluate --sheet": (evaluate, ["--ckpt", "RUN", "--metric", "nearest", "--features", "pixels", "--n", "2",
                                    "--steps", "2", "--sheet", "IT"]),
    "report --out": (report, ["RUN", "--out", "IT"]),
    "report of several --out": (report, ["RUN", "copy", "--out", "IT"]),
    "check-data --sheet": (check_data, ["--sheet", "IT"]),
    "schema --out": (schema, ["--out", "IT"]),
    "convert": (convert, ["openai", "IT", "--out", "NEW"]),
    "convert --out": (convert, ["openai", "RUN", "--out", "IT"]),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_nothing_that_existed_is_changed_by_pointing_at_it(places, name, monkeypatch, capsys):
    root, things = places
    module, argv = COMMANDS[name]
    before = listing(root)
    monkeypatch.chdir(root)
    codes = set()
    for thing in things:
        if module is train and (thing in NEW or Path(thing).resolve() == root / "empty"):  # where a run may begin
            continue
        words = {"IT": thing, "RUN": "run", "NEW": "new"}
        code, _, err = script(module, monkeypatch, capsys, *(words.get(word, word) for word in argv))
        assert code in (0, 2), (thing, err)
        codes.add(code)
        assert "Traceback" not in err
        if code == 2:
            assert err.rstrip().splitlines()[-1].startswith(f"{module.__name__}.py: "), (thing, err)
        after = listing(root)
        assert {path: after.get(path) for path in before} == before, thing
        for path in after.keys() - before.keys():
            inside = path.relative_to(root)
            if inside.parts[0] not in {"new", "missing", "empty", "made.png", "animation.png"}:
                assert "samples" in inside.parts or path.name == ".lock", (thing, path)
                assert "checkpoints" not in inside.parts, (thing, path)
                assert inside.parts[0] != "alone", (thing, path)
        shutil.rmtree("new", ignore_errors=True)
        Path("new").unlink(missing_ok=True)
        for path in sorted(after.keys() - before.keys(), reverse=True):
            if path.exists():
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    assert 2 in codes


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--out", f"run/checkpoints/{STEP}"], "--out run --back_to 3, or begin another run with its weights with"),
        (["--out", f"run/checkpoints/{STEP}/x"], f"lies in the checkpoint {STEP} of the run"),
        (["--out", "alone"], "is the checkpoint ROOT/alone: begin another run with its weights"),
        (["--out", "run/checkpoints"], "lies in the run ROOT/run: continue that with --out ROOT/run"),
        (["--out", "run/samples/new"], "lies in the run ROOT/run"),
        (["--config", f"run/checkpoints/{STEP}/config.yaml"], f"belongs to the checkpoint {STEP} of the run ROOT/run"),
        (["--config", "run"], "--config run is a run's folder: continue it with --out run"),
        (["--resume", "run"], "a run is continued by its own folder, --out RUN"),
        (["--ckpt", "run"], "a run is continued by its own folder, --out RUN"),
        (["--out", "run", "--back_to", "1"], "the run run has no checkpoint of that step; it has 2, 3"),
        (["--back_to", "1"], "--back_to is 1: add --out"),
        (["--out", "run", "--back_to", "run/x"], "it is 'run/x'; it must be a step, such as 300"),
        (["run"], "unrecognized arguments: run (a run's folder is given by --out)"),
        (["--out", "new", "--train.init_from", "run/checkpoints"], "lies in the run ROOT/run: name that folder"),
        (["--out", "nowhere", "--back_to", "1"], "--out nowhere is no run that has saved a checkpoint"),
        (["--out", "run", "--model.num_res_blocks", "2"], "and 1 in the run run that this would continue"),
        (["--out", "new", "--train.init_from", "run/samples"], "lies in the run ROOT/run: name that folder"),
        (["--out", "new", "--train.init_from", "nowhere"], "checkpoint nowhere is not there"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_to_do_instead_is_said(places, argv, says, monkeypatch, capsys):
    root, _ = places
    monkeypatch.chdir(root)
    code, _, err = script(train, monkeypatch, capsys, *argv)
    assert code == 2
    assert says.replace("ROOT", str(root.resolve())) in err.replace(
        f"--out {root.resolve()}/run --back", "--out run --back"
    )
    assert err.count("\n") == 1


def test_a_run_continues_by_its_folder_alone_and_with_its_own_settings(tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    flags = [*SMALL, "--train.lr", "3e-4", "--model.dropout", "0.1"]
    assert script(train, monkeypatch, capsys, "--out", out, *flags)[0] == 0
    code, said, err = script(train, monkeypatch, capsys, "--out", out, "--train.steps", 4, "--train.lr", "1e-4")
    assert code == 0
    assert "continues after step 3" in said
    assert "changed since step 3: train.steps was 3 and is 4; train.lr was 0.0003 and is 0.0001" in err
    assert checkpoint.open_checkpoint(out).config.model.dropout == 0.1


def test_a_run_goes_back_and_nothing_is_lost(tmp_path, monkeypatch, capsys):
    config = small(train__steps=6, checkpoint__every=2, sample__every=2, train__log_every=1)
    run = tmp_path / "run"
    Trainer(config, run).run()
    before = {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    code, said, _ = script(train, monkeypatch, capsys, "--out", run, "--back_to", "step_00000002")
    assert code == 0
    assert "is back at step 2; what came later is in" in said
    (aside,) = run.glob("after_step_00000002_*")
    kept = {path.relative_to(folder): path.read_bytes() for folder in (run, aside) for path in folder.rglob("*")
            if path.is_file() and (folder == aside or aside not in path.parents)}  # fmt: skip
    for path in before.keys() - {Path("metrics.jsonl"), Path(".lock")}:
        assert kept[path] == before[path], path
    assert (aside / "metrics.jsonl").read_bytes() == before[Path("metrics.jsonl")]
    assert [line["step"] for line in metrics(run)] == [1, 2]
    assert checkpoint.open_checkpoint(aside).step == 6  # a run of its own
    trainer = Trainer(config, run)
    assert trainer.step == 2
    trainer.run()
    for name in ("model.safetensors", "ema_0.999.safetensors", "training.pt"):
        path = Path("checkpoints/step_00000006", name)
        assert (run / path).read_bytes() == before[path]
    assert script(train, monkeypatch, capsys, "--out", run, "--back_to", 6)[1].count("has nothing later") == 1


def test_going_back_waits_for_nobody(tmp_path):
    config = small(train__steps=2, checkpoint__every=1)
    Trainer(config, tmp_path).run()
    trainer = Trainer(small(train__steps=3), tmp_path)
    with pytest.raises(UsageError, match="is in use by another process"):
        go_back(tmp_path, 1)
    trainer.close()
    assert go_back(tmp_path, 1) is not None


def test_a_link_is_what_it_leads_to(tmp_path, monkeypatch, capsys):
    Trainer(small(train__steps=1), tmp_path / "run").run()
    (tmp_path / "link").symlink_to(tmp_path / "run/checkpoints/step_00000001")
    assert locate(tmp_path / "link").run == tmp_path / "run"
    code, said, _ = script(sample, monkeypatch, capsys, "--ckpt", tmp_path / "link", "--n", 1, "--steps", 2)
    assert code == 0
    assert str(tmp_path / "run/samples") in said


# --- weights of another run -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    out = tmp_path_factory.mktemp("source") / "run"
    Trainer(small(train__steps=4, train__lr=1e-2, train__ema_rates=(0.5, 0.9)), out).run()
    return out


def named(folder, *classes):
    """A folder of noise images in class folders."""
    from PIL import Image

    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(4):
            Image.effect_noise((8, 8), 50 + i).save(folder / name / f"{i}.png")
    return folder


def test_a_run_begins_with_the_average_of_another(source, tmp_path):
    heard = []
    changes = dict(train__batch_size=8, train__seed=5, train__ema_rates=(0.9,), diffusion__loss="mse",
                   data__image_size=16, train__steps=2, train__init_from=str(source))  # fmt: skip
    trainer = Trainer(small(**changes), tmp_path / "run", warn=heard.append)
    saved = checkpoint.open_checkpoint(source)
    assert_same_bits(dict(trainer.network.state_dict()), saved.ema(0.5))
    assert_same_bits(trainer.ema.averages[0.9], saved.ema(0.5))
    assert trainer.step == 0
    assert not trainer.training_step.optimizer.state_dict()["state"]
    assert heard == []
    trainer.run()
    origin = json.loads((tmp_path / "run/checkpoints/step_00000002/state.json").read_text())["origin"]
    file = saved.path / origin["file"]
    assert (origin["path"], origin["step"]) == (str(saved.path), 4)
    assert origin["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    shutil.move(source, source.with_name("gone"))
    try:  # once begun, the run needs the other no more, named or not
        for init_from in (str(source), None):
            changes |= dict(train__steps=trainer.step + 1, train__init_from=init_from)
            trainer = Trainer(small(**changes), tmp_path / "run")
            trainer.run()
        assert checkpoint.open_checkpoint(tmp_path / "run").origin == origin
    finally:
        shutil.move(source.with_name("gone"), source)


def test_classes_are_taken_over_by_name(source, tmp_path):
    heard = []
    data = named(tmp_path / "data", "7", "cat", "0")
    trainer = Trainer(small(data__source="folder", data__path=str(data), train__batch_size=4,
                            train__init_from=str(source)), tmp_path / "run", warn=heard.append)  # fmt: skip
    assert trainer.class_names == ("0", "7", "cat")
    theirs, mine = (
        x["label_emb.weight"] for x in (checkpoint.open_checkpoint(source).ema(0.5), trainer.network.state_dict())
    )
    assert torch.equal(mine[:2], theirs[[0, 7]])
    assert not any(torch.equal(mine[2], row) for row in theirs)
    assert heard == ["train.init_from: 1 of 3 classes are new and begin anew: cat"]
    trainer.close()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data__channels": 3}, "3 of 129 weights begin anew (0.3% of the parameters): input_blocks.0.0.weight is"),
        ({"model__class_cond": False}, "of it have no place here: label_emb.weight"),
        ({"diffusion__prediction": "x_start"}, "other settings: diffusion.prediction was v and is x_start"),
        ({"model__num_heads": 4}, "other settings: model.num_heads was 2 and is 4"),
        ({"train__ema_warmup": False, "train__ema_rates": (0.9999,)}, "follows the weights within some 10000 steps"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(source, tmp_path, changes, says):
    heard = []
    Trainer(small(train__init_from=str(source), **changes), tmp_path / "run", warn=heard.append).close()
    assert says in "; ".join(heard)


def test_weights_of_which_nothing_fits_are_refused(source, tmp_path):
    with pytest.raises(
        UsageError,
        match=r"none of its weights fit this network \(model\.model_channels was 32 and is 96; .* settings too",
    ):
        Trainer(small(train__init_from=str(source), model__model_channels=96, model__num_heads=1), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_that_has_begun_does_not_begin_with_other_weights(source, tmp_path):
    Trainer(small(train__steps=1), tmp_path / "run").run()
    with pytest.raises(UsageError, match=r"train\.init_from is .*, and null in the run"):
        Trainer(small(train__init_from=str(source)), tmp_path / "run")


# --- folders that are not what they were ------------------------------------------------------------------------------


def test_another_tools_metrics_are_not_emptied(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "accuracy": 0.5}\n')
    with pytest.raises(UsageError, match=r"holds a metrics.jsonl, and is not a run"):
        Trainer(small(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "accuracy": 0.5}\n'


def test_a_run_whose_checkpoints_are_gone_says_so_and_keeps_its_history(tmp_path):
    Trainer(small(train__steps=4), tmp_path).run()
    history = (tmp_path / "metrics.jsonl").read_text()
    shutil.rmtree(tmp_path / "checkpoints")
    heard = []
    Trainer(small(train__steps=2), tmp_path, warn=heard.append).run()
    assert "no checkpoint is left of the run" in heard[0]
    assert "had reached step 4" in heard[0]
    assert (tmp_path / "metrics_superseded.jsonl").read_text() == history


def test_a_file_system_without_locks_is_said_and_trained_on(tmp_path, monkeypatch):
    import errno
    import fcntl

    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    heard = []
    Trainer(small(train__steps=1), tmp_path / "run", warn=heard.append).run()
    assert "has no locks" in heard[0]
    assert checkpoint.open_checkpoint(tmp_path / "run").step == 1


def test_a_folder_that_cannot_be_synced_is_saved_into(tmp_path, monkeypatch):
    import errno

    works = os.fsync

    def fsync(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        works(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    Trainer(small(train__steps=1), tmp_path / "run").run()
    assert checkpoint.open_checkpoint(tmp_path / "run").step == 1


def test_metrics_that_cannot_be_written_do_not_cost_the_steps(tmp_path):
    trainer = Trainer(small(train__steps=9, train__log_every=3), tmp_path / "run")
    (tmp_path / "run/metrics.jsonl").unlink()
    (tmp_path / "run/metrics.jsonl").mkdir()
    with pytest.raises(
        UsageError, match=r"metrics.jsonl cannot be written: .*; the checkpoints up to step 3 are whole"
    ):
        trainer.run()
    trainer.close()
    (tmp_path / "run/metrics.jsonl").rmdir()
    assert checkpoint.open_checkpoint(tmp_path / "run").step == 3
    trainer = Trainer(small(train__steps=9, train__log_every=3), tmp_path / "run")
    (tmp_path / "run/metrics.jsonl").unlink()  # as log rotation does
    trainer.run()
    assert [line["step"] for line in metrics(tmp_path / "run")] == [6, 9]


def test_a_colleague_may_read_what_the_umask_lets(tmp_path):
    before = os.umask(0o002)
    try:
        Trainer(small(train__steps=1), tmp_path / "run").run()
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in files} == {path.name: "0o664" for path in files}


def test_rounding_that_will_differ_is_said(tmp_path):
    threads = torch.get_num_threads()
    Trainer(small(train__steps=1), tmp_path / "run").run()
    heard = []
    torch.set_num_threads(threads + 1)
    try:
        Trainer(small(train__steps=2), tmp_path / "run", warn=heard.append).close()
    finally:
        torch.set_num_threads(threads)
    assert f"threads {threads} then, {threads + 1} now" in "; ".join(heard)


def test_a_checkpoint_is_chosen_when_no_other_process_can_be_saving_one(tmp_path, monkeypatch):
    """The second of two starts finds what the first saved in the meantime, and calls nothing damaged."""
    first = Trainer(small(train__steps=2), tmp_path / "run")
    works = checkpoint.open_checkpoint
    opened = []
    monkeypatch.setattr(checkpoint, "open_checkpoint", lambda path: opened.append(path) or works(path))
    with pytest.raises(UsageError, match="in use"):
        Trainer(small(train__steps=3), tmp_path / "run")
    assert opened == []
    first.run()
    second = Trainer(small(train__steps=3), tmp_path / "run")
    assert second.step == 2
    second.close()
    assert not list((tmp_path / "run/checkpoints").glob("damaged_*"))


def test_a_start_that_is_refused_leaves_no_trace(tmp_path, monkeypatch, capsys):
    argv = ["--out", tmp_path / "a/b/run", "--train.batch_size", 5000]
    assert script(train, monkeypatch, capsys, *argv)[0] == 2
    assert list(tmp_path.iterdir()) == []


def test_a_dangling_link_stays_and_is_named(tmp_path, monkeypatch, capsys):
    """A disk that is not mounted: training must not go on in a folder of the same name."""
    (tmp_path / "runs").symlink_to("/mnt/notmounted")
    for out in ("runs", "runs/x"):
        code, _, err = script(train, monkeypatch, capsys, "--out", tmp_path / out, *SMALL)
        assert code == 2
        assert "runs is a broken link (/mnt/notmounted)" in err
        assert (tmp_path / "runs").is_symlink()


@pytest.mark.parametrize("line", ["", "\0" * 40, '{"step": NaN}', "[" * 10_000, '{"loss": 1}'])
def test_a_bad_line_of_the_metrics_is_put_aside(tmp_path, line):
    Trainer(small(train__steps=2), tmp_path).run()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(f"{line}\n")
    Trainer(small(train__steps=4), tmp_path).run()
    assert [each["step"] for each in metrics(tmp_path)] == [2, 4]
    assert (tmp_path / "metrics_superseded.jsonl").read_text() == f"{line}\n"


@pytest.mark.parametrize("text", ["a: !!bool maybe", "a: !!timestamp x", "[" * 3000])
def test_somebody_elses_files_in_a_parent_are_no_run(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    (tmp_path / "metrics.jsonl").write_text("{}")
    Trainer(small(train__steps=1), tmp_path / "sub/run").run()
    assert checkpoint.open_checkpoint(tmp_path / "sub/run").step == 1


# --- whose folder it is -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOREIGN)
def test_a_folder_that_holds_what_a_run_writes_and_is_none_is_refused(name, tmp_path):
    mine = tmp_path / "d" / name
    mine.parent.mkdir(parents=True)
    mine.symlink_to(tmp_path) if name == "best" else mine.write_text("notes")
    before = listing(tmp_path)
    with pytest.raises(UsageError, match=rf"--out .* holds a {re.escape(name.split('/')[0])}, and is not a run: name"):
        Trainer(small(), tmp_path / "d")
    assert listing(tmp_path) == before


def test_a_configuration_in_its_own_folder_stays_as_it_was_written(tmp_path, monkeypatch, capsys):
    text = "# my run\ntrain: {steps: 2, batch_size: 8}\nsample: {n: 2, steps: 2}\n"
    (tmp_path / "config.yaml").write_text(text)
    argv = ["--config", tmp_path / "config.yaml", "--out", tmp_path]
    code, _, err = script(train, monkeypatch, capsys, *argv, "--train.steps", 1)
    assert code == 2
    assert "holds a config.yaml with something else in it: name another folder" in err
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    code, _, err = script(train, monkeypatch, capsys, *argv)
    assert code == 0, err
    assert (tmp_path / "config.yaml").read_text() == text
    code, _, err = script(train, monkeypatch, capsys, "--out", tmp_path, "--train.steps", 3)
    assert code == 0, err
    assert "steps: 3" in (tmp_path / "config.yaml").read_text()


def test_files_of_others_in_a_run_stay(tmp_path):
    Trainer(small(train__steps=2, data__held_out=0.1), tmp_path).run()
    (tmp_path / "checkpoints/.step_mine.tmp").mkdir()
    (tmp_path / "checkpoints/.step_00000009.tmp").mkdir()
    (tmp_path / "best").unlink()
    (tmp_path / "best").symlink_to("/")
    Trainer(small(train__steps=4, data__held_out=0.1), tmp_path).run()
    assert (tmp_path / "checkpoints/.step_mine.tmp").exists()
    assert not (tmp_path / "checkpoints/.step_00000009.tmp").exists()
    assert os.readlink(tmp_path / "best") == "/"


def test_a_start_that_was_killed_at_once_is_begun_again(tmp_path):
    (tmp_path / ".lock").touch()
    Trainer(small(train__steps=1), tmp_path).run()


def test_going_back_puts_the_page_aside(tmp_path):
    Trainer(small(train__steps=4, checkpoint__every=2), tmp_path).run()
    (tmp_path / "report.html").write_text("of steps 1 to 4")
    aside = go_back(tmp_path, 2)
    assert not (tmp_path / "report.html").exists()
    assert (aside / "report.html").read_text() == "of steps 1 to 4"


def test_what_the_same_command_wrote_is_written_anew(places, tmp_path, monkeypatch, capsys):
    root, _ = places
    run = root / "run"
    sheet = ["--ckpt", run, "--metric", "nearest", "--features", "pixels", "--n", "2", "--steps", "2", "--sheet"]
    for module, argv, out in ((report, [run, "--out"], "a.html"), (check_data, ["--sheet"], "a.png"),
                              (evaluate, sheet, "b.png")):  # fmt: skip
        for _ in range(2):
            code, _, err = script(module, monkeypatch, capsys, *argv, tmp_path / out)
            assert code == 0, err
    for module, argv, out in ((check_data, ["--sheet"], "b.png"), (evaluate, sheet, "a.png")):
        code, _, err = script(module, monkeypatch, capsys, *argv, tmp_path / out)
        assert code == 2, "another command's"
        assert "is there already, not from this command" in err


def test_samples_do_not_replace_what_was_written_meanwhile(places, tmp_path, monkeypatch, capsys):
    root, _ = places
    out = tmp_path / "a.png"
    monkeypatch.setattr("diffusion.commands.sample.write_chain", lambda *a, **k: out.write_text("mine"))
    code, _, err = script(sample, monkeypatch, capsys, "--ckpt", root / "run", "--n", 1, "--steps", 2, "--out", out,
                          "--chain", tmp_path / "c.png")  # fmt: skip
    assert code == 2
    assert f"--out {out} was written by another command meanwhile" in err
    assert out.read_text() == "mine"


def test_weights_that_are_overwritten_while_they_are_used_are_those_that_were_verified(places, tmp_path):
    root, _ = places
    copy = shutil.copytree(root / "run", tmp_path / "run")
    saved, weights = checkpoint.open_weights(copy)
    before = {name: value.clone() for name, value in weights.items()}
    file = saved.path / saved.chosen()
    size = file.stat().st_size
    with file.open("r+b") as opened:  # in place, as rsync --inplace does
        opened.seek(size // 2)
        opened.write(bytes(size - size // 2))
    assert all(torch.equal(value, before[name]) for name, value in weights.items())
    os.truncate(file, 100)
    assert all(torch.equal(value, before[name]) for name, value in weights.items())
    with pytest.raises(UsageError, match="is not whole"):
        checkpoint.open_weights(saved.path)


@pytest.mark.parametrize("content", ['["my", "list"]', "not JSON", '{"seed": 9}'])
def test_a_refused_sampling_removes_nothing(places, content, tmp_path, monkeypatch, capsys):
    root, _ = places
    for folder, argv in (
        ("us", ["--images", "--out", tmp_path / "us"]),
        ("q.npz.parts", ["--npz", "--out", tmp_path / "q.npz"]),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "samples.json").write_text(content)
        before = listing(tmp_path)
        code, _, _ = script(sample, monkeypatch, capsys, "--ckpt", root / "run", "--n", 1, "--steps", 2, *argv)
        assert code == 2
        assert listing(tmp_path) == before


def test_a_chain_is_not_written_into_the_samples(places, tmp_path, monkeypatch, capsys):
    root, _ = places
    out = tmp_path / "a.png"
    for argv in (
        ["--out", out, "--chain", out],
        ["--images", "--out", tmp_path / "d", "--chain", tmp_path / "d/000000.png"],
    ):
        code, _, err = script(sample, monkeypatch, capsys, "--ckpt", root / "run", "--n", 1, "--steps", 2, *argv)
        assert code == 2
        assert "or is it: name another" in err
        assert not list(tmp_path.iterdir())


def test_a_conversion_removes_nothing_beside_it(places, tmp_path, monkeypatch, capsys):
    root, _ = places
    (tmp_path / ".new.pt.tmp").mkdir()
    (tmp_path / ".new.pt.tmp/precious.txt").write_text("x")
    code, _, err = script(convert, monkeypatch, capsys, "openai", root / "run", "--out", tmp_path / "new.pt")
    assert code == 0, err
    assert sorted(path.name for path in tmp_path.iterdir()) == [".new.pt.tmp", "new.pt"]
    assert (tmp_path / ".new.pt.tmp/precious.txt").exists()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    code, _, err = script(convert, monkeypatch, capsys, "diffusers", root / "run", "--out", ".")
    assert (code, err.count("\n")) == (2, 1)


def test_the_last_line_of_the_metrics_may_lack_its_end(tmp_path):
    Trainer(small(train__steps=4, train__log_every=1), tmp_path).run()
    file = tmp_path / "metrics.jsonl"
    file.write_text(file.read_text().rstrip("\n"))
    Trainer(small(train__steps=5, train__log_every=1), tmp_path).run()
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3, 4, 5]


def test_comments_survive_other_settings_and_folders_survive_pruning(tmp_path, monkeypatch, capsys):
    text = "# my run\ntrain: {steps: 2, batch_size: 8}\nsample: {n: 2, steps: 2}\n"
    (tmp_path / "config.yaml").write_text(text)
    assert script(train, monkeypatch, capsys, "--config", tmp_path / "config.yaml", "--out", tmp_path)[0] == 0
    (tmp_path / "checkpoints/step_1").mkdir()
    (tmp_path / "checkpoints/step_1/notes.txt").write_text("mine")
    argv = ["--out", tmp_path, "--train.steps", 3, "--checkpoint.keep_last", 1]
    assert script(train, monkeypatch, capsys, *argv)[0] == 0
    [kept] = tmp_path.glob("config_*.yaml")
    assert kept.read_text() == text
    assert (tmp_path / "checkpoints/step_1/notes.txt").exists()
