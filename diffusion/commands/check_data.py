"""`diffusion check-data`: what a data set holds, and what the network would see of it."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from diffusion.commands.command_line import parse_command_line
from diffusion.commands.terminal import Parser, check_output, non_empty_path, print_line, progress_bar
from diffusion.data.base import DataSet, hold_out, load, open_data, part
from diffusion.data.image_files import ImageFiles
from diffusion.data.sources.folder import Folder
from diffusion.data.summary import check_images, describe_data
from diffusion.data.values import to_uint8, to_x_start
from diffusion.errors import UsageError
from diffusion.files.atomic import written_by
from diffusion.run.grids import PNG_MARK, save_grid

ON_SHEET = 100


def main() -> None:
    usage = "%(prog)s [--sheet FILE.png] [--config FILE] [--out RUN] [--data.KEY VALUE ...]"
    parser = Parser(allow_abbrev=False, usage=usage, description="Read every image of a data set, and tell what was "
                    "found. Takes the flags of train.py, and trains nothing.")  # fmt: skip
    parser.add_argument("--sheet", type=non_empty_path, default=Path("check-data.png"), metavar="FILE.png",
                        help="what the network would see of 100 images (default: check-data.png)")  # fmt: skip
    args, rest = parser.parse_known_args(sys.argv[1:])
    config = parse_command_line(rest).config.resolved()
    check_output(args.sheet, "--sheet", ".png", written_by(PNG_MARK.format("check-data")))
    if isinstance(config.data, Folder):
        config.data.check_outside(args.sheet, "--sheet")
    args.sheet.parent.mkdir(parents=True, exist_ok=True)
    data = config.data
    if isinstance(data, ImageFiles):  # what cannot be read is named, and ends nothing
        dataset: DataSet = dataclasses.replace(data, on_error="fail").list_files()
    else:
        dataset = open_data(data)
    with progress_bar(len(dataset), shown=True) as bar:
        found = check_images(dataset, bar.update)
    how = "and are left out" if data.on_error == "skip" else "(train without them with --data.on_error skip)"
    _print(found.errors, f"cannot be read {how}")
    if not len(found.readable):
        raise UsageError(f"none of the {len(dataset)} images can be read")
    good = dataset.select(found.readable)
    for line in describe_data(data, good, looked=len(good)):
        print_line(line)
    _, out = hold_out(good, data.held_out, config.train.seed)
    if out is not None:
        held = {out.name_of(i) for i in range(len(out))}
        seen = sum(len(held.intersection(group)) for group in found.duplicates if not held.issuperset(group))
        print_line(f"{len(out)} of them are held out, {seen} of which are the same as images that are trained on")
    _print(found.flat, "of a single value")
    _print([" = ".join(group) for group in found.duplicates], "groups of images that are the same")
    sheet = to_x_start(load(good, part(len(good), ON_SHEET).tolist())[0])
    if data.random_flip:
        sheet[1::2] = sheet[1::2].flip(-1)
    save_grid(to_uint8(sheet), args.sheet, by="check-data")
    print_line(f"fingerprint {good.fingerprint()}; what the network would see: {args.sheet.resolve()}")


def _print(names: Sequence[str], what: str) -> None:
    """Print how many there are, and all of them."""
    for line in [f"{len(names)} {what}:", *(f"  {name}" for name in names)] if names else ():
        print_line(line)
