"""Configuration files: YAML by the rules of version 1.2, read strictly and written atomically."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import yaml

from diffusion.config.schema import SECTIONS, Config, check_keys, config_of
from diffusion.errors import UsageError, did_you_mean, one_line
from diffusion.files.atomic import replace_text

PACKAGE = Path(__file__).parents[1]
SHIPPED = next((path for path in (PACKAGE / "configs", PACKAGE.parent / "configs") if path.is_dir()), PACKAGE)
"""The configurations that ship with the package: inside it in a wheel, beside it in a clone."""
MAX_FILE_BYTES = 2**20
"""A larger YAML file is not a configuration."""


def find_config(name: str) -> Path:
    """The file that `--config` names: a path, or a configuration that ships with the package, such as cifar10.

    Raises UsageError, with the nearest name, where a plain word is neither.
    """
    path = Path(name)
    if not name:
        raise UsageError("--config is empty: name a file, or a configuration that ships with the package")
    if path.suffix or os.sep in name:
        return path
    by_name = {file.stem: file for file in sorted(SHIPPED.glob("**/*.yaml")) if "accelerate" not in file.parts}
    if name in by_name:
        if path.is_file():
            raise UsageError(f"--config {name} ships with the package, and is a file here: write ./{name} for the file")
        return by_name[name]
    if path.exists():
        return path
    raise UsageError(f"--config {name} is not a file or a shipped configuration: {did_you_mean(name, by_name)}")


def save_config(config: Config, path: Path) -> None:
    """Write a configuration as YAML, with every field, atomically.

    The text is read back first. Raises UsageError if that does not give the same configuration.
    """
    text = yaml.dump(dataclasses.asdict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**6)
    if config_of(_parse_yaml(text, str(path))) != config:
        raise UsageError(f"the configuration cannot be written to {path} so that it reads back as the same")
    replace_text(path, text)


def load_config(path: Path) -> Config:
    """Read a configuration that `Config.save` or a person wrote. Raises UsageError if it is not one."""
    return config_of(read_yaml(path))


def read_yaml(path: Path) -> dict[str, dict[str, Any]]:
    """The sections of a YAML file, as they stand there. Raises UsageError if it is not made of sections."""
    try:
        if path.exists() and not path.is_file():  # a pipe would block
            raise OSError("it is no file")
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        raise UsageError(f"--config {path}: {one_line(error).lower()}") from None
    if len(content) > MAX_FILE_BYTES:
        raise UsageError(f"--config {path} is larger than {MAX_FILE_BYTES} bytes: it is no configuration")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"--config {path} is not YAML: {one_line(error)}") from None
    return _parse_yaml(text, str(path))


class _Loader(yaml.SafeLoader):
    """Plain values as in YAML 1.2: 1e-4 is a number, no is a word. A key that stands twice is an error."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [getattr(key, "value", None) for key, _ in node.value]
        if len(set(map(str, keys))) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise UsageError(f"has the key {twice} twice")
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML would not read as a text."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: list(rules) for first, rules in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }


for _tag, _pattern, _first in (
    ("null", r"null|~|", ["n", "~", ""]),
    ("bool", r"true|false", ["t", "f"]),
    ("int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
              r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
     list("-+0123456789.")),
):  # fmt: skip
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)
_Dumper.add_representer(tuple, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, True))
_Dumper.add_representer(
    str,  # a file's name may be any bytes
    lambda dumper, text: (
        dumper.represent_str(text) if text.isprintable() else dumper.represent_binary(os.fsencode(text))
    ),
)


def parse_value(text: str, flag: str) -> Any:
    """A flag's value as YAML reads it. Raises UsageError if it cannot be read."""
    try:
        return yaml.load(text, _Loader)
    except Exception as error:  # YAML's constructors raise whatever an odd tag or number gives
        raise UsageError(f"{flag} is {text!r}, which cannot be read: {one_line(error)}") from None


def _parse_yaml(text: str, path: str) -> dict[str, dict[str, Any]]:
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, _Loader)):
            raise UsageError("uses an alias (*name): write the value out")
        content = yaml.load(text, _Loader)
    except UsageError as error:
        raise UsageError(f"--config {path} {error}") from None
    except Exception as error:  # YAML's constructors raise whatever an odd tag or number gives
        raise UsageError(f"--config {path} is not YAML: {one_line(error)}") from None
    if not isinstance(content, dict) or not all(isinstance(content.get(name, {}), dict) for name in SECTIONS):
        raise UsageError(f"--config {path} must be made of sections ({', '.join(SECTIONS)}) of keys")
    check_keys(content)
    return content
