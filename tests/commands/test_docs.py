"""The site builds without a warning, and what pages name exists."""

import re
import shutil
import subprocess

import pytest
from helpers import BIN, ROOT
from test_scripts import PAGES, commands_of

from diffusion.commands import evaluate, sample
from diffusion.commands.command_line import run_parser
from diffusion.config.schema import SECTIONS, all_settings

ADDED = {"data.count", "diffusion.p", "diffusion.delta", "model.width", "sample.temperature", "train.nesterov_momentum"}
"""Settings of the components that docs/extending.md adds."""
DOCS = sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.skipif(not (BIN / "mkdocs").exists(), reason="mkdocs is not installed")
def test_the_site_builds_without_a_warning(tmp_path):
    done = subprocess.run([BIN / "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"], cwd=ROOT,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    for page in DOCS:
        assert (tmp_path / "site" / ("" if page.stem == "index" else page.stem) / "index.html").exists()
    assert "alphas_cumprod" in (tmp_path / "site/api/index.html").read_text()
    html = (tmp_path / "site/index.html").read_text()
    assert not re.search(r'(src|href)="https?://(?!www\.mkdocs\.org)', html), "a page asks for something elsewhere"


@pytest.mark.parametrize("page", [*DOCS, ROOT / "README.md"], ids=lambda page: page.name)
def test_settings_that_a_page_names_exist(page):
    text = page.read_text()
    named = set(re.findall(rf"--((?:{'|'.join(SECTIONS)})\.[a-z_]+)", text))
    named |= set(re.findall(rf"`((?:{'|'.join(SECTIONS)})\.[a-z_]+)[ `]", text)) - {"data.loader", "model.safetensors"}
    files = {f"{path.parent.name}.{path.stem}" for path in (ROOT / "diffusion").rglob("*.py")}
    unknown = named - set(all_settings()) - files - {"sample.py", "train.py"}
    if page.name == "extending.md":
        unknown -= ADDED
    assert not unknown


@pytest.mark.parametrize("page", [*DOCS, ROOT / "README.md"], ids=lambda page: page.name)
def test_flags_of_commands_that_a_page_names_exist(page, capsys):
    helps = {"train": run_parser().format_help()}
    for name, module in (("sample", sample), ("evaluate", evaluate)):
        with pytest.raises(SystemExit):
            module.parse(["--help"])
        helps[name] = capsys.readouterr().out
    text = page.read_text().replace("\\\n", " ")
    for name, rest in re.findall(r"(?:python |`)(sample|evaluate|train)\.py ([^`\n#|]*)", text):
        for flag in set(re.findall(r"--([a-z_-]+)(?![\w.-])", rest)) - {"temperature"}:  # of a sampler that a page adds
            assert re.search(rf"--{flag}\b", helps[name]), f"{page.name}: {name}.py --{flag}"


def test_the_first_page_shows_commands_that_are_tested():
    tested = {line.strip() for page in PAGES for line in commands_of(page)}
    assert {line.strip() for line in commands_of("docs/index.md")} <= tested
    assert len(commands_of("docs/index.md")) == 4


def test_the_cluster_script_is_valid_shell():
    [script] = re.findall(r"```bash\n(.*?)```", (ROOT / "docs/clusters.md").read_text(), re.DOTALL)
    assert subprocess.run([shutil.which("bash"), "-n"], input=script, text=True, check=False).returncode == 0
