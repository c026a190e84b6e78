"""The package as it is installed: a wheel, used outside of the clone. (`make dist` does it in a new environment.)"""

import shutil
import subprocess
import sys
import zipfile

import pytest
from helpers import ROOT, SMALL, user_environment

from diffusion.commands import COMMANDS, main


def test_the_wheel_holds_the_package_and_is_used_without_a_clone(tmp_path):
    source, site = tmp_path / "source", tmp_path / "site"
    for name in ("diffusion", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    paths = [*(source / "diffusion").rglob("*"), *(source / "configs").rglob("*")]
    files = {str(path.relative_to(source)) for path in paths if path.is_file()}
    build = "import sys, setuptools.build_meta as backend; backend.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, tmp_path], cwd=source, check=True, capture_output=True, timeout=300)
    [wheel] = tmp_path.glob("*.whl")
    held = {name.replace("diffusion/configs/", "configs/") for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in held if ".dist-info/" not in name} == files
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "install", "--no-deps"]
    subprocess.run([*pip, "--no-compile", "--target", site, wheel], check=True, timeout=300)
    done = subprocess.run([sys.executable, "-P", site / "bin/diffusion", "train", "--config", "digits", *SMALL],
                          cwd=tmp_path, capture_output=True, text=True, timeout=300,
                          env=user_environment() | {"PYTHONPATH": str(site)})  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "runs/digits/checkpoints/step_00000003").is_dir()


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        ([], 0, "usage: diffusion COMMAND"),
        (["--help"], 0, "convert"),
        (["trian"], 2, "unknown command trian: did you mean train?"),
        (["xyz"], 2, "there are train, sample"),
        (["train", "--trian.lr", "1"], 2, "diffusion train: unknown key trian.lr: did you mean train.lr?"),
    ],
)
def test_the_command_finds_its_subcommands(argv, code, says, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["diffusion", *argv])
    assert main() == code
    out = capsys.readouterr()
    assert says in out.out + out.err
    assert {"train", "sample", "evaluate", "convert", "report", "card", "check-data"} == set(COMMANDS)
