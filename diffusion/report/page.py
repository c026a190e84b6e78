"""A run, or several, as one HTML page that needs no network: curves, grids, configuration, environment, commands."""

from __future__ import annotations

import base64
import gzip
import html
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from typing import Any

from diffusion.config.files import load_config
from diffusion.data.decode import open_image
from diffusion.errors import UsageError, one_line
from diffusion.run import checkpoint

POINTS, GRIDS, GRID_PIXELS = 1500, 24, 640
"""How many points a curve has at the most, how many grids are shown, and how wide they are."""
GRID_BYTES = 2_000_000
LARGEST = 1e300
"""Larger numbers are none that a run logs, and no plot can show them."""
COLOURS = "#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f"
DASHES = "solid", "dot", "dash", "dashdot"
PLOTS = {
    "loss": (["loss", "held_out_loss"], True), "loss by quarter of t": ([f"loss_q{q}" for q in range(1, 5)], True),
    "norm of the gradient": (["grad_norm"], True), "learning rate": (["lr"], False),
    "images per second": (["images_per_second"], False), "skipped steps": (["skipped"], False),
}  # fmt: skip
"""Title, columns of metrics.jsonl, and whether the axis is logarithmic."""


def report(runs: Sequence[Path]) -> str:
    """The page of one run, or of several to be compared. Raises UsageError if one has no metrics."""
    lines = {run: read_metrics(run) for run in runs}
    names = _names(runs)
    plots = []
    for title, (columns, log) in PLOTS.items():
        traces = []
        for r, (run, name) in enumerate(zip(runs, names, strict=True)):
            for c, column in enumerate(columns):
                label = column if len(runs) == 1 else name if len(columns) == 1 else f"{name}: {column}"
                # Of several runs, a colour is a run, and a dash a column.
                style = {"color": COLOURS[(r if len(runs) > 1 else c) % len(COLOURS)],
                         "dash": DASHES[c if len(runs) > 1 else 0]}  # fmt: skip
                traces.append(_trace(lines[run], column, label) | {"line": style})
        traces = [trace for trace in traces if trace["x"] and (title != "skipped steps" or any(trace["y"]))]
        if traces:
            plots.append({"title": title, "traces": traces, "log": log})
    budget = GRID_BYTES // len(runs)
    grids = [{"name": name, "images": found} for run, name in zip(runs, names, strict=True)
             if (found := read_grids(run, budget))]  # fmt: skip
    shown = names if len(runs) > 1 else [""]
    sections = "".join(_section(run, name) for run, name in zip(runs, shown, strict=True))
    title = ", ".join(names)
    tiles = "".join(_tiles(lines[run][-1], name) for run, name in zip(runs, shown, strict=True))
    sections = (_differences(runs, names) if len(runs) > 1 else "") + sections
    page = (files("diffusion.report") / "report.html").read_text(encoding="utf-8")
    data = json.dumps({"plots": plots, "grids": grids}, allow_nan=False).replace("<", "\\u003c")
    subtitle = f"{len(runs)} runs" if len(runs) > 1 else f"{lines[runs[0]][-1]['step']:,} steps"
    values = {"title": _text(title), "subtitle": subtitle, "tiles": tiles, "sections": sections,
              "plotly": _plotly(), "data": data}  # fmt: skip
    return re.sub(r"@(\w+)@", lambda match: values.get(match[1], match[0]), page)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The numbers in the lines of a run's metrics. Raises UsageError if there are none."""
    found = []
    try:
        for line in (run / "metrics.jsonl").read_text(errors="replace").splitlines():
            try:
                values = json.loads(line)
            except (ValueError, RecursionError):  # cut off by a kill
                continue
            numbers = {name: value for name, value in (values.items() if isinstance(values, dict) else ())
                       if type(value) in (int, float) and abs(value) < LARGEST}  # fmt: skip
            if type(numbers.get("step")) is int:
                found.append(numbers)
    except OSError as error:
        raise UsageError(f"{run} has no metrics.jsonl that can be read ({one_line(error)}): name a run") from None
    if not found:
        raise UsageError(f"{run} has no metrics yet: it has not reached its first train.log_every")
    return sorted(found, key=lambda values: values["step"])


def read_grids(run: Path, budget: int) -> list[tuple[int, str]]:
    """Up to `GRIDS` of a run's grids by step, evenly spaced, as data URIs of `budget` bytes in all."""
    paths = sorted((run / "samples").glob("step_*.png"))
    some = sorted({round(i * (len(paths) - 1) / (GRIDS - 1)) for i in range(GRIDS)}) if len(paths) > GRIDS else None
    found: list[tuple[int, str]] = []
    for path in reversed([paths[i] for i in some] if some else paths):  # the newest first, which must be there
        try:
            with path.open("rb") as file, open_image(file) as image:  # PIL alone would start a program for some formats
                if image.format != "PNG":
                    continue
                scale = min(1.0, GRID_PIXELS / image.width)
                small = image.resize((round(image.width * scale), max(1, round(image.height * scale))))
            buffer = BytesIO()
            small.convert("RGB").save(buffer, format="WEBP", quality=85)
            step = int(path.stem.removeprefix("step_"))
        except Exception:  # PIL has many types; a page leaves out what it cannot show
            continue
        text = base64.b64encode(buffer.getvalue()).decode()
        budget -= len(text)
        if budget < 0 and found:
            break
        found.append((step, f"data:image/webp;base64,{text}"))
    return found[::-1]


