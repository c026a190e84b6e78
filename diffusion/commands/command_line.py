"""The command line of a training run: `--config FILE`, `--out FOLDER` and dotted overrides."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusion.commands.terminal import Parser
from diffusion.config.fields import describe, plain
from diffusion.config.files import find_config, parse_value, read_yaml
from diffusion.config.schema import CLASSES, FIELDS, SECTIONS, Config, classes_with, config_of, override, unknown
from diffusion.errors import UsageError
from diffusion.run import checkpoint
from diffusion.run import folder as run_folder
from diffusion.samplers import SAMPLERS, sampler_options

CONTINUING = {"resume", "resume_from", "resume_from_checkpoint", "ckpt", "checkpoint", "continue", "load", "restore"}
"""Flags of other codebases for resuming."""


OPTIONS = {option: [name for name in SAMPLERS if option in sampler_options(name)]
           for sampler in SAMPLERS for option in sampler_options(sampler)}  # fmt: skip
"""The samplers that have each option."""


@dataclasses.dataclass(frozen=True)
class Command:
    """A parsed command line."""

    config: Config
    out: Path
    back_to: int | None = None
    """The step of the checkpoint to go back to."""
    dry_run: bool = False


def parse_command_line(argv: Sequence[str]) -> Command:
    """Read the command line of a run.

    Later files and flags override earlier ones. Without `--config`, the settings of the run in `--out`, if there is
    one, are the base. Raises UsageError, in one line, for an unknown key, a wrong value, and for paths into a run that
    are probably a mistake.
    """
    parser = _parser()
    args, rest = parser.parse_known_args(list(argv))
    if rest:
        _refuse(rest, [action.dest for action in parser._actions])
    given = vars(args)
    if args.out == "":
        raise UsageError("--out is empty: name the run's folder")
    out = Path(args.out) if args.out is not None else None
    sections: dict[str, dict[str, Any]] = {}
    files = [find_config(file) for file in args.config or ()]
    if not files and out is not None:
        files = run_folder.settings_of(out)
        checkpoint.check_format(out)
    for file in files:
        run_folder.check_config_file(file, out)
        override(sections, read_yaml(file))
    flags: dict[str, dict[str, Any]] = {}
    for key in FIELDS:
        if given[key] is not None:
            section, name = key.split(".")
            flags.setdefault(section, {})[name] = _from_text(given[key], key)
    override(sections, flags)
    options = {name: given[f"sample.options.{name}"] for name in OPTIONS}
    if any(value is not None for value in options.values()):
        sample = sections.setdefault("sample", {})
        chosen = {name: parse_value(value, f"--sample.options.{name}") for name, value in options.items()
                  if value is not None}  # fmt: skip
        given_options = sample.get("options", {})
        sample["options"] = given_options | chosen if isinstance(given_options, dict) else given_options
    config = config_of(sections)
    if out is None and args.back_to is not None:
        raise UsageError(f"--back_to is {args.back_to}: add --out with the run that is to go back")
    if out is None:
        out = run_folder.default_out(files[-1] if files else Path("digits"))
    return Command(config, out, args.back_to, args.dry_run)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(allow_abbrev=False, usage="%(prog)s [--config FILE] [--out FOLDER] [--SECTION.KEY VALUE ...]",
                    description="Train a diffusion model. The same command again continues the run.")  # fmt: skip
    add = parser.add_argument
    add("--config", action="append", metavar="FILE",
        help="the run's YAML file (default: the settings of the run in --out, or the digits run)")  # fmt: skip
    add("--out", metavar="FOLDER", help="the run's folder (default: runs/<name of --config>)")
    add("--back_to", type=_step, metavar="STEP",
        help="go back to the checkpoint of this step, and end; later ones are put away")  # fmt: skip
    add("--dry_run", "--dry-run", action="store_true",
        help="train a few steps and tell what the run would cost and what looks wrong; nothing is kept")  # fmt: skip
    for name in SECTIONS:
        group = parser.add_argument_group(name)
        for key in (key for key in FIELDS if key.startswith(f"{name}.")):
            field, having = key.split(".")[1], classes_with(key)
            texts: dict[str, list[str]] = {}  # a field of several sources may mean different things
            for kind in having:
                texts.setdefault(describe(kind, field)[0], []).append(getattr(kind(), "source", ""))
            partial = len(having) < len(CLASSES[name])
            text = "; ".join(f"{', '.join(owners)}: {text}" if partial else text for text, owners in texts.items())
            words = [word for kind in having for words in describe(kind, field)[1].values() for word in words]
            defaults = list(dict.fromkeys(plain(getattr(kind(), field)) or "empty" for kind in having))
            default = defaults[0] if len(defaults) == 1 or field == "source" else f"by source: {', '.join(defaults)}"
            group.add_argument(
                f"--{key}",
                metavar="{" + ",".join(dict.fromkeys(words)) + "}" if words else field.upper(),
                help=f"{text} (default: {default})".replace("%", "%%"),
            )
        if name == "sample":
            for option, samplers in OPTIONS.items():
                default = plain(sampler_options(samplers[0])[option])
                group.add_argument(f"--sample.options.{option}", metavar=option.upper(),
                                   help=f"option of {', '.join(samplers)} (default: {default})")  # fmt: skip
    return parser


def _step(text: str) -> int:
    """An argparse type: a step, or the name of a checkpoint's folder."""
    match = re.fullmatch(r"(?:step_)?(\d{1,12})/?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"it is {text!r}; it must be a step, such as 300")
    return int(match[1])


def _from_text(text: str, key: str) -> Any:
    """The value of a flag, by its field's type."""
    types = {name for kind in classes_with(key) for name in describe(kind, key.split(".")[1])[1]}
    if text == "" or (text != "null" and types <= {"string", "null"}):
        return text
    value = parse_value(text, f"--{key}")
    return text if value is None and text not in ("null", "~") else value


def _refuse(rest: list[str], known: list[str]) -> None:
    """Raise UsageError for the first flag that is not known."""
    first = next((word for word in rest if word.startswith("--")), None)
    if first is None:
        raise UsageError(f"unrecognized arguments: {' '.join(rest)} (a run's folder is given by --out)")
    name = first.removeprefix("--").split("=")[0]
    if name in SECTIONS:
        raise UsageError(f"--{name} is a section: set its keys one by one, --{name}.KEY VALUE")
    if name.replace("-", "_") in CONTINUING:
        raise UsageError(
            f"unknown key {name}: a run is continued by its own folder, --out RUN; --train.init_from RUN begins "
            "another with its weights, and --back_to STEP goes back to an earlier checkpoint"
        )
    raise unknown(name, known)
