"""`diffusion schema`: the JSON schema of configuration files, for editors."""

from __future__ import annotations

import json

from diffusion.commands.terminal import Parser, check_output, non_empty_path
from diffusion.config.fields import json_schema
from diffusion.config.schema import Config
from diffusion.files.atomic import replace_text


def main() -> None:
    parser = Parser(allow_abbrev=False, description="Print the JSON schema of configuration files, for editors.")
    parser.add_argument("--out", type=non_empty_path, help="write it to this new file")
    out, text = parser.parse_args().out, json.dumps(json_schema(Config), indent=1) + "\n"
    if out is None:
        print(text, end="", flush=True)
        return
    check_output(out, "--out")
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_text(out, text)
