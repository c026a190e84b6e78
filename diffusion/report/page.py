"""A run, or several, as one HTML page that needs no network: curves, grids, configuration, environment, commands."""

import base64
import gzip
import json
import math
import re
import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from diffusion.config.files import load_config
from diffusion.data.decode import open_image
from diffusion.errors import UsageError
from diffusion.run import checkpoint
from diffusion.run.folder import about_run, newest_scores, read_lines
from diffusion.run.grids import encode

POINTS, GRIDS, GRID_PIXELS = 1500, 24, 640
"""The most points of a curve, grids of a page, and pixels of a grid's longer side."""


def report(runs: Sequence[Path]) -> str:
    """The page of one run, or of several to be compared. Raises UsageError if a run has no metrics.

    The script of the page shows the data as numbers and as text, never as markup.
    """
    from plotly.offline import get_plotlyjs  # takes long to import

    data = []
    for run, name in zip(runs, short_names(runs), strict=True):
        curves, grids = average(read_metrics(run)), read_grids(run, math.ceil(GRIDS / len(runs)))
        data.append({"name": name, "curves": curves, "grids": grids, **read_scores(run), **read_texts(run)})
    page = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    # File names may not be UTF-8.
    text = json.dumps(data, allow_nan=False, ensure_ascii=False).encode(errors="replace").decode()
    plotly = base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()
    return page.replace("@plotly@", plotly).replace("@data@", text.replace("<", "\\u003c"))


def short_names(runs: Sequence[Path]) -> list[str]:
    """The shortest ends of paths that distinguish runs."""
    paths = [run.resolve().parts for run in runs]
    depth = next((n for n in range(1, 10) if len({path[-n:] for path in paths}) == len(paths)), 1)
    return ["/".join(path[-depth:]) for path in paths]


def read_metrics(run: Path) -> list[dict[str, float]]:
    """The numbers of a run's metrics, sorted by step. Raises UsageError if there are none."""
    metrics = []
    for line in read_lines(run / "metrics.jsonl"):  # sums of numbers above 1e300 overflow
        numbers = {name: x for name, x in line.items() if type(x) in (int, float) and abs(x) < 1e300}
        metrics += [numbers] if "step" in numbers else []
    if not metrics:
        raise UsageError(f"{run} has no metrics yet: it has not reached its first train.log_every")
    return sorted(metrics, key=lambda numbers: numbers["step"])


def average(metrics: Sequence[dict[str, float]]) -> dict[str, dict[str, list[float]]]:
    """The curve of each column: its means over up to `POINTS` stretches, at the last step of each."""
    curves = {}
    for column in sorted({name for numbers in metrics for name in numbers}):
        points = np.array([(numbers["step"], numbers[column]) for numbers in metrics if column in numbers], float)
        stretches = np.array_split(points, min(POINTS, len(points)))
        means = [float(f"{part[:, 1].mean():.6g}") for part in stretches]
        curves[column] = {"x": [float(part[-1, 0]) for part in stretches], "y": means}
    return curves


def read_grids(run: Path, most: int) -> list[tuple[int, str]]:
    """The step and the data URI of up to `most` grids, evenly spaced, with the newest. Damaged files are left out."""
    paths = sorted((run / "samples").glob("step_*.png"))[::-1]
    grids = []
    for path in paths[:: max(1, math.ceil(len(paths) / most))]:
        with suppress(Exception), path.open("rb") as file, open_image(file) as image:
            if image.format == "PNG":
                image.thumbnail((GRID_PIXELS, GRID_PIXELS))
                content = base64.b64encode(encode(image.convert("RGB"), "WEBP", quality=85)).decode()
                grids.append((int(path.stem.removeprefix("step_")), f"data:image/webp;base64,{content}"))
    return grids[::-1]


def read_scores(run: Path) -> dict[str, Any]:
    """What was measured of a run: `scores` in lines, the newest first, and the newest `gap` of its first average: the
    curves over the noise levels, and what it says."""
    scores, found = newest_scores(run), dict[str, Any]()
    with suppress(Exception):
        lines = [f"{one['checkpoint']}, {one['ema']}: {line}" for one in scores for line in one["lines"]]
        found["scores"] = [without_folders(line, [str(run.resolve())]) for line in lines]
        first = str(load_config(run / "config.yaml").train.averages[0])
        gap = next(one for one in scores if (one["metric"], one["ema"]) == ("gap", first))
        found["gap"] = {"curves": {name: {"x": gap["log_snr"], "y": y} for name, y in gap["curves"].items()}}
        found["gap"] |= {"says": f"{gap['checkpoint']}, {first}: {gap['advice']}"}
    return found


def read_texts(run: Path) -> dict[str, dict[str, str]]:
    """The settings of a run, and texts about it by title, as far as they can be read, without absolute paths."""
    settings, texts = dict[str, str](), dict[str, str]()
    with suppress(Exception):
        flat = load_config(run / "config.yaml").flat()
        settings = {name: value if isinstance(value, str) else json.dumps(value) for name, value in flat.items()}
    if about := about_run(run):
        texts["Beginning"] = "\n".join(about)
    with suppress(Exception):
        best = checkpoint.best(run)
        state = json.loads((checkpoint.folders(run)[0] / "state.json").read_bytes())
        facts = {"best checkpoint": best and best.name, "data": state["data"], **state["environment"]}
        facts["classes"] = ", ".join(state["class_names"])
        texts["Environment"] = "\n".join(f"{name}: {value}" for name, value in facts.items() if value)
    paths = [str(run.resolve()), *(text for text in settings.values() if text.startswith("/"))]
    found = {"settings": settings, "texts": texts}
    return {key: {name: without_folders(text, paths) for name, text in part.items()} for key, part in found.items()}


def without_folders(text: str, paths: Sequence[str] = ()) -> str:
    """A text in which `paths`, and what looks like an absolute path, are shortened to their last names."""
    names = {form: Path(path).name for path in paths for form in (path, shlex.quote(path))}
    for form in sorted(names, key=len, reverse=True):
        text = text.replace(form, names[form])
    return re.sub(r"(?<![\w.~/-])/(?:[^/\n'\":;,=()]*/)*([^/\n'\":;,=()]+)", r"\1", text)
