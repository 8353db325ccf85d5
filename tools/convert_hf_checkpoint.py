"""Convert checkpoints. The program is ``rlsd convert``; this file starts it."""

import sys

from megatron_rlsd.commands import run

if __name__ == "__main__":
    sys.exit(run("convert", sys.argv[1:]))
