"""What a person may point a command at, and that it changes nothing which existed; going back; weights of others."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers import SMALL
from test_scripts import script
from test_trainer import assert_same_bits, metrics, small

import evaluate
import sample
import train
from diffusion import UsageError, checkpoint
from diffusion.commands import convert
from diffusion.training.run_folder import go_back, locate
from diffusion.training.trainer import Trainer

STEP = "step_00000003"


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
    (root / "links").mkdir()
    for i, thing in enumerate(
        thing for thing in list(things) if Path(thing).suffix not in (".json", ".pt", ".safetensors")
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
            if inside.parts[0] != "new":
                assert "samples" in inside.parts or path.name == ".lock", (thing, path)
                assert "checkpoints" not in inside.parts, (thing, path)
                assert inside.parts[0] != "alone", (thing, path)
        shutil.rmtree("new", ignore_errors=True)
        Path("new").unlink(missing_ok=True)
        for path in sorted(after.keys() - before.keys(), reverse=True):
            if path.exists():
                path.rmdir() if path.is_dir() else path.unlink()
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
    with pytest.raises(UsageError, match=r"of something else"):
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
