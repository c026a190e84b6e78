"""`diffusion check-data`: what a data set holds, and what the network would see of it."""

import dataclasses
import sys
from collections.abc import Sequence

from diffusion.commands.command_line import parse_command_line
from diffusion.commands.terminal import Parser, check_output, non_empty_path, print_line, progress_bar
from diffusion.data.base import hold_out, load, open_data, part
from diffusion.data.conditions import Scale
from diffusion.data.image_files import ImageFiles
from diffusion.data.sources.folder import Folder
from diffusion.data.summary import check_images, describe_data
from diffusion.data.values import to_uint8, to_x_start
from diffusion.errors import UsageError
from diffusion.files.atomic import written_by
from diffusion.run.grids import PNG_MARK, beside, save_grid

ON_SHEET = 100


def main() -> None:
    usage = "%(prog)s [--sheet FILE.png] [--config FILE] [--out RUN] [--data.KEY VALUE ...]"
    what = "Read and describe every image of a data set. Takes the flags of train.py, and trains nothing."
    parser = Parser(allow_abbrev=False, usage=usage, description=what)
    text = "what the network would see of 100 images (default: %(default)s)"
    parser.add_argument("--sheet", type=non_empty_path, default="check-data.png", metavar="FILE.png", help=text)
    args, rest = parser.parse_known_args(sys.argv[1:])
    config = parse_command_line(rest).config.resolved()
    data = config.data
    check_output(args.sheet, "--sheet", ".png", written_by(PNG_MARK.format("check-data")))
    if isinstance(data, Folder):
        data.check_outside(args.sheet, "--sheet")
    args.sheet.parent.mkdir(parents=True, exist_ok=True)
    # An unreadable file is named, and the others are read.
    files = dataclasses.replace(data, on_error="fail") if isinstance(data, ImageFiles) else None
    dataset = open_data(data) if files is None else files.with_conditions()
    with progress_bar(len(dataset), shown=True) as bar:
        errors, flat, duplicates, chosen = check_images(dataset, bar.update)
    how = "and are left out" if data.on_error == "skip" else "(train without them with --data.on_error skip)"
    _print(errors, f"cannot be read {how}")
    if not len(chosen):
        raise UsageError(f"none of the {len(dataset)} images can be read")
    readable = dataset.select(chosen)
    for line in describe_data(data, readable, looked=len(readable)):
        print_line(line)
    _, held_out = hold_out(readable, data.held_out, config.train.seed)
    if held_out is not None:
        names = {held_out.name_of(i) for i in range(len(held_out))}
        seen = sum(len(names.intersection(group)) for group in duplicates if not names.issuperset(group))
        print_line(f"{len(held_out)} of them are held out, {seen} of which are the same as images that are trained on")
    _print(flat, "of a single value")
    _print([" = ".join(group) for group in duplicates], "groups of images that are the same")
    batch = load(readable, part(len(readable), ON_SHEET).tolist())
    images, conditions = to_x_start(batch.images), to_x_start(batch.condition_images)
    for sheet in (images, conditions) if data.random_flip else ():
        sheet[1::2] = sheet[1::2].flip(-1)
    sheet = beside(to_uint8(images), conditions if conditions.shape[1] else None)
    captions = Scale(readable.vectors.widths).captions(batch.vectors)
    save_grid(sheet, args.sheet, captions=captions, by="check-data")
    print_line(f"fingerprint {readable.fingerprint()}; what the network would see: {args.sheet.resolve()}")


def _print(names: Sequence[str], what: str) -> None:
    """Print how many there are, and all of them."""
    for line in [f"{len(names)} {what}:", *(f"  {name}" for name in names)] if names else ():
        print_line(line)
