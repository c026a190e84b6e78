"""The command line of a training run: `--config FILE`, `--out FOLDER` and dotted overrides."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from diffusion.commands.terminal import Parser
from diffusion.config.files import find_config, parse_value, read_yaml
from diffusion.config.schema import SECTIONS, Config, all_settings, by_section, config_of, override, unknown
from diffusion.errors import UsageError
from diffusion.run.folder import default_out, settings_of

CONTINUING = {"resume", "resume_from", "resume_from_checkpoint", "ckpt", "checkpoint", "continue", "load", "restore"}
"""Flags of other codebases for resuming."""


class Command(NamedTuple):
    """A parsed command line."""

    config: Config
    out: Path
    dry_run: bool = False


def parse_command_line(argv: Sequence[str]) -> Command:
    """Read the command line of a run.

    Later files and flags override earlier ones. Without `--config`, the settings of the run in `--out`, if there is
    one, are the base. Raises UsageError, in one line, for an unknown key and a wrong value.
    """
    args, flags = parse_settings(argv)
    if args.out == "":
        raise UsageError("--out is empty: name the run's folder")
    files = [find_config(file) for file in args.config or ()]
    out = Path(args.out) if args.out is not None else default_out(files[-1] if files else Path("digits.yaml"))
    sections: dict[str, dict[str, Any]] = {}
    for file in files or (settings_of(out) if args.out is not None else []):
        override(sections, read_yaml(file))
    override(sections, flags)
    return Command(config_of(sections), out, args.dry_run)


def parse_settings(argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, dict[str, Any]]]:
    """The flags of a run, and those of them that are settings, by section. Raises UsageError for an unknown flag."""
    parser = run_parser()
    args, rest = parser.parse_known_args(list(argv))
    if rest:
        _refuse(rest, [action.dest for action in parser._actions])
    given = {key: text for key, text in vars(args).items() if text is not None and key in all_settings()}
    return args, by_section({key: _from_text(text, key) for key, text in given.items()})


def run_parser() -> argparse.ArgumentParser:
    """The parser of a run's flags, with a flag for every setting."""
    usage = "%(prog)s [--config FILE] [--out FOLDER] [--SECTION.KEY VALUE ...]"
    description = "Train a diffusion model. The same command again continues the run."
    parser = Parser(allow_abbrev=False, usage=usage, description=description)
    add = parser.add_argument
    text = "the run's YAML file (default: the settings of the run in --out, or the digits run)"
    add("--config", action="append", metavar="FILE", help=text)
    add("--out", metavar="FOLDER", help="the run's folder (default: runs/<name of --config>)")
    text = "train a few steps and tell what the run would cost and what looks wrong; nothing is kept"
    add("--dry_run", "--dry-run", action="store_true", help=text)
    groups = {name: parser.add_argument_group(name) for name in SECTIONS}
    for key, setting in all_settings().items():
        section, name = key.split(".")
        several = len(setting.texts) > 1  # components may mean different things by one name
        texts = [f"{', '.join(owners)}: {text}" if several else text for text, owners in setting.texts.items()]
        default = ", ".join(list(setting.defaults)[: 1 if name in ("source", "network") else None])
        text = f"{'; '.join(texts)} (default: {default})".replace("%", "%%")
        value = f"{{{','.join(setting.words)}}}" if setting.words else name.upper()
        groups[section].add_argument(f"--{key}", metavar=value, help=text)
    return parser


def _from_text(text: str, key: str) -> Any:
    """The value of a flag, by its setting's types."""
    if text == "" or (text != "null" and all_settings()[key].types <= {"string", "null"}):
        return text
    value = parse_value(text, f"--{key}")
    return text if value is None and text not in ("null", "~") else value


def _refuse(rest: list[str], known: list[str]) -> None:
    """Raise UsageError for the first flag that is not known."""
    name = next((word for word in rest if word.startswith("--")), "").removeprefix("--").split("=")[0]
    if not name:
        raise UsageError(f"unrecognized arguments: {' '.join(rest)} (a run's folder is given by --out)")
    if name in SECTIONS:
        raise UsageError(f"--{name} is a section: set its keys one by one, --{name}.KEY VALUE")
    if name.replace("-", "_") in CONTINUING:
        hint = "--out RUN continues a run; --train.init_from RUN begins another with its weights"
        raise UsageError(f"unknown key {name}: {hint}")
    raise unknown(name, known)
