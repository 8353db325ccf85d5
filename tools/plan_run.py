"""Will this run fit? The program is ``rlsd plan``; this file starts it."""

import sys

from megatron_rlsd.commands import run

if __name__ == "__main__":
    sys.exit(run("plan", sys.argv[1:]))
