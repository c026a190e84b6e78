"""`diffusion schema`: the JSON schema of configuration files, for editors."""

import copy
import json
import sys

from diffusion.commands.terminal import Parser
from diffusion.config.fields import json_schema
from diffusion.config.schema import SECTIONS, Config
from diffusion.errors import options_of


def main() -> None:
    Parser(allow_abbrev=False, description="Print the JSON schema of configuration files.").parse_args(sys.argv[1:])
    schema = copy.deepcopy(json_schema(Config))
    for cls in SECTIONS.values():
        entry = schema["$defs"][cls.__name__]["properties"]
        if entry.pop("options", None):
            for field, components in cls.choices.items():
                entry[field]["enum"] = list(components)
                entry |= {name: {} for component in components.values() for name in options_of(component)}
    print(json.dumps(schema, indent=1), flush=True)
