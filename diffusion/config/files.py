"""Configuration files: YAML by the rules of version 1.2 (1e-4 is a number, no is a word), written atomically."""

import io
import os
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer
from ruamel.yaml.events import AliasEvent

from diffusion.config.fields import shown
from diffusion.config.schema import SECTIONS, Config, check_keys, config_of
from diffusion.errors import UsageError, did_you_mean, refusing
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
    by_name = {file.stem: file for file in sorted(SHIPPED.glob("**/*.yaml")) if "accelerate" not in file.parts}
    if path.suffix or os.sep in name or (name and name not in by_name and path.exists()):
        return path
    if name not in by_name:
        raise UsageError(f"--config is '{name}', neither a file nor a shipped name: {did_you_mean(name, by_name)}")
    if path.is_file():
        raise UsageError(f"--config {name} ships with the package, and is a file here: write ./{name} for the file")
    return by_name[name]


class _WithoutAliases(Composer):
    """Refuses aliases: a few lines of them stand for more values than memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.parser.check_event(AliasEvent):
            raise ValueError("it uses an alias (*name)")
        return super().compose_node(parent, index)


def _yaml() -> YAML:
    yaml = YAML(typ="safe", pure=True)
    yaml.Composer = _WithoutAliases
    yaml.default_flow_style, yaml.width = False, 10**6
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    tag = "tag:yaml.org,2002:seq"
    for kind in (list, tuple):
        yaml.representer.add_representer(kind, lambda to, value: to.represent_sequence(tag, value, flow_style=True))
    return yaml


def save_config(config: Config, path: Path) -> None:
    """Write a configuration as YAML, with every setting, atomically."""
    text = io.StringIO()
    _yaml().dump(config.sections(), text)
    replace_text(path, text.getvalue())


def load_config(path: Path) -> Config:
    """Read a configuration that `save_config` or a person wrote. Raises UsageError if it is not one."""
    return config_of(read_yaml(path))


def read_yaml(path: Path) -> dict[str, dict[str, Any]]:
    """The sections of a YAML file, as they stand there. Raises UsageError if it is not made of sections."""
    if not path.is_file():
        raise UsageError(f"--config {path} {'is not a file' if path.exists() else 'does not exist'}")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise UsageError(f"--config {path} is larger than 1 MiB: it is no configuration")
    # YAML's constructors raise whatever an odd tag or number gives.
    with refusing(lambda reason: f"--config {path} is not YAML: {reason}"):
        content = _yaml().load(path.read_bytes())
    if not isinstance(content, dict) or not all(isinstance(content.get(name, {}), dict) for name in SECTIONS):
        raise UsageError(f"--config {path} must be made of sections ({', '.join(SECTIONS)}) of keys")
    check_keys(content)
    return content


def parse_value(text: str, flag: str) -> Any:
    """The value of a flag as YAML reads it. Raises UsageError if it cannot be read."""
    with refusing(lambda reason: f"{flag} is {shown(repr(text))}, which cannot be read: {reason}"):
        return _yaml().load(text)
