"""A card of a run: Markdown with the fields of the Hugging Face Hub's model cards, of what is known and measured."""

import html
import json
import re
import shlex
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import quote

import yaml

import diffusion
from diffusion.data.base import digest
from diffusion.errors import UsageError
from diffusion.interop.diffusers import check_plain, unet_config
from diffusion.report.page import without_folders
from diffusion.run.folder import about_run, newest_scores, run_of
from diffusion.run.loaded import Run

MARK = "# written by diffusion card, and not edited since if this is its hash: "
SETTINGS = "split", "n", "sets", "sampler", "steps", "guidance", "bound_steps", "seed", "features", "data"
"""What is told of the settings of figures."""
SECTION = re.compile(r"## [^\n]+\n+(?=## )")
"""A section without content."""


def card(run: Run, name: str, grid: Path | None, is_pipeline: bool = False) -> str:
    """The card of a run, or of the pipeline of diffusers that it became, in a folder `name` with a picture `grid`."""
    saved, config, owner = run.saved, run.config, run_of(run.path) or run.path
    paths = [str(owner.resolve()), *(x for x in config.flat().values() if isinstance(x, str) and x.startswith("/"))]
    plain = partial(without_folders, paths=paths)
    sections = {key: {k: plain(x) if isinstance(x, str) else x for k, x in part.items()}
                for key, part in config.sections().items() if saved.step or key in ("model", "diffusion")}  # fmt: skip
    shape, classes, average = ", ".join(map(str, config.data.shape)), saved.class_names, saved.name_of(run.ema)
    kind = "flow-matching" if run.process.schedule.is_flow else "diffusion"
    size = f"{sum(p.numel() for p in run.network.parameters()):,} weights, for images of {shape.replace(', ', ' x ')}"
    facts = {"classes": ", ".join(classes), "hash of the data that it was trained on": saved.data}
    average = "without a moving average" if average == "none" else f"moving average {average}"
    facts |= {"weights": f"after step {saved.step}, {average}" if saved.step else None}
    facts |= {"begun with": f"step {saved.origin['step']} of {saved.origin['path']}" if saved.origin else None}
    facts |= {"computed on": ", ".join(f"{key} {value}" for key, value in saved.environment.items())}
    scores = [one for one in newest_scores(owner) if one["weights"] == saved.fingerprint(run.ema)]
    # Advice is for the owner, and a verdict for all.
    lines = [[line if line != one.get("advice") else one["verdict"] for line in one["lines"]] for one in scores]
    measured = [f"{'; '.join(filter(None, a))} ({_settings(b)})" for a, b in zip(lines, scores, strict=True)]
    names = (f"{name}_run", name) if is_pipeline else (name, f"{name}_pipeline")
    command = f"diffusion convert diffusers {shlex.quote(name)} --out {shlex.quote(names[not is_pipeline])}"
    makes = f"```sh\n{command}  # makes what is loaded here\n```"
    values = {column: 0 if width == 1 else [0] * width for column, width in run.vectors.widths.items()}
    holes = {"name": _shown(name), "run": json.dumps(names[0]), "pipeline": json.dumps(names[1]), "shape": shape}
    holes |= {"kind": f"A {kind} model: a {config.model.network} of {size}.", "version": diffusion.__version__}
    holes |= {"grid": f"![samples]({quote(str(grid))})" if grid else ""}
    holes |= {"told": _listed(map(plain, [*about_run(owner), *(f"{key}: {x}" for key, x in facts.items() if x)]))}
    holes |= {"recipe": yaml.safe_dump(sections, sort_keys=False, allow_unicode=True, width=10**6)}
    holes |= {"measured": _listed(map(plain, measured)), "steps": str(min(50, config.diffusion.steps))}
    holes |= {"to_run": makes if is_pipeline else "", "to_pipeline": "" if is_pipeline else makes}
    holes |= {"why": "  # with classes, pipeline() alone does not work" if classes else ""}
    holes |= {"labels": f", class_labels=torch.arange(4) % {len(classes)}" if classes else ""}
    holes |= {"conditions": f", conditions={values}" if values else ""}
    text = Template(Path(__file__).with_name("card.md").read_text(encoding="utf-8")).substitute(holes)
    try:
        check_plain(run, "diffusers")
        unet_config(config, len(classes))
    except UsageError:
        text = text.partition("## Use in diffusers")[0]
    figures = [(one["metric"], one.get(one["metric"]), plain(one["lines"][0])) for one in scores]
    fields = yaml.safe_dump(_fields(run, name, figures, is_pipeline), sort_keys=False, allow_unicode=True, width=10**6)
    text = re.sub(r"\n{3,}", "\n\n", f"{fields}---\n\n{SECTION.sub('', text)}").encode(errors="replace").decode()
    return f"---\n{MARK}{digest(text)}\n{text}"


def is_card(path: Path) -> bool:
    """Whether a file is a card that nobody has edited since it was written."""
    mark, _, text = path.read_text(errors="replace").removeprefix("---\n").partition("\n")
    return mark == f"{MARK}{digest(text)}"


def grid_of(run: Run) -> Path | None:
    """The grid that training drew with the weights of a run's checkpoint, if there is one."""
    owner = run_of(run.path) if run.saved.chosen(run.ema) == run.saved.chosen() else None
    path = owner / "samples" / f"{run.path.name}.png" if owner else None
    return path if path and path.exists() else None


def _fields(run: Run, name: str, scores: Sequence[tuple[str, Any, str]], is_pipeline: bool) -> dict[str, Any]:
    """The fields that the Hub reads, without those that are unknown."""
    source, task, path = (
        run.config.data.source,
        "unconditional-image-generation",
        getattr(run.config.data, "path", None),
    )
    fields: dict[str, Any] = {"pipeline_tag": task, "tags": ["diffusion"]}
    fields |= {"library_name": "diffusers"} if is_pipeline else {}
    fields |= {"datasets": [path]} if source == "huggingface" and not Path(str(path)).exists() else {}
    # A gap says something to its owner alone.
    figures = [{"type": metric, "value": value, "name": line} for metric, value, line in scores
               if isinstance(value, float) and metric != "gap"]  # fmt: skip
    about = {"task": {"type": task}, "dataset": {"name": source, "type": source}, "metrics": figures}
    return fields | ({"model-index": [{"name": name, "results": [about]}]} if figures else {})


def _settings(score: dict[str, Any]) -> str:
    return ", ".join(f"{name} {score['settings'][name]}" for name in SETTINGS if score["settings"].get(name))


def _shown(text: str) -> str:
    """A line of text that Markdown shows as it is."""
    return re.sub(r"([*_`\[\]\\#])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def _listed(lines: Iterable[str]) -> str:
    return "\n".join(f"- {_shown(line)}" for line in lines)
