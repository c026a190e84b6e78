"""Train a diffusion model: `accelerate launch train.py`, or `python train.py` on one process. See --help."""

import sys

from diffusion.commands.terminal import exit_code
from diffusion.commands.train import main

if __name__ == "__main__":
    sys.exit(exit_code(main))
