"""`python -m diffusion COMMAND`, also for launchers: `torchrun -m diffusion train`."""

import sys

from diffusion.commands import main

if __name__ == "__main__":
    sys.exit(main())
