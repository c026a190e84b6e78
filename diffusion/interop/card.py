"""A card of a run: Markdown with the fields of the Hugging Face Hub's model cards, of what is known and measured."""

import html
import re
from pathlib import Path
from string import Template
from typing import Any

import yaml

import diffusion
from diffusion.data.base import digest
from diffusion.errors import UsageError
from diffusion.interop.diffusers import check_plain, unet_config
from diffusion.report.page import without_folders
from diffusion.run.folder import about_run, newest_scores, run_of
from diffusion.run.loaded import Run

MARK = "# written by diffusion card, and not edited since if this is its hash: "
SETTINGS = "n", "sets", "sampler", "steps", "guidance", "bound_steps", "seed", "features", "data"
"""What is told of the settings of figures."""
SECTION = re.compile(r"## [^\n]+\n+(?=## )")
"""A section without content."""


def card(run: Run, name: str, grid: object, is_pipeline: bool = False) -> str:
    """The card of a run, or of the pipeline of diffusers that it became, in a folder `name` with a picture `grid`."""
    saved, config, owner = run.saved, run.config, run_of(run.path) or run.path
    sections, shape, classes = config.sections(), ", ".join(map(str, config.data.shape)), saved.class_names
    kind = "flow-matching" if run.process.schedule.is_flow else "diffusion"
    size = f"{sum(p.numel() for p in run.network.parameters()):,} weights, for images of {shape.replace(', ', ' x ')}"
    average = {"none": "without a moving average"}.get(
        saved.name_of(run.ema), f"moving average {saved.name_of(run.ema)}"
    )
    facts = {"classes": ", ".join(classes), "hash of the data that it was trained on": saved.data}
    facts |= {"weights": f"after step {saved.step}, {average}" if saved.step else None}
    facts |= {"begun with": f"step {saved.origin['step']} of {saved.origin['path']}" if saved.origin else None}
    facts |= {"computed on": ", ".join(f"{key} {value}" for key, value in saved.environment.items())}
    shown = sections if saved.step else {key: sections[key] for key in ("model", "diffusion")}
    scores = [one for one in newest_scores(owner) if one["weights"] == saved.fingerprint(run.ema)]
    # Advice is for the owner, and a verdict for all.
    lines = [[line if line != one.get("advice") else one["verdict"] for line in one["lines"]] for one in scores]
    measured = [f"{'; '.join(filter(None, a))} ({_settings(b)})" for a, b in zip(lines, scores, strict=True)]
    names = (f"{name}_run", name) if is_pipeline else (name, f"{name}_pipeline")
    makes = f"`diffusion convert diffusers {name} --out {names[not is_pipeline]}` makes what is loaded here."
    holes = {"name": name, "run": names[0], "pipeline": names[1], "shape": shape, "version": diffusion.__version__}
    holes |= {"kind": f"A {kind} model: a {config.model.network} of {size}."}
    holes |= {"grid": f"![samples]({grid})" if grid else "", "measured": _listed(measured)}
    holes |= {"told": _listed([*about_run(owner), *(f"{key}: {value}" for key, value in facts.items() if value)])}
    holes |= {"recipe": without_folders(yaml.safe_dump(shown, sort_keys=False, allow_unicode=True))}
    holes |= {"to_run": makes if is_pipeline else "", "to_pipeline": "" if is_pipeline else makes}
    holes |= {"why": "  # with classes, pipeline() alone does not work" if classes else ""}
    holes |= {"labels": f", class_labels=torch.arange(4) % {len(classes)}" if classes else ""}
    values = {column: 0 if width == 1 else [0] * width for column, width in run.vectors.widths.items()}
    holes |= {"conditions": f", conditions={values}" if values else ""}
    text = Template(Path(__file__).with_name("card.md").read_text(encoding="utf-8")).substitute(holes)
    try:
        check_plain(run, "diffusers")
        unet_config(config, len(classes))
    except UsageError:
        text = text.partition("## Use in diffusers")[0]
    fields = yaml.safe_dump(_fields(run, name, scores, is_pipeline), sort_keys=False, allow_unicode=True, width=10_000)
    text = re.sub(r"\n{3,}", "\n\n", f"{fields}---\n\n{SECTION.sub('', text)}")
    return f"---\n{MARK}{digest(text)}\n{text}"


def is_card(path: Path) -> bool:
    """Whether a file is a card that nobody has edited since it was written."""
    mark, _, text = path.read_text(errors="replace").removeprefix("---\n").partition("\n")
    return mark == f"{MARK}{digest(text)}"


def grid_of(run: Run) -> Path | None:
    """The grid that training drew with the weights of a run's checkpoint, if there is one."""
    path = run.path.parent.parent / "samples" / f"{run.path.name}.png"
    return path if path.exists() else None


def _fields(run: Run, name: str, scores: list[dict[str, Any]], is_pipeline: bool) -> dict[str, Any]:
    """The fields that the Hub reads, without those that are unknown."""
    source, task, path = (
        run.config.data.source,
        "unconditional-image-generation",
        getattr(run.config.data, "path", None),
    )
    fields: dict[str, Any] = {"pipeline_tag": task, "tags": ["diffusion"]}
    fields |= {"library_name": "diffusers"} if is_pipeline else {}
    fields |= {"datasets": [path]} if source == "huggingface" and not Path(str(path)).exists() else {}
    named = [(one["metric"], one.get(one["metric"]), without_folders(one["lines"][0])) for one in scores]
    figures = [
        {"type": name, "value": x, "name": line} for name, x, line in named if isinstance(x, float) and name != "gap"
    ]
    about = {"task": {"type": task}, "dataset": {"name": source, "type": source}, "metrics": figures}
    return fields | ({"model-index": [{"name": name, "results": [about]}]} if figures else {})


def _settings(score: dict[str, Any]) -> str:
    return ", ".join(f"{name} {score['settings'][name]}" for name in SETTINGS if score["settings"].get(name))


def _listed(lines: list[str]) -> str:
    """A list that Markdown shows as it is, without absolute paths."""
    escaped = (re.sub(r"([*_`\[\]\\])", r"\\\1", html.escape(without_folders(line), quote=False)) for line in lines)
    return "\n".join(f"- {line}" for line in escaped)
