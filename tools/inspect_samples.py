"""A run's samples in the terminal. The program is ``rlsd inspect``; this file starts it."""

import sys

from megatron_rlsd.commands import run

if __name__ == "__main__":
    sys.exit(run("inspect", sys.argv[1:]))
