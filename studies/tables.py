"""What the studies' reports share."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from scipy.stats import t as student_t
from scipy.stats import ttest_1samp


def keep(path: Path, results: dict[str, Any]) -> None:
    """Write results as JSON: the whole file or none, so that an interrupted study goes on from what is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(results))
    temporary.replace(path)


def interval(values: list[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95% confidence interval (Student's t)."""
    half = student_t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), float(half)


def p_value(differences: list[float]) -> float:
    """Of a paired t-test; where all are alike, 1 if they are 0, else 0."""
    return float(ttest_1samp(differences, 0).pvalue) if len(set(differences)) > 1 else float(not any(differences))


def holm(p_values: list[float]) -> list[float]:
    """The p-values of several tests after Holm's correction, in their order."""
    corrected: dict[int, float] = {}
    for place, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        corrected[i] = min(1.0, max([*corrected.values(), p_values[i] * (len(p_values) - place)]))
    return [corrected[i] for i in range(len(p_values))]


def table(heads: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows))


def put_tables(document: Path, tables: dict[str, str]) -> None:
    """Write each table between the marks `<!-- NAME -->` and `<!-- end of NAME -->`, in place of what stands there."""
    text = document.read_text()
    for name, lines in tables.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        text = text[: text.index(begin) + len(begin)] + lines + "\n" + text[text.index(end) :]
    document.write_text(text)
