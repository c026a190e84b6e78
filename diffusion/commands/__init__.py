"""The commands of `diffusion`: each parses its flags, calls the library, and prints."""

import importlib
import sys

from diffusion.errors import did_you_mean

COMMANDS = {
    "train": "train a model, or continue a run",
    "sample": "generate images with a trained model",
    "evaluate": "score a trained model",
    "convert": "take in or write weights of improved-diffusion, guided-diffusion, DiT, SiT and diffusers",
    "report": "write one HTML page of a run, or of several to compare them",
    "card": "write a model card of a run",
    "check-data": "tell what a data set holds, and what the network would see of it",
}


def main() -> int:
    """Run `diffusion COMMAND ...`, and return the exit code."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print("usage: diffusion COMMAND ...\n\n" + "\n".join(f"  {name:12}{text}" for name, text in COMMANDS.items()))
        print("\ndiffusion COMMAND --help lists the flags of a command.")
        return 0
    if name not in COMMANDS:
        print(f"diffusion: unknown command {name}: {did_you_mean(name, COMMANDS)}", file=sys.stderr)
        return 2
    sys.argv = [f"diffusion {name}", *sys.argv[2:]]  # what messages and --help begin with

    from diffusion.commands.terminal import exit_code

    return exit_code(importlib.import_module(f"diffusion.commands.{name.replace('-', '_')}").main)
