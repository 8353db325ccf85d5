"""A benchmark's file in our form. The program is ``rlsd prepare``; this file starts it."""

import sys

from megatron_rlsd.commands import run

if __name__ == "__main__":
    sys.exit(run("prepare", sys.argv[1:]))