def _trace(lines: Sequence[dict[str, Any]], column: str, name: str) -> dict[str, Any]:
    """A curve, of which long stretches are averaged."""
    points = [(line["step"], line[column]) for line in lines if column in line]
    size = -(-len(points) // POINTS) or 1
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    y = [float(f"{sum(value for _, value in part) / len(part):.6g}") for part in parts]
    return {"x": [part[-1][0] for part in parts], "y": y, "name": name, "type": "scatter",
            "mode": "lines+markers" if len(parts) < 30 else "lines", "marker": {"size": 5}}  # fmt: skip


def _tiles(last: dict[str, Any], name: str) -> str:
    values = {"steps": f"{last['step']:,}", "loss": last.get("loss"), "held-out loss": last.get("held_out_loss"),
              "images/s": last.get("images_per_second")}  # fmt: skip
    shown = "".join(f'<div class="tile"><b>{value if isinstance(value, str) else f"{value:.4g}"}</b>{what}</div>'
                    for what, value in values.items() if value is not None)  # fmt: skip
    return f'<p>{_text(name)}</p><div class="tiles">{shown}</div>' if name else f'<div class="tiles">{shown}</div>'


def _differences(runs: Sequence[Path], names: Sequence[str]) -> str:
    """The settings in which runs differ."""
    try:
        flat = [load_config(run / "config.yaml").flat() for run in runs]
    except Exception:  # of a configuration that cannot be read
        return ""
    keys = [key for key in dict.fromkeys(key for found in flat for key in found)
            if any(found.get(key) != flat[0].get(key) for found in flat)]  # fmt: skip
    lines = [f"{key}: " + ", ".join(f"{found.get(key)} in {name}" for found, name in zip(flat, names, strict=True))
             for key in keys]  # fmt: skip
    return f"<h2>What differs</h2><pre>{_text(chr(10).join(lines) or 'nothing but what happened')}</pre>"


def _section(run: Path, name: str) -> str:
    """How a run began, commands for it, its environment and configuration."""
    commands = (
        "train.py --out RUN",
        "train.py --config RUN/config.yaml --out NEW",
        "sample.py --ckpt RUN",
        "evaluate.py --ckpt RUN",
    )
    parts = {"Commands, with RUN for the run's folder": "\n".join(f"python {line}" for line in commands)}
    paths = [str(run.resolve())]
    with suppress(OSError):
        parts["Beginning"] = (run / "data.txt").read_text(errors="replace").strip()
    saved = checkpoint.folders(run)
    if saved:
        with suppress(Exception):  # a damaged checkpoint is told where it is used
            state = json.loads((saved[0] / "state.json").read_bytes())
            best, paths = checkpoint.best(run), [*paths, str((state.get("origin") or {}).get("path"))]
            about = {
                "checkpoints": len(saved), "best by held-out images": best and best.name, "data": state.get("data"),
                "classes": ", ".join(state.get("class_names", [])), **(state.get("environment") or {}),
                "weights from": (state.get("origin") or {}).get("path"),
            }  # fmt: skip
            parts["Checkpoints and environment"] = "\n".join(f"{key}: {value}" for key, value in about.items() if value)
    with suppress(Exception):  # nor one of its configuration
        settings = load_config(run / "config.yaml").flat().values()
        paths += [value for value in settings if isinstance(value, str) and value.startswith("/")]
        parts["Configuration"] = (run / "config.yaml").read_text()
    heads = {title: _text(f"{title}: {name}" if name else title) for title in parts}
    return "".join(f"<h2>{heads[title]}</h2><pre>{_text(text, paths)}</pre>" for title, text in parts.items())


def _text(text: str, paths: Sequence[str] = ()) -> str:
    """Text for the page, which is made to be handed on: `paths` and what looks like one are shortened to their ends."""
    for path in sorted(paths, key=len, reverse=True):
        for written in (path, path.replace("'", "''")):  # in YAML
            text = text.replace(written, Path(path).name)
    return html.escape(re.sub(r"(?<![\w.~/-])/(?:[^/\n'\":;,=()]*/)*([^/\n'\":;,=()]+)", r"\1", text))


def _names(runs: Sequence[Path]) -> list[str]:
    """The shortest ends of paths that tell runs apart."""
    paths = [run.resolve() for run in runs]
    for depth in range(1, 10):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def _plotly() -> str:
    """plotly.js, compressed to a third: browsers unpack it."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise UsageError("a report needs a package: pip install plotly") from None
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()
