"""The architecture: imports point one way, the mathematics stands alone, and additions have one place."""

import ast
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest
from helpers import ROOT, SMALL, user_environment

PACKAGE = ROOT / "diffusion"
MATHEMATICS = ["schedule", "process", "losses", "timesteps", "samplers", "likelihood", "ema", "randomness"]
NETWORK = ["models.layers", "models.rules", "models.unet", "models.initialisation"]
LAYERS = [
    ["errors", "parallel.sharding"],
    [*MATHEMATICS, *NETWORK],
    ["files", "config.fields", "parallel.signals", "optimizers"],
    ["data"],
    ["config.schema", "config.files"],
    ["sampling", "parallel"],
    ["run"],
    ["training", "report"],
    ["metrics", "interop"],
    ["commands"],
]
"""From the bottom: a module imports only from its own layer and from those above it in this list."""


def name_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}


def imports_of(tree):
    """What a module imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name.removeprefix("diffusion.") in MODULES else node.module for name in inside)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def layer_of(module):
    found = {name: i for i, layer in enumerate(LAYERS) for name in layer if f"{module}.".startswith(f"{name}.")}
    assert found, f"{module} has no place in LAYERS"
    return found[max(found, key=len)]


ENTRY = ("", "__main__", "config", "models", "parallel")
"""Modules that gather others or start the program."""


def test_imports_point_one_way():
    graph = {}
    for module, tree in MODULES.items():
        if module in ENTRY:
            continue
        ours = {name.removeprefix("diffusion.") for name in imports_of(tree) if name.startswith("diffusion.")}
        graph[module] = ours - {module}
        for other in graph[module]:
            assert layer_of(other) <= layer_of(module), f"{module} imports {other}, which lies above it"
    done = set()
    while ready := {module for module in graph.keys() - done if graph[module] <= done | set(ENTRY)}:
        done |= ready
    assert done == graph.keys(), f"these import each other: {sorted(graph.keys() - done)}"


def test_the_mathematics_stands_alone_and_can_be_read_in_an_evening():
    for module in [*MATHEMATICS, *NETWORK, "parallel.sharding", "errors"]:
        outside = {name.split(".")[0] for name in imports_of(MODULES[module])} - {"diffusion"}
        assert outside - set(sys.stdlib_module_names) <= {"torch", "numpy", "einops"}, module
    read = [*MATHEMATICS, "models.layers", "models.unet"]
    lines = sum((PACKAGE / f"{name.replace('.', '/')}.py").read_text().count("\n") for name in read)
    assert lines < 1600


def lines_of_code(path):
    """Lines that are not blank, comment or docstring."""
    text = path.read_text()
    bodies = [node.body for node in ast.walk(ast.parse(text)) if isinstance(getattr(node, "body", None), list)]
    docs = {line for body in bodies for node in body
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
            for line in range(node.lineno, node.end_lineno + 1)}  # fmt: skip
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type not in layout]
    return len({line for token in tokens for line in range(token.start[0], token.end[0] + 1)} - docs)


def test_lines_are_a_budget():
    """What is added has to be earned back elsewhere."""
    files = [*PACKAGE.rglob("*.py"), *(ROOT / name for name in ("train.py", "sample.py", "evaluate.py"))]
    assert sum(map(lines_of_code, files)) <= 7280


def test_nothing_in_the_library_prints():
    for module, tree in MODULES.items():
        calls = [
            node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        ]
        assert "print" not in calls or module.startswith("commands"), module


def test_files_and_functions_are_short():
    for module, tree in MODULES.items():
        path = PACKAGE / f"{module.replace('.', '/')}.py"
        text = (path if path.exists() else PACKAGE / module.replace(".", "/") / "__init__.py").read_text().splitlines()
        assert len(text) <= 400, module
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60:
                reason = text[node.lineno - 2]
                assert reason.strip().startswith("# Long,"), (
                    f"{module}.{node.name} is {node.end_lineno - node.lineno + 1}"
                )


# --- docs/extending.md ------------------------------------------------------------------------------------------------

PAGE = (ROOT / "docs/extending.md").read_text()


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A copy of the project in which the page has been followed."""
    copy = tmp_path_factory.mktemp("extended")
    for name in ("diffusion", "configs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("train.py", "sample.py", "evaluate.py"):
        shutil.copy(ROOT / name, copy)
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    sampler, sampler_line, source, source_line, metric, metric_line = blocks
    samplers = copy / "diffusion/samplers.py"
    text = samplers.read_text()
    at = text.index("SAMPLERS: ")
    samplers.write_text(text[:at] + sampler + "\n\n" + add_line(text[at:], sampler_line))
    for kind, code, line in (("data/sources", source, source_line), ("metrics", metric, metric_line)):
        [file] = re.findall(rf"^`diffusion/{kind}/(\w+)\.py`:$", PAGE, re.MULTILINE)
        (copy / f"diffusion/{kind}/{file}.py").write_text(code)
        names = copy / f"diffusion/{kind}/__init__.py"
        defined = re.findall(r"\w+", line)[-1]
        package = f"diffusion.{kind.replace('/', '.')}.{file}"
        names.write_text(f"from {package} import {defined}\n" + add_line(names.read_text(), line))
    return copy


def add_line(text, line):
    """Add an entry to the first dict of a text that is assigned over names in capitals."""
    return re.sub(r"(^[A-Z]+: .*= \{)", rf"\1{line.strip()} ", text, count=1, flags=re.MULTILINE)


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


@pytest.mark.whole
def test_the_page_on_extending_can_be_followed(extended):
    commands = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
    assert len(commands) == 3
    lines = [shlex.split(line)[1:] for line in commands]
    tempered = [*SMALL, "--sample.sampler", "tempered", "--sample.options.temperature", "0.5"]
    outputs = run_all(
        extended,
        (["train.py", "--out", "runs/digits", *SMALL], 0),
        *[([*argv, *tempered] if argv[0] == "train.py" else argv, 0) for argv in lines],
        (["sample.py", "--help"], 0),
        (["train.py", "--help"], 0),
        (["train.py", "--data.count", "3"], 2),
        (["sample.py", "--ckpt", "runs/digits", "--sampler", "tempered", "--eta", "1"], 2),
        (["train.py", "--data.source", "discs", "--out", "runs/discs", "--train.steps", "4"], 0),  # continues
    )
    [brightness] = [out for line, out in zip(commands, outputs[1:4], strict=True) if "brightness" in line]
    assert re.search(r"brightness -?\d\.\d+ of 100 generated images, -?\d\.\d+ of the data", brightness)
    assert "count: 500" in (extended / "runs/discs/config.yaml").read_text()
    assert "tempered" in outputs[4]
    assert "--data.count" in outputs[5]
    assert "data.count belongs to the source discs, and data.source is digits" in outputs[6]
    assert "--eta is not an option of tempered: it has temperature" in outputs[7]
    assert Path(extended, "runs/discs/checkpoints/step_00000004").is_dir()
    assert os.listdir(extended / "runs/digits/samples")
