"""The card of a run: what the Hub reads, what was measured, and code that works."""

import json
import re
import shlex
import shutil

import pytest
import torch
import yaml
from helpers import script
from test_trainer import TINY, small

import diffusion
import evaluate
from diffusion.commands import card as command
from diffusion.commands import convert
from diffusion.config.files import load_config
from diffusion.training.trainer import Trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose name and classes have what Markdown and HTML would read."""
    out = tmp_path_factory.mktemp("secret") / "di_gits"
    Trainer(small(train__steps=2, checkpoint__every=1, data__held_out=0.1, **TINY), out).run()
    return out


def card_of(run, monkeypatch, capsys, *argv):
    code, _, err = script(command, monkeypatch, capsys, run, *argv)
    assert code == 0, err
    return (run / "README.md").read_text()


def recipe_of(text, folder):
    """The settings that a card shows, as a file."""
    (folder / "recipe.yaml").write_text(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    return folder / "recipe.yaml"


def test_a_card_says_what_was_measured_and_nothing_else(run, tmp_path, monkeypatch, capsys):
    run = shutil.copytree(run, tmp_path / "run", symlinks=True)
    text = card_of(run, monkeypatch, capsys)
    assert "## Measured" not in text
    assert "model-index" not in text
    argv = ["--ckpt", run, "--n", 24, "--steps", 2]
    code, said, err = script(evaluate, monkeypatch, capsys, *argv, "--metric", "gap,bits_per_dim")
    assert code == 0, err
    code, _, err = script(evaluate, monkeypatch, capsys, *argv, "--ema", "none")
    assert code == 0, err
    text = card_of(run, monkeypatch, capsys)
    fields = yaml.safe_load(text.split("---")[1])
    [result] = fields["model-index"][0]["results"]
    [metric] = result["metrics"]  # of the first average; a gap says something to its owner alone
    assert metric["type"] == "bits_per_dim"
    measured = re.search(r"## Measured\n\n(.*?)\n\n##", text, re.DOTALL)[1]
    assert len(measured.splitlines()) == 2
    assert said.splitlines()[0] in measured.replace("\\", "")
    assert "still learning" in measured
    assert "train longer" not in measured
    assert fields["pipeline_tag"] == "unconditional-image-generation"
    assert "![samples](samples/step_00000002.png)" in text
    assert str(tmp_path) not in text


def test_a_card_that_somebody_has_edited_is_not_replaced(run, tmp_path, monkeypatch, capsys):
    run = shutil.copytree(run, tmp_path / "run", symlinks=True)
    assert card_of(run, monkeypatch, capsys) == card_of(run, monkeypatch, capsys)
    (run / "README.md").write_text((run / "README.md").read_text().replace("A diffusion", "My diffusion"))
    code, _, err = script(command, monkeypatch, capsys, run)
    assert code == 2
    assert "README.md is there already: name another, or remove it" in err


def test_the_hubs_own_reader_takes_the_card(run, monkeypatch, capsys):
    hub = pytest.importorskip("huggingface_hub")
    card_of(run, monkeypatch, capsys)
    card = hub.ModelCard.load(run / "README.md")
    assert card.data.to_dict()["tags"] == ["diffusion"]


def test_the_code_of_a_card_works_here_and_in_diffusers(run, tmp_path, monkeypatch, capsys):
    """Of a run, and of the pipeline that it becomes."""
    pytest.importorskip("diffusers")
    run = shutil.copytree(run, tmp_path / "digits", symlinks=True)
    monkeypatch.chdir(tmp_path)
    text = card_of(run, monkeypatch, capsys)
    code, _, err = script(convert, monkeypatch, capsys, "diffusers", run, "--out", "digits_pipeline")
    assert code == 0, err
    pipeline = (tmp_path / "digits_pipeline/README.md").read_text()
    assert (tmp_path / "digits_pipeline/samples.png").read_bytes() == (run / "samples/step_00000002.png").read_bytes()
    assert yaml.safe_load(pipeline.split("---")[1])["library_name"] == "diffusers"
    code, _, err = script(convert, monkeypatch, capsys, "diffusers", "digits_pipeline", "--out", "digits_pipeline_run")
    assert code == 0, err
    for page in (text, pipeline):
        here, there = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
        names = {}
        exec(here, names)
        assert names["images"].shape == (4, 1, 8, 8)
        exec(there.replace("set_timesteps(50)", "set_timesteps(2)"), names)
        assert torch.is_tensor(names["x"])
        assert names["x"].shape == (4, 1, 8, 8)


def test_names_that_markdown_html_shells_and_python_would_read_are_shown_as_they_are(
    run, tmp_path, monkeypatch, capsys
):
    name = '<img src=x> do$name "a" `b`\n# c'
    run = shutil.copytree(run, tmp_path / name, symlinks=True)
    text = card_of(run, monkeypatch, capsys)
    assert yaml.safe_load(text.split("---")[1])["tags"] == ["diffusion"]
    assert load_config(recipe_of(text, tmp_path)) == diffusion.load(run).config
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    assert "<img" not in prose
    assert len(re.findall(r"^# ", prose, re.MULTILINE)) == 2  # the mark, and the title
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        assert repr(name)[1:-1].replace("'", '"') in block.replace("'", '"') or json.dumps(name)[1:-1] in block
        compile(block, "card", "exec")
    [command] = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    assert shlex.split(command, comments=True)[:4] == ["diffusion", "convert", "diffusers", name]


def test_what_diffusers_cannot_express_is_not_promised(tmp_path, monkeypatch, capsys):
    process = {"diffusion__schedule": "gvp", "diffusion__prediction": "v", "diffusion__variance": "fixed_small"}
    Trainer(small(train__steps=1, **process, **TINY), tmp_path / "run").run()
    text = card_of(tmp_path / "run", monkeypatch, capsys)
    assert "diffusers" not in text
    assert "diffusion.load" in text
