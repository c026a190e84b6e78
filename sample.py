"""Generate images with a trained model: `python sample.py --ckpt RUN`. See --help."""

import sys

from diffusion.commands.sample import main
from diffusion.commands.terminal import exit_code

if __name__ == "__main__":
    sys.exit(exit_code(main))
