"""`diffusion card`: a model card of a run."""

import os
import sys
from pathlib import Path

from diffusion.commands.terminal import Parser, check_output, non_empty_path, open_run, print_line
from diffusion.files.atomic import replace_text
from diffusion.interop.card import card, grid_of, is_card
from diffusion.run.folder import run_of


def main() -> None:
    parser = Parser(allow_abbrev=False, description="Write a model card of a run, of what is known and was measured.")
    parser.add_argument("run", type=non_empty_path, metavar="RUN", help="a run's folder, or a checkpoint's")
    parser.add_argument("--ema", help="which moving average, or none (default: the run's first)")
    parser.add_argument("--out", type=non_empty_path, metavar="FILE.md", help="default: README.md in the run's folder")
    args = parser.parse_args(sys.argv[1:])
    run = open_run(args.run, args.ema)
    folder, grid = run_of(run.path) or run.path, grid_of(run)
    out = args.out or folder / "README.md"
    check_output(out, "--out", ".md", is_card)
    out.parent.mkdir(parents=True, exist_ok=True)
    shown = grid and Path(os.path.relpath(grid.resolve(), out.parent.resolve()))
    replace_text(out, card(run, folder.resolve().name, shown))
    print_line(f"card: {out.resolve()}")
