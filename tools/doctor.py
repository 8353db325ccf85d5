"""Is everything in order for a run? The program is ``rlsd doctor``; this file starts it."""

import sys

from megatron_rlsd.commands import run

if __name__ == "__main__":
    sys.exit(run("doctor", sys.argv[1:]))
