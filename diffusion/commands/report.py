"""`diffusion report`: a run, or several, as one HTML page."""

from __future__ import annotations

import sys
from pathlib import Path

from diffusion.commands.terminal import Parser, check_output, non_empty_path, print_line
from diffusion.errors import UsageError
from diffusion.files.atomic import replace_bytes, written_by
from diffusion.report.page import report

OURS = written_by('<meta name="generator" content="diffusion report">')


def write_report(runs: list[Path], out: Path) -> None:
    """Write the page of runs. Raises UsageError if one has no metrics, or it cannot be written."""
    if out.exists() and not (out.is_file() and OURS(out)):
        raise UsageError(f"{out} is there already, and is no such page")
    try:
        replace_bytes(out, report(runs).encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise UsageError(f"--out {out} cannot be written: {error.strerror or error}") from None


def main() -> None:
    parser = Parser(allow_abbrev=False, description="Write one HTML page of a run, or of several to compare them.")
    parser.add_argument("runs", nargs="+", type=non_empty_path, metavar="RUN", help="a run's folder")
    parser.add_argument("--out", type=non_empty_path, metavar="FILE.html",
                        help="the page (default: report.html in the run's folder; of several runs, here)")  # fmt: skip
    args = parser.parse_args(sys.argv[1:])
    for run in args.runs:
        if not run.is_dir():
            raise UsageError(f"{run} is {'no folder' if run.exists() else 'not there'}: name a run's folder")
    out = args.out or (args.runs[0] if len(args.runs) == 1 else Path()) / "report.html"
    check_output(out, "--out", ".html", OURS)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_report(args.runs, out)
    print_line(f"report: {out.resolve()}")
