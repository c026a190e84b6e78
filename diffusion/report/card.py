"""A card of a run: Markdown with the fields of the Hugging Face Hub's model cards, of what is known and measured."""

import html
import math
from pathlib import Path
from typing import Any

import yaml

from diffusion.report.page import without_folders
from diffusion.run.folder import about_run, newest_scores, run_of
from diffusion.run.loaded import Run

MARK = "# written by diffusion card"
SETTINGS = "n", "sets", "sampler", "steps", "guidance", "bound_steps", "seed", "features", "data"
"""What is told of the settings of figures."""
HERE = """```python
import diffusion

run = diffusion.load("{name}")
images = run.sample(4)  # (4, {shape}) in [-1, 1]
```"""
DIFFUSERS = """```python
import torch
from diffusers import DDPMPipeline

pipeline = DDPMPipeline.from_pretrained("{name}")
pipeline.scheduler.set_timesteps(50)
x = torch.randn(4, {shape})
with torch.no_grad():
    for t in pipeline.scheduler.timesteps:
        output = pipeline.unet(x, t{classes}).sample
        x = pipeline.scheduler.step(output, t, x).prev_sample  # in the end, images in [-1, 1]
```"""


def card(run: Run, name: str, grid: str | None, exports: bool, is_pipeline: bool = False) -> str:
    """The card of a run, or of the pipeline of diffusers that it became.

    Args:
        name: of the folder that the card describes.
        grid: the path of the run's samples there, if there are any.
        exports: whether diffusers can express the run.
    """
    saved, sections, owner = run.saved, run.config.sections(), run_of(run.path)
    scores = [one for one in newest_scores(owner) if one["weights"] == saved.fingerprint(run.ema)] if owner else []
    shape, weights = ", ".join(map(str, run.config.data.shape)), sum(p.numel() for p in run.network.parameters())
    kind = f"a {sections['model']['network']} of {weights:,} weights, for {shape.replace(', ', ' x ')} images"
    facts = {"classes": ", ".join(saved.class_names), "hash of the data that it was trained on": saved.data}
    facts |= {"weights": f"after step {saved.step}, {saved.name_of(run.ema)}" if saved.step else None}
    facts |= {"begun with": f"step {saved.origin['step']} of {saved.origin['path']}" if saved.origin else None}
    facts |= {"computed on": ", ".join(f"{key} {value}" for key, value in saved.environment.items())}
    told = [*(about_run(owner) if owner else []), *(f"{key}: {value}" for key, value in facts.items() if value)]
    shown = sections if saved.step else {key: sections[key] for key in ("model", "diffusion")}
    recipe = without_folders(yaml.safe_dump(shown, sort_keys=False, allow_unicode=True))
    # Advice is for the owner.
    lines = [(line, one) for one in scores for line in one["lines"] if not line.endswith(one.get("advice", "\0"))]
    measured = [f"{line} ({_settings(one['settings'])})" for line, one in lines]
    classes = f", class_labels=torch.arange(4) % {len(saved.class_names)}" if saved.class_names else ""
    use = [f"`diffusion convert diffusers {name} --out RUN` makes it a run of this project."] * is_pipeline
    use += [HERE.format(name="RUN" if is_pipeline else name, shape=shape)]
    use += [f"`diffusion convert diffusers {name} --out PIPELINE` makes it a pipeline of diffusers."] * (
        not is_pipeline
    )
    use += [DIFFUSERS.format(name=name if is_pipeline else "PIPELINE", shape=shape, classes=classes)]
    parts = {
        "": "\n\n".join([f"# {_plain(name)}", f"A diffusion model: {kind}.", *[f"![samples]({grid})"] * bool(grid)]),
        "## What it is": "\n".join(f"- {_plain(line)}" for line in told),
        "## Recipe": f"<details><summary>All settings</summary>\n\n```yaml\n{recipe}```\n\n</details>",
        "## Measured": "\n".join(f"- {_plain(line)}" for line in measured),
        "## Use": "\n\n".join(use if exports else use[:1]),
    }
    text = "\n\n".join(f"{title}\n\n{part}".strip() for title, part in parts.items() if part)
    return f"---\n{MARK}\n{yaml.safe_dump(_fields(run, name, scores, is_pipeline), sort_keys=False)}---\n\n{text}\n"


def grid_of(run: Run) -> Path | None:
    """The grid that training drew with the weights of a run's checkpoint, if there is one."""
    owner = run_of(run.path)
    path = owner / "samples" / f"{run.path.name}.png" if owner else run.path / "samples.png"
    return path if path.exists() else None


def _fields(run: Run, name: str, scores: list[dict[str, Any]], is_pipeline: bool) -> dict[str, Any]:
    """The fields that the Hub reads, without those that are unknown."""
    data, task = run.config.data, "unconditional-image-generation"
    path = getattr(data, "path", None)
    fields: dict[str, Any] = {"pipeline_tag": task, "tags": ["diffusion"]}
    fields |= {"library_name": "diffusers"} if is_pipeline else {}
    fields |= {"datasets": [path]} if data.source == "huggingface" and not Path(str(path)).exists() else {}
    figures = [{"type": one["metric"], "value": one.get(one["metric"]), "name": one["lines"][0]} for one in scores]
    figures = [one for one in figures if isinstance(one["value"], float) and math.isfinite(one["value"])]
    about = {"task": {"type": task}, "dataset": {"name": data.source, "type": data.source}, "metrics": figures}
    return fields | ({"model-index": [{"name": name, "results": [about]}]} if figures else {})


def _settings(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {settings[name]}" for name in SETTINGS if settings.get(name) is not None)


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, without absolute paths."""
    return html.escape(without_folders(text), quote=False).replace("*", r"\*").replace("_", r"\_").replace("`", "'")
