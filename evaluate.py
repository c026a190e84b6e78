"""Score a trained model: `python evaluate.py --ckpt RUN`. See --help."""

import sys

from diffusion.commands.evaluate import main
from diffusion.commands.terminal import exit_code

if __name__ == "__main__":
    sys.exit(exit_code(main))
