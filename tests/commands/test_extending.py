"""docs/extending.md is followed in a copy of the project, whose own checks then pass."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import BIN, ROOT, SMALL, user_environment

PAGE = (ROOT / "docs/extending.md").read_text()
TESTS = "layout", "networks", "config"
"""The files of unit tests that are run on the copy."""


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A copy of the project in which the page has been followed."""
    copy = tmp_path_factory.mktemp("extended") / "project"
    unwanted = shutil.ignore_patterns(
        "__pycache__", ".git", ".venv", "build", "runs", "dist", "site", "*.egg-info", ".ci"
    )
    shutil.copytree(ROOT, copy, ignore=unwanted)
    added = 0
    for text, code in re.findall(r"([^\n]*):\n\n```python\n(.*?)```", PAGE, re.DOTALL):
        if new := re.fullmatch(r"`(diffusion/[\w/]+\.py)`", text):
            file = copy / new[1]
            file.write_text(code)
            defined = new[1].removesuffix(".py").replace("/", ".")
        elif into := re.fullmatch(r"In `(diffusion/[\w/]+\.py)`, above `([A-Z_]+)`", text):
            file, above = copy / into[1], into[2]
            content = file.read_text()
            at = re.search(rf"^{above}\b", content, re.MULTILINE).start()
            file.write_text(f"{content[:at]}{code}\n\n{content[at:]}")
        else:
            entry = re.fullmatch(r"and in `([A-Z_]+)`(?: of `(diffusion/[\w/]+\.py)`, with its import)?", text)
            name, file = entry[1], copy / entry[2] if entry[2] else file
            content = re.sub(
                rf"(^{name}\b.*= \{{)", rf"\1{code.strip()} ", file.read_text(), count=1, flags=re.MULTILINE
            )
            if entry[2]:
                thing = re.findall(r"\w+", code)[-1]
                imports = rf"from {defined} import {thing}\nfrom diffusion"
                content = re.sub(r"^from diffusion", imports, content, count=1, flags=re.MULTILINE)
            file.write_text(content)
        added += code.count("\n") + 2
    layout = copy / "tests/unit/test_layout.py"
    limits = r"(LIMIT = |lines < )(\d+)"  # of all code, and of the mathematics
    layout.write_text(re.sub(limits, lambda match: f"{match[1]}{int(match[2]) + added}", layout.read_text()))
    for arguments in (["check", "--fix", "--quiet", "--select", "I,W"], ["format", "--quiet"]):  # as an editor does
        subprocess.run([BIN / "ruff", *arguments, "diffusion"], cwd=copy, check=True)
    return copy


ALL = """
import json, runpy, sys
from accelerate.state import AcceleratorState
for argv, code in json.loads(sys.argv[1]):
    sys.argv, ended = argv, None
    print("\\0", flush=True)
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as end:
        ended = end.code or 0
    sys.stdout.flush()
    assert ended == code, (argv, ended)
    AcceleratorState._reset_state(reset_partial_state=True)
"""


def run_all(folder, *lines):
    """The outputs of commands, each with the exit code it should have, one after the other in one process."""
    lines = [([str(word) for word in argv], code) for argv, code in lines]
    done = subprocess.run([sys.executable, "-c", ALL, json.dumps(lines)], cwd=folder, text=True, timeout=300,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          env=user_environment() | {"PYTHONPATH": str(folder)})  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout.split("\0")[1:]


def test_the_checks_of_the_project_pass_on_what_the_page_adds(extended):
    environment = user_environment() | {"PYTHONPATH": str(extended)}
    tests = [f"tests/unit/test_{name}.py" for name in TESTS]
    for command in (
        [BIN / "ruff", "check", "diffusion"],
        [BIN / "ruff", "format", "--check", "diffusion"],
        [BIN / "mypy", "diffusion"],
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
    ):
        done = subprocess.run(command, cwd=extended, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
    networks = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--collect-only", tests[1]],
        cwd=extended,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert "[mlp]" in networks.stdout  # the contract of networks holds for that of the page


def test_the_commands_of_the_page_work(extended):
    commands = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
    assert len(commands) == 8
    small = {"train.py": [*SMALL[: SMALL.index("--model.channel_mult")], *SMALL[SMALL.index("--sample.n") :]]}
    lines = [[*shlex.split(line)[1:], *small.get(shlex.split(line)[1], [])] for line in commands]
    outputs = run_all(
        extended,
        *[(argv, 0) for argv in lines],
        (["sample.py", "--help"], 0),
        (["train.py", "--help"], 0),
        (["train.py", "--data.count", "3"], 2),
        (["train.py", "--model.width", "3"], 2),
        (["train.py", "--train.nesterov_momentum", "0.5"], 2),
        (["train.py", "--model.network", "mlp", "--model.dropout", "0.1"], 2),
        (["sample.py", "--ckpt", "runs/mlp", "--sampler", "tempered", "--eta", "1"], 2),
        (["train.py", "--out", "runs/sgd", "--train.steps", "4"], 0),  # continues
    )
    said = dict(zip([*commands, "sample", "train", *range(6)], outputs, strict=True))
    [brightness] = [out for line, out in said.items() if "brightness" in str(line)]
    assert re.search(r"brightness -?\d\.\d+ of 100 generated images, -?\d\.\d+ of the data", brightness)
    assert "count: 500" in (extended / "runs/discs/config.yaml").read_text()
    assert "--temperature" in said["sample"]
    for setting in (
        "--data.count",
        "--model.depth",
        "--train.nesterov_momentum",
        "--train.last",
        "--diffusion.p2_gamma",
    ):
        assert setting in said["train"]
    assert "data.count belongs to source discs, and data.source is digits" in said[0]
    assert "model.width belongs to network mlp, and model.network is unet" in said[1]
    assert "train.nesterov_momentum belongs to optimizer sgd, and train.optimizer is muon" in said[2]
    assert "model.dropout belongs to network unet, and model.network is mlp" in said[3]
    assert "eta belongs to sampler ddim" in said[4]
    assert Path(extended, "runs/sgd/checkpoints/step_00000004").is_dir()
    assert os.listdir(extended / "runs/mlp/samples")
