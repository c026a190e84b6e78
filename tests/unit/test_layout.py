"""The architecture: imports point one way, the mathematics stands alone, and additions have one place."""

import ast
import io
import sys
import tokenize

from helpers import ROOT

PACKAGE = ROOT / "diffusion"
MATHEMATICS = ["schedule", "process", "losses", "timesteps", "samplers", "likelihood", "ema", "randomness", "sampling"]
NETWORK = ["models.conditions", "models.layers", "models.rules", "models.unet", "models.dit", "models.initialisation"]
LAYERS = [
    ["errors", "parallel.sharding"],
    [*MATHEMATICS, *NETWORK],
    ["files", "config.fields", "parallel.signals", "optimizers"],
    ["models", "data"],
    ["config.schema", "config.files"],
    ["parallel"],
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
    assert lines < 1780


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


LIMIT = 7394
"""The sum of lines of code of the package and the scripts."""


def test_lines_are_a_budget():
    """What is added has to be earned back elsewhere."""
    files = [*PACKAGE.rglob("*.py"), *(ROOT / name for name in ("train.py", "sample.py", "evaluate.py"))]
    assert sum(map(lines_of_code, files)) <= LIMIT


def test_exceptions_to_the_formatter_and_to_types_are_rare():
    text = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    assert text.count("# fmt: skip") <= 24  # signatures and tables that a line each would stretch
    assert text.count("# type: ignore") <= 8


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
