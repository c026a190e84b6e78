"""`diffusion schema`: the JSON schema of configuration files, for editors."""

from __future__ import annotations

import json
import sys

from diffusion.commands.terminal import Parser, check_writable, non_empty_path, print_line
from diffusion.config import Config
from diffusion.fields import json_schema
from diffusion.files import replace_text


def main() -> None:
    parser = Parser(allow_abbrev=False, description="Print the JSON schema of configuration files, for editors.")
    parser.add_argument("--out", type=non_empty_path, help="write it to this file")
    out = parser.parse_args(sys.argv[1:]).out
    text = json.dumps(json_schema(Config), indent=1)
    if out is None:
        for line in text.split("\n"):
            print_line(line)
        return
    check_writable(out.parent, f"--out {out}")
    replace_text(out, text + "\n")
