"""A card of a run: Markdown with the fields of the Hugging Face Hub's model cards, of what is known and measured."""

import html
import json
import re
import shlex
from functools import partial
from pathlib import Path

import jinja2

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


def card(run: Run, name: str, grid: Path | None, is_pipeline: bool = False) -> str:
    """The card of a run, or of the pipeline of diffusers that it became, in a folder `name` with a picture `grid`."""
    saved, config, owner, exports = run.saved, run.config, run_of(run.path) or run.path, True
    try:
        check_plain(run, "diffusers")
        unet_config(config, len(saved.class_names))
    except UsageError:
        exports = False
    paths = [str(owner.resolve()), *(x for x in config.flat().values() if isinstance(x, str) and x.startswith("/"))]
    plain = partial(without_folders, paths=paths)
    scores = [one for one in newest_scores(owner) if one["weights"] == saved.fingerprint(run.ema)]
    page = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    page.filters |= {"plain": plain, "line": lambda text: _shown(plain(text)), "sh": shlex.quote}
    page.filters |= {"json": partial(json.dumps, ensure_ascii=False)}
    body = page.from_string(Path(__file__).with_name("card.md").read_text(encoding="utf-8")).render(
        run=run, saved=saved, config=config, name=name, grid=grid, is_pipeline=is_pipeline, exports=exports,
        other=f"{name}_run" if is_pipeline else f"{name}_pipeline", average=saved.name_of(run.ema),
        weights=sum(p.numel() for p in run.network.parameters()), about=about_run(owner), scores=scores,
        # A gap says something to its owner alone.
        figures=[one for one in scores if isinstance(one.get(one["metric"]), float) and one["metric"] != "gap"],
        settings=SETTINGS, version=diffusion.__version__,
        is_local=Path(str(getattr(config.data, "path", None))).exists(),
    )  # fmt: skip
    body = body.encode(errors="replace").decode()  # names of files may not be UTF-8
    return f"---\n{MARK}{digest(body)}\n{body}"


def is_card(path: Path) -> bool:
    """Whether a file is a card that nobody has edited since it was written."""
    mark, _, body = path.read_text(errors="replace").removeprefix("---\n").partition("\n")
    return mark == f"{MARK}{digest(body)}"


def grid_of(run: Run) -> Path | None:
    """The grid that training drew with the weights of a run's checkpoint, if there is one."""
    owner = run_of(run.path) if run.saved.chosen(run.ema) == run.saved.chosen() else None
    path = owner / "samples" / f"{run.path.name}.png" if owner else None
    return path if path and path.exists() else None


def _shown(text: str) -> str:
    """A line of text that Markdown shows as it is."""
    return re.sub(r"([*_`\[\]\\#])", r"\\\1", html.escape(" ".join(text.split()), quote=False))
