"""The package as it is installed: a wheel, used outside of the clone."""

import json
import subprocess
import sys

import pytest
from helpers import ROOT, SMALL, user_environment

from diffusion.commands import COMMANDS, main


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder into which the wheel, without its dependencies, is installed."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", folder / "wheel", ROOT], check=True, timeout=300)
    [wheel] = (folder / "wheel").iterdir()
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "site", wheel], check=True, timeout=300)
    return folder


def test_the_wheel_is_used_without_a_clone(installed):
    def run(*argv):
        environment = user_environment() | {"PYTHONPATH": str(installed / "site")}
        done = subprocess.run([sys.executable, "-P", *map(str, argv)], cwd=installed, capture_output=True, text=True,
                              timeout=300, env=environment)  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert str(installed / "site") in run("-c", "import diffusion; print(diffusion.__file__)")
    command = installed / "site/bin/diffusion"
    run(command, "train", "--config", "digits", *SMALL)
    assert (installed / "runs/digits/checkpoints/step_00000003").is_dir()
    run("-m", "diffusion", "sample", "--ckpt", "runs/digits", "--n", 2, "--steps", 2, "--out", "a.png")
    assert "bits per dimension" in run("-m", "diffusion", "evaluate", "--ckpt", "runs/digits", "--n", 2, "--steps", 2)
    schema = json.loads(run("-m", "diffusion", "schema"))
    assert "TrainConfig" in schema["$defs"]


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        ([], 0, "usage: diffusion COMMAND"),
        (["--help"], 0, "convert"),
        (["trian"], 2, "unknown command trian: did you mean train?"),
        (["xyz"], 2, "there are train, sample"),
        (["train", "--trian.lr", "1"], 2, "diffusion train: unknown key trian.lr: did you mean --train.lr?"),
    ],
)
def test_the_command_finds_its_subcommands(argv, code, says, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["diffusion", *argv])
    assert main() == code
    out = capsys.readouterr()
    assert says.replace("--train.lr", "train.lr") in out.out + out.err
    assert {"train", "sample", "evaluate", "convert", "report", "check-data", "schema"} == set(COMMANDS)


@pytest.mark.parametrize("there", ["config.yaml", "a folder", "notes.txt", "a link to nowhere"])
def test_the_schema_replaces_nothing(there, tmp_path, monkeypatch, capsys):
    out = tmp_path / there
    if there == "a folder":
        out.mkdir()
    elif there == "a link to nowhere":
        out.symlink_to(tmp_path / "nowhere")
    else:
        out.write_text("mine")
    monkeypatch.setattr(sys, "argv", ["diffusion", "schema", "--out", str(out)])
    assert main() == 2
    says = {"a folder": "is a folder", "a link to nowhere": "is a broken link"}.get(there, "is there already")
    assert f"--out {out} {says}" in capsys.readouterr().err
    assert there not in ("config.yaml", "notes.txt") or out.read_text() == "mine"
