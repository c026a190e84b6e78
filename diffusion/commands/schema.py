"""`diffusion schema`: the JSON schema of configuration files, for editors."""

from __future__ import annotations

import json
import os
import sys

from diffusion.commands.terminal import Parser, check_writable, non_empty_path
from diffusion.config import Config
from diffusion.errors import UsageError
from diffusion.fields import json_schema
from diffusion.files import replace_text
from diffusion.training.run_folder import check_writable_file


def main() -> None:
    parser = Parser(allow_abbrev=False, description="Print the JSON schema of configuration files, for editors.")
    parser.add_argument("--out", type=non_empty_path, help="write it to this new file")
    out = parser.parse_args(sys.argv[1:]).out
    text = json.dumps(json_schema(Config), indent=1) + "\n"
    if out is None:
        print(text, end="", flush=True)
        return
    check_writable_file(out)
    if os.path.lexists(out):
        raise UsageError(f"--out {out} is there already: name another, or remove it")
    check_writable(out.parent, f"--out {out}")
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_text(out, text)
