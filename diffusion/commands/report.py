"""`diffusion report`: a run, or several, as one HTML page."""

import sys
from pathlib import Path

from diffusion.commands.terminal import Parser, check_output, non_empty_path, print_line
from diffusion.files.atomic import replace_text, written_by
from diffusion.report.page import report

MARK = '<meta name="generator" content="diffusion report">'


def write_report(runs: list[Path], out: Path) -> None:
    """Write the page of runs. Raises UsageError if a run has no metrics, or `out` is not a page to replace."""
    page = report(runs)
    check_output(out, "--out", ".html", written_by(MARK))
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_text(out, page)


def main() -> None:
    parser = Parser(allow_abbrev=False, description="Write one HTML page of a run, or of several to compare them.")
    parser.add_argument("runs", nargs="+", type=non_empty_path, metavar="RUN", help="a run's folder")
    out_help = "the page (default: report.html in the run's folder; of several runs, in the current folder)"
    parser.add_argument("--out", type=non_empty_path, metavar="FILE.html", help=out_help)
    args = parser.parse_args(sys.argv[1:])
    out = args.out or (args.runs[0] if len(args.runs) == 1 else Path()) / "report.html"
    write_report(args.runs, out)
    print_line(f"report: {out.resolve()}")
